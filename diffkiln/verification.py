"""Recordings are believed only after they were compared with what they were recorded from.

The call: the pipeline's own `__call__` runs with *stand-ins* for its components, functions that give pseudo-random
tensors which depend on every bit of their arguments; so does the program, through the runtime that will run it in
production. The components: each is run as diffusers runs it and replayed from its program, on what the call gave it;
whole where its weights are small enough, else as a twin with one block of each kind. Both bit for bit.

Where a call has a fixed length that diffusers' own has not (diffkiln.record.lengths), what diffusers gives a component
is padded first, so that the call is compared bit for bit all the same. Each such component is then compared with
itself, as a twin in float32 with a block of each list: as diffusers has it, on what diffusers gives it, and at the
fixed length; within rounding.
"""

from __future__ import annotations

import copy
import hashlib
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from diffkiln.aten import Interpreter, type_of
from diffkiln.errors import VerifyError
from diffkiln.packing import tokenizers_of
from diffkiln.program import REGION, Module, Op, Program
from diffkiln.record.components import Callee, record_component, repeated_blocks, tracing, weights_of
from diffkiln.record.constants import Constants
from diffkiln.record.lengths import Padding, fixed_lengths, is_rewritten, paddings, whole
from diffkiln.record.pipeline import NEGATIVES, PROMPTS, Recording, Request, component_methods, defaults
from diffkiln.record.structure import flatten, key_of, unflatten
from diffkiln.runtime.executor import Executor
from diffkiln.runtime.pipeline import CompiledPipeline, CompiledVariant
from diffkiln.runtime.text import TextEnd

#: Components with more bytes of weights than this are verified as shrunken twins.
WHOLE_UP_TO = 2 * 2**30

_LONG = " ".join(f"word{index} of a Prompt, longer than any TEXT encoder reads &amp; cut" for index in range(120))
#: One token, a usual one with what transforms touch, and one that is cut.
TEXTS = ("a", "  A red   Fox; &lt;b&gt; \u201cjumps\u201d over schÃ¶n snow\n", _LONG)

CPU = torch.device("cpu")

#: How much of its largest value a float32 result may differ by where a length is fixed: sums have another order.
ROUNDING = 1e-5


