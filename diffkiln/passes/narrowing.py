"""Call programs for fewer adapters than layers have slots, beside the full ones.

A layer with slots computes all of them, whatever is in them. For a call that uses few there is another program of the
same weights: of each layer's slots it takes the first ones alone. Without any, a slot's factors are zeros, and so is
what they are multiplied by; a sum with zeros is its other operand, and what made the zeros is left out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from diffkiln.errors import VerifyError
from diffkiln.interpreter.layers.slots import DOWN, FACTORS, UP
from diffkiln.program import CALL, REGION, Input, Module, Op, Program, Ref, TensorType, map_refs, refs, written_anew
from diffkiln.program.inference import result_types
from diffkiln.program.narrowed import full, named_for, narrowed_of
from diffkiln.program.work import work_within
from diffkiln.record.pipeline import Recording

#: Operators that give zeros where their first argument, or each of a list, is nothing but zeros.
_KEEPS_ZEROS = frozenset(
    f"aten.{name}"
    for name in (
        "_to_copy.default", "_unsafe_view.default", "alias.default", "cat.default", "chunk.default", "clone.default",
        "contiguous.default", "detach.default", "div.Tensor", "expand.default", "flatten.using_ints", "neg.default",
        "permute.default", "repeat.default", "repeat_interleave.self_int", "reshape.default", "select.int",
        "slice.Tensor", "split.Tensor", "split_with_sizes.default", "squeeze.dim", "stack.default", "t.default",
        "to.dtype", "transpose.int", "unbind.int", "unflatten.int", "unsqueeze.default", "view.default",
    )
)  # fmt: skip
#: Operators that give zeros where any of their first two arguments is nothing but zeros.
_PRODUCTS = frozenset(f"aten.{name}" for name in ("bmm.default", "matmul.default", "mm.default", "mul.Tensor"))
_LINEAR = "aten.linear.default"


@dataclass(frozen=True)
class _Value:
    """What is known of a value: its type, None for a number; and whether it is nothing but zeros."""

    type: TensorType | None
    zeros: bool = False


_Given = tuple[_Value, ...]
#: Returns the operation that calls the narrower callee, and what it gives.
_Called = Callable[[Op, _Given], tuple[Op, _Given]]


def narrowed(recording: Recording, component: str, count: int, worth: float) -> Recording:
    """Returns the recording with a call program for `count` adapters beside each of its call programs.

    Args:
        recording: as all passes left it.
        component: whose layers have slots. Where another component's were narrowed before, both become narrower.
        count: of the slots that are computed; 0 for none.
        worth: the recording stays as it is unless the component's products become fewer by this factor.

    Raises:
        ValueError: some operation needs all slots; says which.
    """
    try:
        found = _narrowed(recording, component, count)
    except VerifyError as error:
        raise ValueError(f"its programs cannot leave slots out: {error}") from error
    gains = [
        _products(recording, program, component) / max(_products(found, few, component), 1)
        for calls in found.calls
        for name, program in full(calls).items()
        if (few := narrowed_of(calls, name).get(count))
    ]
    return found if gains and max(gains) >= worth else recording


def _products(recording: Recording, call: Program, component: str) -> int:
    return sum(work_within(call, recording.modules, component).flops.values())


def _narrowed(recording: Recording, component: str, count: int) -> Recording:
    inside = _Component(recording.modules[component], count)

    def called(op: Op, given: _Given) -> tuple[Op, _Given]:
        if op.attrs["component"] != component:
            _require_plain(op, given)
            return op, ()
        name, found = inside.program(op.attrs["program"], given)
        return replace(op, attrs={**op.attrs, "program": name}), found

    calls = []
    for programs in recording.calls:
        more = {}
        for name, program in full(programs).items():
            named = named_for(name, count)
            before = narrowed_of(programs, name).get(count, program)
            given = tuple(_Value(_type_of(item)) for item in before.inputs)
            few, _ = _rewritten(before, given, {}, count, called)
            if few != before:
                more[named] = replace(few, name=named, slots=count, instead_of=name)
        calls.append({**programs, **more})
    return replace(recording, calls=calls, modules={**recording.modules, component: inside.module})


class _Component:
    """A component's programs and regions for fewer slots, each for what it is given."""

    def __init__(self, module: Module, count: int) -> None:
        self._before, self._count = module, count
        self._slots = _slots_of(module)
        self._known: dict[tuple[str, str, _Given], tuple[str, _Given]] = {}
        self._programs, self._regions = dict(module.programs), dict(module.regions)

    @property
    def module(self) -> Module:
        return replace(self._before, programs=self._programs, regions=self._regions)

    def program(self, name: str, given: _Given) -> tuple[str, _Given]:
        """Returns the name of a program that is given this, and what it gives."""
        found = self._of("program", name, given, self._programs)
        if found[0] != name:
            self._programs[found[0]] = replace(self._programs[found[0]], slots=self._count, instead_of=name)
        return found

    def _region(self, op: Op, given: _Given) -> tuple[Op, _Given]:
        name, found = self._of("region", op.attrs["region"], given, self._regions)
        return replace(op, attrs={**op.attrs, "region": name}), found

    def _of(self, kind: str, name: str, given: _Given, listed: dict[str, Program]) -> tuple[str, _Given]:
        key = kind, name, given
        if key not in self._known:
            before = listed[name]
            program, found = _rewritten(before, given, self._slots, self._count, self._region)
            if program != before:
                name = named_for(name, self._count, listed)
                listed[name] = replace(program, name=name)
            self._known[key] = name, found
        return self._known[key]


