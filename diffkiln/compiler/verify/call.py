"""The call against its programs, with stand-ins for its components, which see what the call gives them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import wraps
from typing import Any

import numpy as np
import torch

from diffkiln.compiler.in_memory import InMemory
from diffkiln.compiler.tokenizers import tokenizers_of
from diffkiln.compiler.verify.cases import TEXTS, Lengths, cases_of, cuts_unheard, noise_like
from diffkiln.compiler.verify.comparing import difference, same
from diffkiln.compiler.verify.components import CPU, Given, compare_component, compare_lengths
from diffkiln.compiler.verify.reduced import kept_blocks, shrunken
from diffkiln.errors import VerifyError
from diffkiln.interpreter.aten import type_of
from diffkiln.interpreter.layers import repeated_blocks
from diffkiln.interpreter.portable import portable
from diffkiln.passes.manager import nbytes
from diffkiln.program import Module, Program, owner_of
from diffkiln.record.call import Request, component_methods, defaults
from diffkiln.record.casts import Casts
from diffkiln.record.components import Callee, call_key, record_component
from diffkiln.record.constants import Constants
from diffkiln.record.keywords import parameters_of
from diffkiln.record.outputs import of_field
from diffkiln.record.patches import Padding, fixed_lengths, is_patched, paddings
from diffkiln.record.pipeline import Recording
from diffkiln.record.settings import Switches
from diffkiln.record.structure import flatten, unflatten
from diffkiln.runtime.executor import Executor
from diffkiln.runtime.given import described
from diffkiln.runtime.pipeline import CompiledPipeline
from diffkiln.runtime.text import TextEnd
from diffkiln.runtime.variants import CompiledVariant

#: Components with more bytes of weights than this are verified as shrunken reduced models.
WHOLE_UP_TO = 2 * 2**30


class Verification:
    """The comparison of one recording with its pipeline.

    Args:
        pipe: the meta model that was recorded.
        fake: the mode of its tensors.
        recording: what was recorded.
    """

    def __init__(self, pipe: Any, recording: Recording) -> None:
        self._pipe, self._recording = pipe, recording
        self._ways: dict[str, list[Callee]] = {}
        for callee in recording.callees.values():
            self._ways.setdefault(callee.key, []).append(callee)
        self._paddings: dict[str, Padding] = {}
        self._casts, self._switches = Casts(pipe), Switches(pipe)
        self._case = 0
        #: component program → the arguments of its first call in each of the first cases, with real tensors
        self._seen: dict[tuple[str, str], list[Given]] = {}

    # -- the call --

    def check_calls(self, requests: Sequence[Request]) -> None:
        """Compares the call of every variant that was recorded, as `check_call` does."""
        for request, programs in zip(requests, self._recording.calls, strict=False):
            self.check_call(request, programs)

    def check_call(self, request: Request, programs: Mapping[str, Program]) -> None:
        """Compares the pipeline's call with its programs, for other prompts, seeds, latents and scales.

        Raises:
            VerifyError: they differ; says for what.
        """
        read = self._call_weights(programs.values())
        executor = _StandInExecutor(self, read)
        fixed = defaults(self._pipe, request)
        self._paddings = paddings(self._pipe, fixed, request.tokens is not None)
        variant = CompiledVariant("verified", fixed, programs)
        text = TextEnd(tokenizers_of(self._recording, self._pipe))
        compiled = CompiledPipeline(type(self._pipe).__name__, [variant], executor, text, None)
        with self._stand_ins(read), self._casts.watched(), self._switches.watched(), cuts_unheard():
            for case, (keywords, seed) in enumerate(cases_of(programs, request, Lengths(text, programs))):
                self._case = case
                self._compare(compiled, request, keywords, seed)

    def _compare(self, compiled: CompiledPipeline, request: Request, keywords: dict[str, Any], seed: int) -> None:
        def generator() -> torch.Generator:
            return torch.Generator().manual_seed(seed)

        given = dict(request.fixed) | keywords
        # Z-Image writes to the caller's own list of prompts, and diffusion forcing of images into its latents.
        own = {key: _apart(value) for key, value in given.items()}
        own |= {"output_type": request.output} if "output_type" in parameters_of(self._pipe) else {}
        own |= {"generator": generator()} if "generator" in parameters_of(self._pipe) else {}
        # Both portably, as constants were: the smallest difference between them changes all that stand-ins give.
        with torch.inference_mode(), torch.random.fork_rng(devices=[]), portable():
            torch.manual_seed(seed)
            reference = self._pipe(**own)
            torch.manual_seed(seed)
            found = compiled(**given, generator=generator(), output_type="pt")
        for name, got in found.items():
            wanted: Any = of_field(reference, name)
            if isinstance(got, list):  # of which images a checker objects to
                wanted, got = torch.as_tensor(wanted).bool().flatten(), torch.tensor(got)
            if not same(wanted, got):
                raise VerifyError(
                    f"the recorded call of {type(self._pipe).__name__} differs from the pipeline's own for "
                    f"{_shown(keywords)}: {difference(wanted, got)}"
                )

    def _call_weights(self, programs: Iterable[Program]) -> dict[str, dict[str, torch.Tensor]]:
        """Returns values for the weights that the call itself reads, by component."""
        found: dict[str, dict[str, torch.Tensor]] = {}
        for own, weight in ((program, weight) for program in programs for weight in program.weights):
            component, name = owner_of(weight)
            value = noise_like(own.types[f"@{weight}"], weight.encode())
            found.setdefault(component, {})[name] = value.abs()
        return found

    @contextmanager
    def _stand_ins(self, read: Mapping[str, Mapping[str, torch.Tensor]]) -> Iterator[None]:
        """Gives the meta model stand-ins for its components, and values for the weights that the call itself reads."""
        listed: list[tuple[dict[str, Any], str, Any]] = []
        patched: list[tuple[torch.nn.Module, str]] = []
        try:
            for component, name, value in ((key, *item) for key, own in read.items() for item in own.items()):
                path, _, leaf = name.rpartition(".")
                owner = self._pipe.components[component].get_submodule(path)
                table = owner._parameters if leaf in owner._parameters else owner._buffers
                listed.append((table, leaf, table[leaf]))
                table[leaf] = torch.nn.Parameter(value, requires_grad=False) if table is owner._parameters else value
            for name, module, method in component_methods(self._pipe):
                module.__dict__[method] = wraps(getattr(module, method))(self._stand_in(name, method))
                patched.append((module, method))
            yield
        finally:
            for module, method in patched:
                module.__dict__.pop(method, None)
            for table, leaf, before in listed:
                table[leaf] = before

    def _stand_in(self, component: str, method: str) -> Callable[..., Any]:
        padding = self._paddings.get(component) if method == "forward" else None

        def called(*args: Any, **kwargs: Any) -> Any:
            own, shape = flatten((args, kwargs))
            arrays = [leaf.shape for leaf in own if isinstance(leaf, np.ndarray)]
            args, kwargs = unflatten(list(map(_as_tensor, own)), shape)
            leaves, structure = flatten(padding.pad(args, kwargs) if padding else (args, kwargs))
            # Some pipelines hand the generator on; recording refuses components that draw from it.
            leaves = [None if isinstance(leaf, torch.Generator) else leaf for leaf in leaves]
            now = self._casts.of(component), self._switches.of(component)
            ways = self._ways.get(call_key(component, method, leaves, structure, *now), [])
            callee = next((way for way in ways if way.takes(leaves)), None)
            if callee is None:
                raise VerifyError(
                    f"the pipeline calls {component}.{method} with arguments of types that were not recorded"
                )
            seen = self._seen.setdefault((callee.component, callee.program), [])
            if len(seen) < len(TEXTS) and all(given.case != self._case for given in seen):
                seen.append(Given(args, kwargs, leaves, padding, self._case))
            result = self._give(callee, leaves)
            if padding:
                result = [
                    padding.cut(leaf, args, kwargs) if isinstance(leaf, torch.Tensor) else leaf for leaf in result
                ]
            result = [leaf.numpy() if getattr(leaf, "shape", None) in arrays else leaf for leaf in result]
            return unflatten(result, callee.result[1])

        return called

    def _give(self, callee: Callee, leaves: Sequence[Any]) -> list[Any]:
        """Returns the stand-in's results: the recorded result with tensors drawn from a digest of all arguments."""
        digest = hashlib.blake2b(f"{callee.component}/{callee.program}".encode())
        for leaf in leaves:
            if isinstance(leaf, torch.Tensor):
                dense = leaf.clone(memory_format=torch.contiguous_format)  # of one value, too, whose stride may be 0
                digest.update(dense.reshape(-1).view(torch.uint8).numpy().tobytes())
        seed = digest.digest()
        return [
            noise_like(type_of(leaf), seed + bytes([index % 256])) if isinstance(leaf, torch.Tensor) else leaf
            for index, leaf in enumerate(callee.result[0])
        ]

    def give(self, component: str, program: str, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Returns a component's results for a CALL operation, which leaves out the folded arguments."""
        callee = self._recording.callees[component, program]
        leaves, values = list(callee.leaves), iter(tensors)
        for position in callee.tensors:
            leaves[position] = callee.folded[position] if position in callee.folded else next(values)
        return [leaf for leaf in self._give(callee, leaves) if isinstance(leaf, torch.Tensor)]

    # -- components --

    @property
    def _counted(self) -> bool:
        """Returns True if components were recorded for prompts of fixed numbers of tokens."""
        return any(request.tokens is not None for request in self._recording.requests)

    def check_component(self, name: str, module: torch.nn.Module) -> None:
        """Compares a component with its programs, on the arguments that the call gave it.

        Args:
            name: of the component.
            module: with its weights, after all passes.

        Raises:
            VerifyError: they differ.
        """
        recorded = self._recording.modules.get(name)
        if recorded is None:
            return
        for program in recorded.programs:
            callee = self._recording.callees[name, program]
            seen = self._seen[name, program]
            self.check_program(callee, module, recorded, seen[0].leaves)
            if is_patched(module, self._counted) or seen[0].padding:
                compare_lengths(callee, module, seen, self._counted)

    def blocks_needed(self, recording: Recording, name: str, module: torch.nn.Module) -> frozenset[str]:
        """Returns the blocks that must have data to check a component, besides the weights outside of blocks.

        Args:
            recording: after the passes, which may have added programs at another batch.
            name: of the component.
            module: after all passes, with or without its weights.
        """
        recorded = self._recording.modules.get(name)
        if recorded is None:
            return frozenset()
        if nbytes(module) <= WHOLE_UP_TO:
            return frozenset(block for block, _ in repeated_blocks(module))
        each = is_patched(module, self._counted) or any(component == name for component, _ in recording.batches)
        each = each or any(self._seen[name, program][0].padding for program in recorded.programs)
        return frozenset(kept_blocks(module)) | frozenset(kept_blocks(module, in_each_list=True) if each else ())

    def check_program(self, callee: Callee, module: torch.nn.Module, recorded: Module, leaves: list[Any]) -> None:
        """Compares one program with its component on these arguments, or with a reduced model if the weights are large.

        Raises:
            VerifyError: they differ.
        """
        each = is_patched(module, self._counted)  # as its code joins what several lists of blocks give
        with fixed_lengths(module, self._counted):
            if nbytes(module) <= WHOLE_UP_TO:
                compare_component(callee, module, recorded, leaves, self._recording.constants.tensors)
            else:
                self._check_reduced(callee, module, leaves, each)

    def given(self, name: str, program: str) -> list[list[Any]]:
        """Returns the arguments of the first calls of a component's program, flattened."""
        return [seen.leaves for seen in self._seen[name, program]]

    def _check_reduced(self, callee: Callee, module: torch.nn.Module, leaves: list[Any], each: bool) -> None:
        """Compares in the same way a reduced model that has one block of each kind, or one in each list of blocks,
        recorded anew."""
        reduced, meta = shrunken(module, each), shrunken(callee.module, each)
        constants = Constants()
        alike = replace(callee, module=meta, original=getattr(meta, callee.method))
        recorded = record_component([alike], self._recording.fake, constants)
        compare_component(alike, reduced, recorded, leaves, constants.tensors)


class _StandInExecutor(Executor):
    """The runtime's executor with stand-ins for the components."""

    def __init__(self, verification: Verification, read: Mapping[str, Mapping[str, torch.Tensor]]) -> None:
        recording = verification._recording
        super().__init__(recording.modules, InMemory(read), recording.constants.tensors, {}, CPU)  # type: ignore[arg-type]
        self._verification = verification

    def component(self, name: str, program: str) -> Any:
        return _StandIn(self._verification, name, program)


class _StandIn:
    schedule: tuple[()] = ()

    def __init__(self, verification: Verification, name: str, program: str) -> None:
        self._verification, self._name, self._program = verification, name, program

    def __call__(self, *tensors: torch.Tensor) -> list[torch.Tensor]:
        return self._verification.give(self._name, self._program, tensors)


def _as_tensor(leaf: Any) -> Any:
    return torch.from_numpy(leaf) if isinstance(leaf, np.ndarray) else leaf


def _apart(value: Any) -> Any:
    """Returns a list or a tensor that may be written to."""
    return list(value) if isinstance(value, list) else value.clone() if isinstance(value, torch.Tensor) else value


def _shown(keywords: Mapping[str, Any]) -> str:
    return ", ".join(f"{key}={str(described(value))[:40]!r}" for key, value in keywords.items())
