"""Tiny pipelines recorded, rewritten and replayed in memory: nothing is written, and nothing is compiled."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import diffkiln
from diffkiln.compiler.folding import Folding
from diffkiln.compiler.in_memory import InMemory
from diffkiln.compiler.packing import uses_of
from diffkiln.compiler.plan import Plan
from diffkiln.compiler.tokenizers import tokenizers_of
from diffkiln.interpreter.quiet import quiet_libraries
from diffkiln.models.meta import load_module
from diffkiln.models.weights import weights_of
from diffkiln.passes import manager
from diffkiln.passes.registry import read_passes
from diffkiln.record.constants import Constants
from diffkiln.record.pipeline import Recording, record
from diffkiln.runtime.executor import Executor
from diffkiln.runtime.pipeline import CompiledPipeline
from diffkiln.runtime.text import TextEnd
from diffkiln.runtime.variants import CompiledVariant
from diffkiln.spec import PassEntry
from tests.coverage.calls import CALLS
from tests.coverage.calls.measure import drawn, spec_of

#: A request that nothing was recorded or verified with.
PROMPT, SEED = "a quiet harbour with seven boats at dawn", 11
Weights = Mapping[str, Mapping[str, torch.Tensor]]


@dataclass(frozen=True)
class Recorded:
    """A tiny pipeline with the passes of its spec run on its weights, and its programs as they were recorded."""

    name: str
    spec: dict[str, Any]
    plan: Plan
    recording: Recording
    weights: Weights

    @property
    def denoisers(self) -> list[str]:
        return [name for name in self.plan.state.denoisers if name in self.recording.modules]

    def rewritten(self, *passes: dict[str, Any]) -> Recording:
        """The recording as the spec's own passes and further ones leave it, with its tables filled."""
        more = [item for each in passes for item in read_passes([PassEntry.model_validate(each)])]
        found, _ = manager.rewrite(self.recording, [*self.plan.listed, *more])
        for name in found.modules:
            folding = Folding(found, name)
            folding.add(self.weights[name])
            folding.finish()
        return found

    def draws(self, recording: Recording, prompt: str = PROMPT, seed: int = SEED) -> torch.Tensor:
        """What the programs give, with no weight besides those that a bundle would have."""
        uses = uses_of(recording)
        here = {
            name: {key: tensor for key, tensor in own.items() if name in uses and key in uses[name].read}
            for name, own in self.weights.items()
        }
        store: Any = InMemory(here)
        constants = recording.constants.tensors
        executor = Executor(recording.modules, store, constants, {}, torch.device("cpu"), paranoid=True)
        variants = [
            CompiledVariant(str(index), fixed, programs)
            for index, (fixed, programs) in enumerate(zip(recording.fixed, recording.calls, strict=True))
        ]
        pipe = self.plan.pipe
        text = TextEnd(tokenizers_of(self.recording, pipe))
        compiled = CompiledPipeline(type(pipe).__name__, variants, executor, text, None)
        with quiet_libraries():
            return drawn(compiled, CALLS[self.name], self.spec, seed, prompt, like=type(pipe))


def recorded(name: str, root: Path, *passes: dict[str, Any], **inputs: Any) -> Recorded:
    """A family of `tests.coverage.calls`, recorded after the passes."""
    folder = root / name
    with quiet_libraries():
        if not folder.exists():
            CALLS[name].build().save_pretrained(folder, safe_serialization=True)
        spec = spec_of(CALLS[name], folder)
        spec["inputs"] |= inputs
        spec["passes"] = list(passes)
        plan = diffkiln.check(spec)
        recording = record(plan.pipe, plan.requests, Constants())
        weights = {}
        for component in plan.state.modules:
            module = load_module(plan.source, component)
            manager.apply(module, component, plan.listed)
            weights[component] = dict(weights_of(module))
    return Recorded(name, spec, plan, recording, weights)


def hoisting(made: Recorded, **options: Any) -> list[dict[str, Any]]:
    """The pass for each denoiser that is called."""
    return [{"name": "hoist", "component": name, **options} for name in made.denoisers]
