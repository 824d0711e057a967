"""Recorded programs, and what they give on tensors drawn from a seed, without engines and without weights."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from diffkiln.compiler.compile import check
from diffkiln.interpreter.aten import Interpreter
from diffkiln.interpreter.quiet import quiet_libraries
from diffkiln.program import CALL, NOISE, REGION, STEP, Module, Op, Program, TensorType, weight_in
from diffkiln.record.constants import Constants
from diffkiln.record.pipeline import Recording, record
from diffkiln.runtime.self_test import sample


def recorded(spec: Mapping[str, Any]) -> Recording:
    """The recording that a spec's passes would rewrite."""
    checked = check(spec)
    with quiet_libraries():
        return record(checked.pipe, checked.requests, Constants())


def drawn(type_: TensorType, *seed: object) -> torch.Tensor:
    digest = hashlib.blake2b(repr(seed).encode(), digest_size=7).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest))
    return sample(type_, lambda count: torch.randn(count, generator=generator))


def component_gives(module: Module, program: str, recording: Recording) -> list[torch.Tensor]:
    """What a component's program gives: the same for programs of the same inputs and weights."""
    own = module.programs[program]
    called = [(own, lambda name: name)]
    called += [
        (module.regions[op.attrs["region"]], lambda name, op=op: weight_in(op, name))
        for op in own.ops
        if op.name == REGION
    ]
    weights = {
        named(name): drawn(part.types[f"@{name}"], named(name)) for part, named in called for name in part.weights
    }
    inputs = [drawn(item.type, item.name) for item in own.inputs]
    return Interpreter(own, special={REGION: _regions(module, weights, recording)})(
        inputs, weights, recording.constants.tensors
    )


def call_gives(recording: Recording, call: Program, scale: float = 3.0) -> list[torch.Tensor]:
    """What a call gives with components that give tensors which depend on their arguments."""

    def component(op: Op) -> Any:
        module = recording.modules[op.attrs["component"]]
        program = module.programs[op.attrs["program"]]
        if op.attrs["component"] == "scheduler":
            special = {REGION: _regions(module, {}, recording)}
            return lambda *args: Interpreter(program, special=special)(args, {}, {})
        types = [program.types[ref.name] for ref in program.outputs]

        def stand_in(*args: torch.Tensor) -> list[torch.Tensor]:
            seed = [arg.double().sum().item() for arg in args]
            return [drawn(type_, program.name, index, seed) for index, type_ in enumerate(types)]

        return stand_in

    def noise(op: Op) -> Any:
        type_ = TensorType(op.attrs["dtype"], tuple(op.attrs["shape"]))
        return lambda: [drawn(type_, op.outputs)]

    inputs = [scale if item.source.get("kind") == "scalar" else drawn(item.type, item.name) for item in call.inputs]
    weights = {name: drawn(call.types[f"@{name}"], name) for name in call.weights}
    special = {CALL: component, NOISE: noise, STEP: lambda op: lambda latents: [latents]}
    return Interpreter(call, special=special)(inputs, weights, recording.constants.tensors)


def _regions(module: Module, weights: Mapping[str, torch.Tensor], recording: Recording) -> Any:
    def region(op: Op) -> Any:
        run, prefix = Interpreter(module.regions[op.attrs["region"]]), weight_in(op, "")
        return lambda *args: run(args, weights, recording.constants.tensors, prefix)

    return region


def same(found: Sequence[torch.Tensor], wanted: Sequence[torch.Tensor]) -> bool:
    """Bit for bit."""
    return len(found) == len(wanted) and all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