@dataclass(frozen=True)
class _Given:
    """What one call of a component was given: as diffusers does, and the program's leaves; both are the same where the
    component is not padded."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    leaves: list[Any]
    padding: Padding | None
    case: int


class Verification:
    """Compares one recording with its pipeline.

    Args:
        pipe: the ghost that was recorded.
        fake: the mode of its tensors.
        recording: what was recorded.
    """

    def __init__(self, pipe: Any, recording: Recording) -> None:
        self._pipe, self._recording = pipe, recording
        self._keys = {_call_key(callee): callee for callee in recording.callees.values()}
        self._paddings: dict[str, Padding] = {}
        self._case = 0
        #: component program → the arguments of its first call in each of the first cases, with real tensors
        self._seen: dict[tuple[str, str], list[_Given]] = {}

    # -- the call --

    def check_call(self, request: Request, programs: Mapping[str, Program]) -> None:
        """Compare the pipeline's call with its programs, for other prompts, seeds, latents and scales.

        Raises:
            VerifyError: they differ; says for what.
        """
        read = self._call_weights(programs.values())
        executor = _StandInExecutor(self, read)
        fixed = defaults(self._pipe, request)
        self._paddings = paddings(self._pipe, fixed)
        variant = CompiledVariant("verified", fixed, programs)
        text = TextEnd(tokenizers_of(self._recording, self._pipe))
        compiled = CompiledPipeline(type(self._pipe).__name__, [variant], executor, text, None)
        with self._stand_ins(read), _unheard(logging.getLogger("diffkiln.runtime.text")):
            for case, (keywords, seed) in enumerate(_cases(programs, request)):
                self._case = case
                self._compare(compiled, request, keywords, seed)

    def _compare(self, compiled: CompiledPipeline, request: Request, keywords: dict[str, Any], seed: int) -> None:
        def generator() -> torch.Generator:
            return torch.Generator().manual_seed(seed)

        given = dict(request.fixed) | keywords
        # Z-Image writes to the caller's own list of prompts.
        own = {key: list(value) if isinstance(value, list) else value for key, value in given.items()}
        with torch.inference_mode():
            reference = self._pipe(**own, generator=generator(), output_type="pt")
        (expected,) = [leaf for leaf in flatten(reference)[0][:1] if isinstance(leaf, torch.Tensor)]
        found = compiled(**given, generator=generator(), output_type="pt", return_dict=False)[0]
        if not same(expected, found):
            raise VerifyError(
                f"the recorded call of {type(self._pipe).__name__} differs from the pipeline's own for "
                f"{_shown(keywords)}: {difference(expected, found)}"
            )

    def _call_weights(self, programs: Any) -> dict[str, torch.Tensor]:
        """Values for the weights that the call itself reads."""
        names = {name for program in programs for name in program.weights}
        types = {name: program.types[f"@{name}"] for program in programs for name in program.weights}
        return {name: _random(types[name], name.encode()).abs() for name in sorted(names)}

    @contextmanager
    def _stand_ins(self, read: Mapping[str, torch.Tensor]) -> Iterator[None]:
        """The ghost with stand-ins for its components, and values for the weights that the call itself reads."""
        places: list[tuple[dict[str, Any], str, Any]] = []
        patched: list[tuple[torch.nn.Module, str]] = []
        try:
            for weight, value in read.items():
                component, _, name = weight.partition("/")
                path, _, leaf = name.rpartition(".")
                owner = self._pipe.components[component].get_submodule(path)
                table = owner._parameters if leaf in owner._parameters else owner._buffers
                places.append((table, leaf, table[leaf]))
                table[leaf] = torch.nn.Parameter(value, requires_grad=False) if table is owner._parameters else value
            for name, module, method in component_methods(self._pipe):
                module.__dict__[method] = self._stand_in(name, method)
                patched.append((module, method))
            yield
        finally:
            for module, method in patched:
                module.__dict__.pop(method, None)
            for table, leaf, before in places:
                table[leaf] = before

    def _stand_in(self, component: str, method: str) -> Callable[..., Any]:
        padding = self._paddings.get(component) if method == "forward" else None

        def called(*args: Any, **kwargs: Any) -> Any:
            leaves, structure = flatten(padding.pad(args, kwargs) if padding else (args, kwargs))
            # Some pipelines hand the generator on; recording refuses components that draw from it.
            leaves = [None if isinstance(leaf, torch.Generator) else leaf for leaf in leaves]
            callee = self._keys.get(f"{component}.{method}|{key_of(leaves, structure)}")
            if callee is None:
                raise VerifyError(
                    f"the pipeline calls {component}.{method} with arguments of types that were not recorded"
                )
            seen = self._seen.setdefault((callee.component, callee.program), [])
            if len(seen) < len(TEXTS) and all(given.case != self._case for given in seen):
                seen.append(_Given(args, kwargs, leaves, padding, self._case))
            result = self._give(callee, leaves)
            if padding:
                result = [
                    padding.cut(leaf, args, kwargs) if isinstance(leaf, torch.Tensor) else leaf for leaf in result
                ]
            return unflatten(result, callee.result[1])

        return called

    def _give(self, callee: Callee, leaves: Sequence[Any]) -> list[Any]:
        """What the stand-in gives: the recorded result with tensors drawn from a digest of all arguments."""
        digest = hashlib.blake2b(f"{callee.component}/{callee.program}".encode())
        for leaf in leaves:
            if isinstance(leaf, torch.Tensor):
                dense = leaf.clone(memory_format=torch.contiguous_format)  # of one value, too, whose stride may be 0
                digest.update(dense.reshape(-1).view(torch.uint8).numpy().tobytes())
        seed = digest.digest()
        return [
            _random(type_of(leaf), seed + bytes([index % 256])) if isinstance(leaf, torch.Tensor) else leaf
            for index, leaf in enumerate(callee.result[0])
        ]

    def give(self, component: str, program: str, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """The same for a CALL operation, which leaves out the arguments that were folded."""
        callee = self._recording.callees[f"{component}/{program}"]
        leaves, values = list(callee.leaves), iter(tensors)
        for position in callee.tensors:
            leaves[position] = callee.folded[position] if position in callee.folded else next(values)
        return [leaf for leaf in self._give(callee, leaves) if isinstance(leaf, torch.Tensor)]

    # -- components --

    def check_component(self, name: str, module: torch.nn.Module) -> None:
        """Compare a component with its programs, on what the call gave it.

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
            callee = self._recording.callees[f"{name}/{program}"]
            seen = self._seen[name, program]
            self.check_program(callee, module, recorded, seen[0].leaves)
            if is_rewritten(module) or seen[0].padding:
                _compare_lengths(callee, module, seen)

    def check_program(self, callee: Callee, module: torch.nn.Module, recorded: Module, leaves: list[Any]) -> None:
        """Compare one program of a component with it on these arguments, or with a twin where the weights are large.

        Raises:
            VerifyError: they differ.
        """
        size = sum(tensor.numel() * tensor.itemsize for _, tensor in weights_of(module))
        with fixed_lengths():
            if size <= WHOLE_UP_TO:
                compare_component(callee, module, recorded, leaves, self._recording.constants.tensors)
            else:
                self._check_twin(callee, module, leaves)

    def given(self, name: str, program: str) -> list[list[Any]]:
        """The arguments of the first calls of a component's program, flattened."""
        return [seen.leaves for seen in self._seen[name, program]]

    def _check_twin(self, callee: Callee, module: torch.nn.Module, leaves: list[Any]) -> None:
        """The same with a twin that has one block of each kind, recorded anew."""
        each = is_rewritten(module)  # as its code joins what several lists of blocks give
        twin, ghost = shrunken(module, each), shrunken(callee.module, each)
        constants = Constants()
        alike = replace(callee, module=ghost, original=getattr(ghost, callee.method))
        recorded = record_component([alike], self._recording.fake, constants)
        compare_component(alike, twin, recorded, leaves, constants.tensors)


