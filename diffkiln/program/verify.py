"""The rules of the IR, as code. `verify` runs after the recorder, after every pass, and when a bundle is read."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from diffkiln.errors import VerifyError
from diffkiln.program.attention import NATIVE, PACKAGED, SDPA
from diffkiln.program.images import is_edits, is_scaled, is_size, size_after
from diffkiln.program.ir import (
    ALL_GATHER,
    ALL_TO_ALL,
    ATTENTION,
    CALL,
    DISTRIBUTIONS,
    FROM_FIRST,
    FROM_ONE,
    NOISE,
    NORMAL,
    OWN,
    REGION,
    SHARD,
    SHARED,
    STEP,
    Input,
    Module,
    Op,
    Program,
    Ref,
    refs,
)
from diffkiln.program.mesh import AXES, MAX_COUNT
from diffkiln.program.operators import allowed

#: More operations than any pipeline needs; a guard against hostile files.
MAX_OPS = 1_000_000


def _text(value: Any) -> bool:
    return isinstance(value, str)


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _index(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _shape(value: Any) -> bool:
    return isinstance(value, list | tuple) and all(map(_index, value))


def _indices(value: Any) -> bool:
    return _shape(value) and len(value) > 0


def _size(value: Any) -> bool:
    return value is None or is_size(value)


def _scaled(value: Any) -> bool:
    return value is None or is_scaled(value)


def _flag(value: Any) -> bool:
    return isinstance(value, bool)


def _scale(value: Any) -> bool:
    return value is None or _number(value)


def _packaged(value: Any) -> bool:
    return _text(value) and value in PACKAGED


def _axis(value: Any) -> bool:
    return _text(value) and value in AXES


def _count(value: Any) -> bool:
    return _index(value) and 1 < value <= MAX_COUNT


def _processes(value: Any) -> bool:
    return _index(value) and 1 < value <= MAX_COUNT**2


_MESH: dict[str, Callable[[Any], bool]] = {"axis": _axis, "count": _count}
_ATTRS: dict[str, dict[str, Callable[[Any], bool]]] = {
    CALL: {"component": _text, "program": _text},
    REGION: {"region": _text, "instance": _text},
    NOISE: {"shape": _shape, "dtype": _text},
    STEP: {"step": _index, "timestep": _number},
    ATTENTION: {"kernel": _packaged, "causal": _flag, "scale": _scale},
    OWN: _MESH,
    SHARD: {**_MESH, "dim": _index},
    ALL_GATHER: _MESH,
    ALL_TO_ALL: {**_MESH, "split": _index, "join": _index},
    FROM_FIRST: {"count": _processes},
    FROM_ONE: {**_MESH, "index": _index},
}
_SOURCES: dict[str, dict[str, Callable[[Any], bool]]] = {
    "tokens": {"text": _index, "key": _text},
    "scalar": {"keyword": _text, "default": _number},
    "tensor": {"keyword": _text},
    "image": {
        "keyword": _text,
        "index": _indices,
        "edits": is_edits,
        "size": _size,
        "normalize": _flag,
        "binarize": _flag,
        "scaled": _scaled,
    },
}
#: How many values these take and give.
_COUNTS = {NOISE: (0, 1), STEP: (1, 1), ATTENTION: (3, 1)}


def verify(
    program: Program,
    *,
    modules: Mapping[str, Module] | None = None,
    regions: Mapping[str, Program] | None = None,
    alone: bool = False,
) -> None:
    """Checks that `program` is well formed.

    Args:
        program: any of the three levels.
        modules: the components that CALL operations may name; None when the program is not a call.
        regions: the regions that REGION operations may name; None when the program is not a component.
        alone: while it is being made, and what it calls may not be there yet, do not look at that.

    Raises:
        VerifyError: names the program, the operation and the rule that it breaks.
    """
    if len(program.ops) > MAX_OPS:
        raise VerifyError(f"program {program.name!r} has {len(program.ops)} operations; the limit is {MAX_OPS}")
    defined = {item.name for item in program.inputs}
    if len(defined) != len(program.inputs):
        raise VerifyError(f"program {program.name!r}: two inputs have one name")
    for item in program.inputs:
        _verify_input(item, program)
    for index, op in enumerate(program.ops):
        where = f"program {program.name!r}, operation {index} ({op.name})"
        _verify_kind(op, where)
        if not alone:
            _verify_callee(op, where, modules, regions)
        if _holds_mapping((op.args, *op.kwargs.values())):
            raise VerifyError(f"{where}: a dictionary is not an argument of an operation")
        for ref in op.uses:
            _verify_use(ref.name, program, defined, where)
        for name in op.outputs:
            if not name.startswith("%") or name in defined or name not in program.types:
                raise VerifyError(f"{where}: result {name!r} is defined twice, has no type, or is not a value name")
            defined.add(name)
    for ref in program.outputs:
        _verify_use(ref.name, program, defined, f"program {program.name!r}, its outputs")


def verify_module(module: Module) -> None:
    """Verifies every program and region of a component."""
    for region in module.regions.values():
        verify(region)
    for program in module.programs.values():
        verify(program, regions=module.regions)


def _verify_input(item: Input, program: Program) -> None:
    where = f"program {program.name!r}, input {item.name!r}"
    if not item.name.startswith("%"):
        raise VerifyError(f"{where}: not a value name")
    if program.types.get(item.name) != item.type:
        raise VerifyError(f"{where}: it is {item.type}, the table of types says {program.types.get(item.name)}")
    if not item.source:
        return
    kind = item.source.get("kind")
    if not isinstance(kind, str) or kind not in _SOURCES:
        raise VerifyError(f"{where}: there is no kind of source {kind!r}")
    if wrong := _wrong(item.source, _SOURCES[kind]):
        raise VerifyError(f"{where}: its source lacks a proper {wrong}")
    if kind == "image":
        _verify_image(item, where)
    if kind == "tensor" and not _index(item.source.get("index", 0)):
        raise VerifyError(f"{where}: its place in a list is none")
    if kind == "tokens" and item.source["text"] >= len(program.texts):
        raise VerifyError(f"{where}: there is no text {item.source['text']}")


def _verify_image(item: Input, where: str) -> None:
    source, type_ = item.source, item.type
    if type_.dtype != "float32" or len(type_.shape) != 4 or type_.shape[0] != len(source["index"]):
        raise VerifyError(f"{where}: {type_} is not a tensor of {len(source['index'])} images")
    left = size_after(source["edits"], source["size"])
    if left is not None and left != (type_.shape[3], type_.shape[2]):
        raise VerifyError(f"{where}: its images end at {left[0]} x {left[1]} pixels (width x height), not {type_}")
    if "mean" in (source["scaled"] or ()) and type_.shape[1] != len(source["scaled"]["mean"]):
        raise VerifyError(f"{where}: {type_} lacks the channels that are scaled")


def _wrong(given: Mapping[str, Any], rules: Mapping[str, Callable[[Any], bool]]) -> list[str]:
    return sorted(key for key, holds in rules.items() if key not in given or not holds(given[key]))


def _holds_mapping(arg: Any) -> bool:
    return isinstance(arg, Mapping) or (isinstance(arg, list | tuple) and any(map(_holds_mapping, arg)))


def _verify_use(name: str, program: Program, defined: set[str], where: str) -> None:
    if name not in program.types:
        raise VerifyError(f"{where}: {name!r} has no type")
    if not name.startswith(("%", "@", "#")):
        raise VerifyError(f"{where}: {name!r} is not a value name")
    if name.startswith("%") and name not in defined:
        raise VerifyError(f"{where}: {name!r} is used before it is defined")


def _verify_kind(op: Op, where: str) -> None:
    if op.is_aten:
        if not allowed(op.name):
            raise VerifyError(f"{where}: this operator is not in the closed list of diffkiln.program.operators")
        _verify_kernel(op, where)
        return
    if op.name not in _ATTRS:
        raise VerifyError(f"{where}: there is no such operation")
    if wrong := _wrong(op.attrs, _ATTRS[op.name]):
        raise VerifyError(f"{where}: it lacks a proper {wrong}")
    if op.name == NOISE and op.attrs.get("distribution", NORMAL) not in DISTRIBUTIONS:
        raise VerifyError(f"{where}: it draws from no distribution that is known")
    if op.name in _COUNTS:
        _verify_counts(op, *_COUNTS[op.name], where, op.name)
    elif op.name == FROM_ONE:
        if op.attrs["index"] >= op.attrs["count"]:
            raise VerifyError(f"{where}: there is no process {op.attrs['index']} of {op.attrs['count']}")
        many = max(len(op.args), 1)
        _verify_counts(op, many, many, where, op.name)
    elif op.name in SHARED:
        count = op.attrs["count"]
        _verify_counts(op, count if op.name == OWN else 1, count if op.name == ALL_GATHER else 1, where, op.name)


def _verify_callee(
    op: Op, where: str, modules: Mapping[str, Module] | None, regions: Mapping[str, Program] | None
) -> None:
    """Checks what an operation that calls asks of its callee, and a program's level of its operations."""
    if op.name == CALL:
        callee = (modules or {}).get(op.attrs["component"])
        program = callee.programs.get(op.attrs["program"]) if callee else None
        _verify_call(op, program, where, f"component program {op.attrs['component']}/{op.attrs['program']}")
    elif op.name == REGION:
        _verify_call(op, (regions or {}).get(op.attrs["region"]), where, f"region {op.attrs['region']}")
    elif modules is None and op.name in (NOISE, STEP):
        raise VerifyError(f"{where}: only the call of a pipeline may hold this operation")
    elif modules is None and regions is None and op.name in SHARED:
        raise VerifyError(f"{where}: a region is one process's own, and holds nothing that several share")


