"""Counts what `hoist` leaves in the loop of full-size denoisers, by their configurations: no weight is read or drawn.

    python benchmarks/hoisting.py [--steps 28] [NAME …]

A denoiser without weights is recorded with the arguments that its pipeline gives it, and a call of so many steps is put
around it. Prints Markdown.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import diffusers
import torch
from hoisting_models import DTYPE, MODELS, Argument, Denoiser
from measuring import machine, table
from torch._subclasses.fake_tensor import FakeTensorMode

from diffkiln.compiler.packing import uses_of
from diffkiln.interpreter.aten import type_of
from diffkiln.interpreter.quiet import quiet_libraries
from diffkiln.models.meta import emptied, make_fake
from diffkiln.passes.hoisting import hoisted
from diffkiln.program import CALL, NOISE, STEP, Input, Module, Op, Program, Ref, TensorType
from diffkiln.program.operators import nbytes
from diffkiln.record.components import Callee, record_component
from diffkiln.record.constants import Constants
from diffkiln.record.pipeline import Recording
from diffkiln.record.structure import flatten

COMPONENT = "denoiser"
COLUMNS = ("model", "before", "folded", "tables", "before the loop", "in the loop", "held for a request")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=[])
    parser.add_argument("--steps", type=int, default=28)
    options = parser.parse_args()
    print("# Hoisting\n")
    print(machine() + "\n")
    print(
        "Bytes of each denoiser's weights in bfloat16, from its configuration alone, for one variant of "
        f"{options.steps} steps. *Folded* weights leave the bundle for *tables*. The next are read before the loop "
        "alone; *held for a request* is what they and the prompt give, kept while the steps run.\n"
    )
    names = options.names or list(MODELS)
    print(table(COLUMNS, [row(name, MODELS[name], options.steps) for name in names]))


def row(name: str, model: Denoiser, steps: int) -> list[str]:
    """One line of the table."""
    with quiet_libraries():
        recording = recorded(model, steps)
    sizes = {key: nbytes(type_) for key, type_ in recording.weight_types()[COMPONENT].items()}
    module = recording.modules[COMPONENT]
    found = hoisted(recording.calls, module, recording.constants)
    after = replace(recording, calls=found.calls, modules={COMPONENT: found.module}, folds=found.folds)
    uses, whole = uses_of(after)[COMPONENT], sum(sizes.values())
    folded, before = (sum(sizes[key] for key in keys) for keys in (uses.left_out, uses.before))
    keys = {(fold.program.outputs[at].name, key): fold for fold in found.folds for each in fold.evaluations
            for at, key in enumerate(each.gives)}  # fmt: skip
    tables = sum(nbytes(fold.program.types[name]) for (name, _), fold in keys.items())
    (call,) = after.calls[0].values()
    ahead = [op for op in call.ops if op.name == CALL and op.attrs["program"] in {p.name for p in found.preambles}]
    held = sum(nbytes(call.types[name]) for op in ahead for name in op.outputs)
    parts = [whole, folded, tables, before, whole - folded - before, held]
    return [name, *(_told(part, whole if 0 < at < 5 and at != 2 else 0) for at, part in enumerate(parts))]


def _told(size: int, whole: int) -> str:
    shown = f"{size / 1e9:.2f} GB" if size >= 1e7 else f"{size / 1e6:.2f} MB"
    return f"{shown}, {100 * size / whole:.1f} %" if whole else shown


def recorded(model: Denoiser, steps: int) -> Recording:
    """The denoiser's program and a call of so many steps."""
    module, constants = meta(model), Constants()
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    make_fake(module, fake)
    given = flatten(((), {key: _leaf(value) for key, value in model.arguments.items()}))
    arguments = [value for value in flatten(((), dict(model.arguments)))[0] if isinstance(value, Argument)]
    leaves, structure = given
    positions = [at for at, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor)]
    folded = {at: leaves[at] for at, value in zip(positions, arguments, strict=True) if value.kind == "constant"}
    types = [leaf.to("meta") if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
    callee = Callee(COMPONENT, "forward", module, module.forward, types, structure, ([], None), folded=folded)
    component = record_component([callee], fake, constants)
    kinds = [value.kind for value in arguments if value.kind != "constant"]
    call = called(component, kinds, steps, constants)
    return Recording([{"call": call}], {COMPONENT: component}, constants, [{}])


def meta(model: Denoiser) -> torch.nn.Module:
    """The model with parameters on the meta device, and real buffers."""
    from accelerate import init_empty_weights

    before = torch.get_default_dtype()
    try:
        with init_empty_weights(include_buffers=False):
            module = getattr(diffusers, model.kind)(**model.config)
    finally:
        torch.set_default_dtype(before)
    return emptied(module.to(DTYPE).eval().requires_grad_(False))


def _leaf(value: Any) -> Any:
    if isinstance(value, Argument):
        return value.tensor()
    if isinstance(value, Mapping):
        return {key: _leaf(item) for key, item in value.items()}
    return value


def called(component: Module, kinds: list[str], steps: int, constants: Constants) -> Program:
    """A call that gives the denoiser new latents and another timestep in each step."""
    (program,) = component.programs.values()
    types: dict[str, TensorType] = {}
    inputs: list[Input] = []
    ops: list[Op] = []
    end = ""
    for step in range(steps):
        args: list[Ref] = []
        for at, (kind, item) in enumerate(zip(kinds, program.inputs, strict=True)):
            name = f"%request.{at}" if kind == "request" else f"%{kind}.{step}.{at}"
            if kind == "schedule":
                value = torch.full(item.type.shape, 1000.0 * (steps - step) / steps).to(getattr(torch, item.type.dtype))
                assert type_of(value) == item.type
                name = f"#{constants.add(value)}"
            elif kind == "latents":
                attrs = {"shape": list(item.type.shape), "dtype": item.type.dtype}
                ops.append(Op(NOISE, (), (name,), attrs=attrs))
            elif step == 0:
                inputs.append(Input(name, item.type, {"kind": "tensor", "keyword": item.argument}))
            types[name] = item.type
            args.append(Ref(name))
        results = {f"%result.{step}.{at}": program.types[ref.name] for at, ref in enumerate(program.outputs)}
        attrs = {"component": COMPONENT, "program": program.name}
        ops.append(Op(CALL, tuple(args), tuple(results), attrs=attrs))
        first, end = next(iter(results)), f"%end.{step}"
        types |= results | {end: results[first]}
        ops.append(Op(STEP, (Ref(first),), (end,), attrs={"step": step, "timestep": 1000 - step}))
    return Program("call", tuple(inputs), tuple(ops), (Ref(end),), types)


if __name__ == "__main__":
    main()
