"""Compute what does not follow the latents once: when the bundle is made, or when a request comes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Any, ClassVar

import torch
from pydantic import Field

from diffkiln.errors import Incompatible, Problem
from diffkiln.models.weights import weights_of
from diffkiln.passes.base import Fact, Outcome, ProgramPass, Restored, State
from diffkiln.passes.hoisting import Hoisted, encoded_ahead, hoisted, matches
from diffkiln.program.operators import nbytes
from diffkiln.record.folds import Fold
from diffkiln.record.pipeline import Recording
from diffkiln.spec import Target


class Hoist(ProgramPass):
    """Compute what does not follow the latents once, and not in every denoising step.

    Values that depend on weights and timesteps alone become tables of the bundle, and the weights that only they need
    leave it. Values that depend on the request, such as keys and values of its prompt, are computed before the first
    step. What depends on both is computed for all steps in one batch if each of its rows is computed by itself. A value
    whose table would be larger than its weights stays in the loop.

    Of a text encoder, what it makes of prompts that are fixed becomes a table: of the empty negative prompt, and of
    those in `fixed_prompts` of the inputs. If all its prompts are fixed, it leaves the bundle.
    """

    name: ClassVar[str] = "hoist"
    summary: ClassVar[str] = "compute what does not follow the latents once"
    after: ClassVar = {
        "scheduler": "the scheduler decides the timesteps",
        "guidance": "guidance decides how the denoiser is called",
        "cache_schedule": "a schedule decides what a step computes",
        "attention_backend": "preambles are made of programs that have their kernels",
        "quantize": "tables are computed with the weights as they are stored",
        "calibrate": "calibrate chooses the steps that compute",
    }
    folds_weights: ClassVar[str] = "what does not follow the latents was computed with the weights as they were"
    requires_not: ClassVar = {
        "hooked_inside": "diffusers decides at each step, and nothing is known ahead. Remove hoist",
    }
    examples: ClassVar = (
        {"name": "hoist", "component": "transformer"},
        {"name": "hoist", "component": "transformer", "keep": ["time_text_embed.*"], "keep_originals": True},
        {"name": "hoist", "component": "text_encoder"},
    )

    keep: tuple[str, ...] = Field((), description="Patterns of the layers that stay in the denoising loop.")
    keep_originals: bool = Field(
        False, description="Also keep the weights that nothing reads any more, which as_diffusers needs."
    )

    batch: bool = Field(
        True,
        description="Compute what follows timestep and request for all steps at once, within rounding. false: one step "
        "after the other, to the bit.",
    )

    def provides(self) -> Iterable[Fact]:
        yield Fact("hoisted", self.component, self.name)

    def check_module(self, module: torch.nn.Module, state: State, target: Target, where: str) -> Iterable[Problem]:
        if self.component not in state.denoisers and not _may_encode(module):
            reason = f"{self.component} is not a part of the denoising run, nor a text encoder"
            yield Problem(where, reason, "Choose the denoiser, or a text encoder.")
            return
        names = [name for name, _ in weights_of(module)]
        for index, pattern in enumerate(self.keep):
            if not any(matches(name, pattern) for name in names):
                inside = any(fnmatchcase(name, f"{pattern}*") for name in names)
                hint = f'Did you mean "{pattern}*"?' if inside else "Name layers as the module does."
                reason = f"the pattern {pattern!r} matches no layer of {self.component}"
                yield Problem(f"{where}.keep[{index}]", reason, hint)

    def run(self, state: State) -> Outcome:
        note = "originals stay for as_diffusers" if self.keep_originals else "what it folds leaves the bundle"
        return Outcome(state.with_facts(self.provides()), True, (note,))

    # -- the programs --

    @property
    def rewrites(self) -> bool:
        return True

    @property
    def leaves_weights_out(self) -> bool:
        return not self.keep_originals

    def rewrite(self, recording: Recording) -> tuple[Recording, Sequence[str]]:
        """Returns the recording with tables, and with preambles before the first step.

        Raises:
            ValueError: the call never calls the component, or all of it follows the latents or the request.
        """
        if self.component not in recording.modules:
            raise ValueError(f"the call never calls {self.component}")
        module = recording.modules[self.component]
        if _may_encode(recording.pipe.components[self.component]):
            return self._encoded(recording)
        found = hoisted(recording.calls, module, recording.constants, self.keep, self.keep_originals, self.batch)
        if found.is_empty:
            why = "what does not follow the latents is kept, or would be larger than its weights"
            raise ValueError(f"nothing of {self.component} is computed ahead: {why}. Remove hoist")
        modules = {**recording.modules, self.component: found.module}
        changed = replace(recording, calls=found.calls, modules=modules, folds=(*recording.folds, *found.folds))
        return changed, list(_notes(found))

    def _encoded(self, recording: Recording) -> tuple[Recording, Sequence[str]]:
        """Returns the recording with tables for the calls of a text encoder that take constants alone."""
        name = self.component
        found = encoded_ahead(recording.calls, recording.modules[name], recording.constants, self.keep_originals)
        if not found.folds:
            hint = 'Give the prompts that never change as "fixed_prompts" in "inputs", or remove hoist'
            raise ValueError(f"every call of {name} takes a prompt that the request brings. {hint}")
        modules = {key: module for key, module in recording.modules.items() if key != name}
        modules |= {name: found.module} if found.module else {}
        changed = replace(recording, calls=found.calls, modules=modules, folds=(*recording.folds, *found.folds))
        left = [] if found.module else [f"{name} leaves the bundle, since all its prompts are fixed"]
        return changed, [_tables(found.folds), *left]

    # -- as diffusers' own pipeline --

    @classmethod
    def check_restore(cls, options: Mapping[str, Any], bundle: Restored) -> None:
        component = str(options["component"])
        if not options.get("keep_originals"):
            raise Incompatible(
                f"hoist has left weights of {component} out of the bundle, and diffusers computes with them in every "
                'step. Load the bundle without as_diffusers, or compile it with "keep_originals": true in hoist'
            )
        if component in bundle.compiled and not bundle.eager:
            raise Incompatible(
                f"the engines of {component} take what hoist computes ahead, which diffusers' blocks are not given. "
                'Load the bundle without as_diffusers, or compile it with "on_incompatible": "eager" in "runtime", so '
                "that diffusers' own blocks run"
            )


def _notes(found: Hoisted) -> Iterator[str]:
    if found.folds:
        yield _tables(found.folds)
    if found.preambles:
        yield f"what a request decides is computed before the first step ({sum(map(_results, found.preambles))})"
    if found.dear:
        yield f"what would be larger than its weights stays in the loop ({found.dear})"


def _tables(folds: Sequence[Fold]) -> str:
    size = sum(_row_size(fold.program) * len(fold.evaluations) for fold in folds)
    return f"tables of {size / 1e6:.2f} MB hold what is fixed ({sum(len(fold.program.outputs) for fold in folds)})"


def _may_encode(module: torch.nn.Module) -> bool:
    """Returns True for a model of transformers: there are the encoders of prompts, and no denoiser."""
    return type(module).__module__.startswith("transformers.")


def _row_size(program: Any) -> int:
    return sum(nbytes(program.types[ref.name]) for ref in program.outputs)


def _results(program: Any) -> int:
    return len(program.outputs)


PLUGIN = Hoist