def _slots_of(module: Module) -> dict[str, TensorType]:
    """Returns the types of the first matrices of slots, by the names of weights in programs and in regions."""
    every = (*module.programs.values(), *module.regions.values())
    return {
        name.removesuffix(f".{DOWN}"): program.types[f"@{name}"]
        for program in every
        for name in program.weights
        if name.endswith(f".{DOWN}")
    }


def _type_of(item: Input) -> TensorType | None:
    return None if item.source.get("kind") == "scalar" else item.type


def _require_plain(op: Op, given: _Given) -> None:
    if any(value.zeros for value in given):
        raise ValueError(f"{op.attrs['component']} is given what its slots compute")


def _rewritten(
    program: Program, given: _Given, slots: Mapping[str, TensorType], count: int, called: _Called
) -> tuple[Program, _Given]:
    """Returns a program with fewer slots, and what it gives.

    Args:
        program: with all slots.
        given: what is known of its inputs.
        slots: types of the first matrices, by layer.
        count: of the slots that are left.
        called: rewrites a call of another program.
    """
    types = {name: type_ for name, type_ in program.types.items() if not name.startswith("%")}
    values: dict[str, _Value] = {name: _Value(type_) for name, type_ in types.items()}
    instead: dict[Ref, Ref] = {}
    ops: list[Op] = []

    def put(op: Op, found: Sequence[_Value]) -> None:
        ops.append(op)
        values.update(zip(op.outputs, found, strict=True))

    for item, value in zip(program.inputs, given, strict=True):
        values[item.name] = value
    for weight in program.weights if count == 0 else ():
        if weight.endswith(f".{FACTORS}"):
            values[f"@{weight}"] = _Value(types[f"@{weight}"], zeros=True)

    def narrow(ref: Ref) -> None:
        layer, _, leaf = ref.bare.rpartition(".")
        if ref in instead or not ref.name.startswith("@") or leaf not in (DOWN, UP, FACTORS):
            return
        if 0 < count < slots[layer].shape[1]:
            for op in _first_slots(ref, leaf, slots[layer], count):
                put(op, [_Value(type_) for type_ in result_types(op, _types_of(op, values))])
            instead[ref] = ops[-1].results[0]

    def current(arg: Any) -> Any:
        return map_refs(arg, lambda ref: instead.get(ref, ref))

    for before in program.ops:
        for ref in before.uses:
            narrow(ref)
        op = replace(before, args=current(before.args), kwargs=current(before.kwargs))
        known = tuple(values[ref.name] for ref in op.uses)
        if op.name in (REGION, CALL):
            op, found = called(op, known)
            put(op, found or [_Value(program.types[name]) for name in op.outputs])
            continue
        if (other := _other_of_sum(op, values, program)) is not None:
            instead[op.results[0]] = other
            continue
        put(op, _results(op, program, values))
    outputs = current(program.outputs)
    if tuple(ops) == program.ops:
        return program, tuple(values[ref.name] for ref in outputs)
    every = types | {name: value.type for name, value in values.items() if value.type is not None}
    every |= {item.name: item.type for item in program.inputs if item.name not in every}
    return written_anew(program, ops, every, outputs), tuple(values[ref.name] for ref in outputs)


def _first_slots(tensor: Ref, leaf: str, down: TensorType, count: int) -> list[Op]:
    """Returns what takes the first slots of a layer's tensor: the matrices, or the factors of rows."""
    parts, slots, rank, _ = down.shape
    name = f"%{tensor.bare}"
    if leaf != FACTORS:
        return [Op("aten.slice.Tensor", (tensor, 1, 0, count), (name,))]
    split = Op("aten.unflatten.int", (tensor, 1, (parts, slots, rank)), (f"{name}.split",))
    first = Op("aten.slice.Tensor", (*split.results, 2, 0, count), (f"{name}.first",))
    return [split, first, Op("aten.flatten.using_ints", (*first.results, 1, 3), (name,))]


def _other_of_sum(op: Op, values: Mapping[str, _Value], program: Program) -> Ref | None:
    """Returns what a sum is equal to if it adds nothing but zeros; None for anything else."""
    if (
        op.name != "aten.add.Tensor"
        or len(op.args) != 2
        or op.kwargs
        or not all(isinstance(arg, Ref) for arg in op.args)
    ):
        return None
    first, second = op.args
    for zeros, other in ((second, first), (first, second)):
        if values[zeros.name].zeros and values[other.name].type == program.types[op.outputs[0]]:  # type: ignore[union-attr]
            return other  # type: ignore[return-value]
    return None


def _results(op: Op, program: Program, values: Mapping[str, _Value]) -> list[_Value]:
    zeros = _gives_zeros(op, values)
    declared = {ref.name: program.types.get(ref.name) for ref in op.uses}
    if all(values[name].type in (None, type_) for name, type_ in declared.items()):
        return [_Value(program.types[name], zeros) for name in op.outputs]
    types = _types_of(op, values) | {name: program.types[name] for name in op.outputs}
    return [_Value(type_, zeros) for type_ in result_types(op, types)]


def _types_of(op: Op, values: Mapping[str, _Value]) -> dict[str, TensorType | None]:
    return {ref.name: values[ref.name].type for ref in op.uses}


def _gives_zeros(op: Op, values: Mapping[str, _Value]) -> bool:
    def are_zeros(arg: Any) -> bool:
        found = list(refs(arg))
        return bool(found) and all(values[ref.name].zeros for ref in found)

    if op.name in _KEEPS_ZEROS:
        return are_zeros(op.args[0])
    if op.name in _PRODUCTS or (op.name == _LINEAR and len(op.args) == 2):
        return any(map(are_zeros, op.args[:2]))
    return False