def _compare_lengths(callee: Callee, module: torch.nn.Module, seen: Sequence[_Given]) -> None:
    """Compare a component at the fixed length with itself as diffusers has and calls it.

    Raises:
        VerifyError: what the call uses of the results differs by more than rounding.
    """
    twin, dtype = in_float32(shrunken(module, in_each_list=True))
    for given in seen:
        args, kwargs = _cast((given.args, given.kwargs), dtype)
        padded = unflatten(_cast(given.leaves, dtype), callee.structure)
        with torch.inference_mode(), _blamed(callee, module):
            expected = getattr(twin, callee.method)(*args, **kwargs)
            with fixed_lengths(), tracing():
                found = getattr(twin, callee.method)(*padded[0], **padded[1])
        for index, pair in enumerate(zip(_tensors(expected), _tensors(found), strict=True)):
            used = given.padding.used if given.padding else whole
            want, got = (used(leaf, args, kwargs) for leaf in pair)
            if not close(want, got):
                raise VerifyError(
                    f"component {callee.component!r} at a fixed length: output {index} differs from "
                    f"{type(module).__name__}.{callee.method} by more than rounding: {difference(want, got)}"
                )


def in_float32(twin: torch.nn.Module) -> tuple[torch.nn.Module, torch.dtype | None]:
    """A copy of a twin in float32, and that type; the twin itself and None where its weights are not torch's own types.

    Quantized weights become what they stand for: quantized activations would turn rounding into whole steps.
    """
    if {tensor.dtype for tensor in twin.parameters()} == {torch.float32} and not _quantized(twin):
        return twin, torch.float32
    made = copy.deepcopy(twin)
    for table, key in _quantized(made):
        table[key] = torch.nn.Parameter(table[key].dequantize().float(), requires_grad=False)
    if not {tensor.dtype for tensor in made.parameters()} <= {torch.float32, torch.bfloat16, torch.float16}:
        return twin, None
    return made.float(), torch.float32


def _quantized(module: torch.nn.Module) -> list[tuple[dict[str, Any], str]]:
    """Where a module's quantized weights are: a table of parameters and the name in it."""
    tables = [part._parameters for part in module.modules()]
    return [(table, key) for table in tables for key, weight in table.items() if is_traceable_wrapper_subclass(weight)]


def _cast(nest: Any, dtype: torch.dtype | None) -> Any:
    leaves, structure = flatten(nest)
    return unflatten(
        [
            leaf.to(dtype) if dtype and isinstance(leaf, torch.Tensor) and leaf.is_floating_point() else leaf
            for leaf in leaves
        ],
        structure,
    )


def _tensors(result: Any) -> list[torch.Tensor]:
    return [leaf for leaf in flatten(result)[0] if isinstance(leaf, torch.Tensor)]