def _verify_kernel(op: Op, where: str) -> None:
    """Checks that an operator has no attributes; only attention may have one, which names its kernel."""
    if not op.attrs:
        return
    if op.name != SDPA or op.attrs.keys() != {"kernel"}:
        raise VerifyError(f"{where}: an operator has no attributes, this one has {', '.join(map(repr, op.attrs))}")
    if op.attrs["kernel"] not in NATIVE:
        raise VerifyError(f"{where}: torch has no attention kernel {op.attrs['kernel']!r}, only {', '.join(NATIVE)}")


def _verify_call(op: Op, callee: Program | None, where: str, what: str) -> None:
    if callee is None:
        raise VerifyError(f"{where}: there is no {what}")
    _verify_counts(op, len(callee.inputs), len(callee.outputs), where, what)


def _verify_counts(op: Op, takes: int, gives: int, where: str, what: str) -> None:
    if len(op.args) != takes or len(op.outputs) != gives:
        raise VerifyError(
            f"{where}: {what} takes {takes} values and gives {gives}, here {len(op.args)} and {len(op.outputs)}"
        )
    if op.kwargs or not all(isinstance(arg, Ref) for arg in op.args):
        raise VerifyError(f"{where}: {what} takes values in order, no literals and no keywords")


def verify_types(program: Program, regions: Mapping[str, Program]) -> None:
    """Checks that what each REGION operation passes and gets has the types of its region.

    `program` is verified.

    Raises:
        VerifyError: names the operation and the type that differs.
    """
    _verify_callees(program, lambda op: regions[op.attrs["region"]] if op.name == REGION else None)


def verify_call_types(program: Program, modules: Mapping[str, Module]) -> None:
    """Checks that what each CALL operation passes and gets has the types of the component's program.

    `program` is verified.

    Raises:
        VerifyError: names the operation and the type that differs.
    """
    _verify_callees(
        program, lambda op: modules[op.attrs["component"]].programs[op.attrs["program"]] if op.name == CALL else None
    )


def _verify_callees(program: Program, callee: Callable[[Op], Program | None]) -> None:
    for index, op in enumerate(program.ops):
        target = callee(op)
        if target is None:
            continue
        where = f"program {program.name!r}, operation {index} ({op.name})"
        for ref, item in zip(refs(op.args), target.inputs, strict=True):
            if program.types[ref.name] != item.type:
                found = program.types[ref.name]
                raise VerifyError(f"{where}: {ref.name} is {found}, {item.name} of {target.name!r} takes {item.type}")
        for name, ref in zip(op.outputs, target.outputs, strict=True):
            if program.types[name] != target.types[ref.name]:
                raise VerifyError(
                    f"{where}: {name} is {program.types[name]}, {target.name!r} gives {target.types[ref.name]}"
                )