def compare_component(
    callee: Callee,
    module: torch.nn.Module,
    recorded: Module,
    leaves: Sequence[Any],
    constants: Mapping[str, torch.Tensor],
) -> None:
    """Run a component as diffusers does and replay its program on the same arguments.

    Raises:
        VerifyError: the results differ in a bit.
    """
    program = recorded.programs[callee.program]
    args, kwargs = unflatten(list(leaves), callee.structure)
    with torch.inference_mode():
        with tracing(), _blamed(callee, module):
            result = getattr(module, callee.method)(*args, **kwargs)
        expected = [leaf for leaf in flatten(result)[0] if isinstance(leaf, torch.Tensor)]
        inputs = [leaves[position] for position in callee.tensors if position not in callee.folded]
        found = replay(recorded, program, dict(weights_of(module)), constants)(inputs)
    for index, (want, got) in enumerate(zip(expected, found, strict=True)):
        if not same(want, got):
            raise VerifyError(
                f"component {callee.component!r}, program {callee.program!r}: output {index} of the replay differs "
                f"from {type(module).__name__}.{callee.method}: {difference(want, got)}"
            )


@contextmanager
def _blamed(callee: Callee, module: torch.nn.Module) -> Iterator[None]:
    """What a component's own code raises becomes a VerifyError that says which, and what may be the cause."""
    try:
        yield
    except Exception as error:
        who = f"component {callee.component!r} ({type(module).__name__}.{callee.method})"
        raise VerifyError(
            f"{who} fails on what the call gives it: {type(error).__name__}: {error}. The pipeline itself would fail "
            "too. If components are cast to different types, cast those that take each other's results to the same"
        ) from error


def replay(
    recorded: Module, program: Program, weights: Mapping[str, torch.Tensor], constants: Mapping[str, torch.Tensor]
) -> Callable[[Sequence[torch.Tensor]], list[torch.Tensor]]:
    """A component program as a function of its inputs, on the CPU, operation by operation."""

    def region(op: Op) -> Callable[..., Sequence[torch.Tensor]]:
        inner = Interpreter(recorded.regions[op.attrs["region"]], CPU)
        return lambda *inputs: inner(inputs, weights, constants, f"{op.attrs['instance']}.")

    interpreter = Interpreter(program, CPU, {REGION: region})
    return lambda inputs: interpreter(inputs, weights, constants)


def shrunken(module: torch.nn.Module, in_each_list: bool = False) -> torch.nn.Module:
    """A copy of a module that shares its weights and keeps one block of each kind, or one in each list of blocks."""
    kept: set[tuple[type, str]] = set()
    gone: set[int] = set()
    for name, block in repeated_blocks(module):
        kind = type(block), name.rpartition(".")[0] if in_each_list else ""
        if kind in kept:
            gone.add(id(block))
        kept.add(kind)
    memo = {id(tensor): tensor for tensor in (*module.parameters(), *module.buffers())}
    twin_lists = [
        (name, [child for child in part if id(child) not in gone])
        for name, part in module.named_modules()
        if isinstance(part, torch.nn.ModuleList) and any(id(child) in gone for child in part)
    ]
    for key in gone:
        memo[key] = torch.nn.Module()  # type: ignore[assignment]
    twin = copy.deepcopy(module, memo)  # type: ignore[arg-type]
    for name, left in twin_lists:
        home, _, leaf = name.rpartition(".")
        setattr(twin.get_submodule(home), leaf, torch.nn.ModuleList(memo[id(child)] for child in left))  # type: ignore[misc]
    return twin


class _StandInExecutor(Executor):
    """The runtime's executor with stand-ins for the components."""

    def __init__(self, verification: Verification, read: Mapping[str, torch.Tensor]) -> None:
        recording = verification._recording
        super().__init__(recording.modules, _NoStore(read), recording.constants.tensors, {}, CPU)  # type: ignore[arg-type]
        self._verification = verification

    def component(self, name: str, program: str) -> Any:
        return _StandIn(self._verification, name, program)


class _StandIn:
    schedule: tuple[()] = ()

    def __init__(self, verification: Verification, name: str, program: str) -> None:
        self._verification, self._name, self._program = verification, name, program

    def __call__(self, *tensors: torch.Tensor) -> list[torch.Tensor]:
        return self._verification.give(self._name, self._program, tensors)


class _NoStore:
    """A weight store that holds nothing but the weights that the call itself reads."""

    def __init__(self, read: Mapping[str, torch.Tensor]) -> None:
        self._read = read

    def peek(self, component: str, weight: str) -> torch.Tensor:
        return self._read[f"{component}/{weight}"]

    def follow(self, _schedule: Any) -> _NoStore:
        return self

    def close(self) -> None:
        pass


def _cases(programs: Mapping[str, Program], request: Request) -> Iterator[tuple[dict[str, Any], int]]:
    """Keywords of calls to compare, and a seed for each."""
    call = programs["call"]

    def prompts(text: str, keyword: str = "prompt") -> dict[str, Any]:
        rows = [f"{text}{index}" for index in range(request.batch_size)]
        return {keyword: text if request.batch_size == 1 else rows}

    for seed, text in enumerate(TEXTS):
        yield prompts(text), seed
    if any(item.source.get("kind") == "scalar" for item in call.inputs):
        yield prompts(TEXTS[1]) | {"guidance_scale": request.fixed["guidance_scale"] * 1.5 + 0.25}, 3
    second = [keyword for keyword in PROMPTS[1:] if _asks_for(call, keyword)]
    if second:
        yield prompts(TEXTS[1]) | {key: value for word in second for key, value in prompts("other", word).items()}, 4
    if negative := programs.get("call+negative"):
        words = [keyword for keyword in NEGATIVES[:1] if _asks_for(negative, keyword)]
        for seed, text in enumerate(TEXTS, 5):
            yield prompts(TEXTS[1]) | {key: value for word in words for key, value in prompts(text, word).items()}, seed
    for name in ("call+latents", "call+negative+latents"):
        if name in programs:
            (item,) = [item for item in programs[name].inputs if item.source.get("keyword") == "latents"]
            more = prompts("blurred", "negative_prompt") if "negative" in name else {}
            yield prompts(TEXTS[1]) | more | {"latents": _random(item.type, name.encode())}, 8


@contextmanager
def _unheard(logger: logging.Logger) -> Iterator[None]:
    """Without the warnings of a logger: prompts are cut here on purpose."""
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before


def _asks_for(program: Program, keyword: str) -> bool:
    return any(row.get("keyword") == keyword for text in program.texts for row in text["rows"])


def _call_key(callee: Callee) -> str:
    return f"{callee.component}.{callee.method}|{key_of(callee.leaves, callee.structure)}"


def _random(type_: Any, seed: bytes) -> torch.Tensor:
    """A tensor of this type that depends on the seed: normal numbers, or small whole ones."""
    number = int.from_bytes(hashlib.blake2b(seed, digest_size=7).digest(), "big")
    generator = torch.Generator().manual_seed(number)
    dtype = getattr(torch, type_.dtype)
    if dtype.is_floating_point:
        return torch.randn(type_.shape, generator=generator).to(dtype)
    return torch.randint(0, 2, type_.shape, generator=generator).to(dtype)


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal in type, shape and every value; NaN equals NaN."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return bool(((a == b) | ((a != a) & (b != b))).all())


def close(want: torch.Tensor, got: torch.Tensor) -> bool:
    """Equal in type and shape, and every value within rounding of the largest; NaN and infinity are never close."""
    if want.dtype != got.dtype or want.shape != got.shape:
        return False
    if not want.numel():
        return True
    allowed = max(ROUNDING, 4 * torch.finfo(want.dtype).eps) * float(want.abs().max())
    gap = float((want.double() - got.double()).abs().max())
    return math.isfinite(gap) and gap <= allowed


def difference(want: torch.Tensor, got: torch.Tensor) -> str:
    """How two tensors differ, for a message."""
    if want.dtype != got.dtype or want.shape != got.shape:
        return f"{got.dtype} {tuple(got.shape)} instead of {want.dtype} {tuple(want.shape)}"
    gap = (want.double() - got.double()).abs()
    return f"{int((gap > 0).sum())} of {gap.numel()} values differ, by up to {float(gap.max()):.3e}"


def _shown(keywords: Mapping[str, Any]) -> str:
    return ", ".join(f"{key}={str(value)[:40]!r}" for key, value in keywords.items())


__all__ = [
    "Verification", "close", "compare_component", "difference", "in_float32", "replay", "same", "shrunken"
]  # fmt: skip
