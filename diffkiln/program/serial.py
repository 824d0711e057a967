"""Programs to and from JSON that a person can read.

Values are strings with their sigil ("%3", "@proj.weight", "#1f0c…"); other literals that JSON has no word for are
one-key objects: {"dtype": "float32"}, {"device": "any"}, {"memory_format": …}, {"layout": …}, {"str": …} and
{"float": "inf"}.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping
from typing import Any, TypeVar

from diffkiln.errors import ManifestInvalid
from diffkiln.program.batches import batch_of
from diffkiln.program.ir import (
    Arg,
    Device,
    DType,
    Input,
    Layout,
    MemoryFormat,
    Module,
    Op,
    Program,
    Ref,
    TensorType,
)
from diffkiln.program.operators import safe_equal

_T = TypeVar("_T")
_SIGILS = ("%", "@", "#")
_TYPE = re.compile(r"([A-Za-z_]\w*)\[((?:\d{1,18}(?:,\d{1,18})*)?)\]", re.ASCII)

#: Deeper than any program nests; a guard against hostile files.
MAX_DEPTH = 64


def type_from_json(text: Any) -> TensorType:
    found = _TYPE.fullmatch(text) if isinstance(text, str) else None
    if found is None:
        raise ManifestInvalid(f"{text!r} is not a tensor type such as float32[1,64]")
    dtype, sizes = found.groups()
    return TensorType(dtype, tuple(int(size) for size in sizes.split(",") if size))


def arg_to_json(arg: Any) -> Any:
    match arg:
        case Ref(name):
            return name
        case DType(name):
            return {"dtype": name}
        case Device():
            return {"device": "any"}
        case MemoryFormat(name):
            return {"memory_format": name}
        case Layout(name):
            return {"layout": name}
        case str():
            return {"str": arg}
        case float() if not math.isfinite(arg):
            return {"float": repr(arg)}
        case tuple() | list():
            return [arg_to_json(item) for item in arg]
        case Mapping():
            return {"dict": {key: arg_to_json(item) for key, item in arg.items()}}
    return arg


def arg_from_json(data: Any) -> Arg:
    if isinstance(data, str):
        if not data.startswith(_SIGILS):
            raise ManifestInvalid(f"{data!r} is not a value: it has no sigil")
        return Ref(data)
    if isinstance(data, list):
        return tuple(arg_from_json(item) for item in data)
    if not isinstance(data, dict):
        return data
    if len(data) != 1:
        raise ManifestInvalid(f"{data!r} is not an argument of an operation: it must have one key")
    match data:
        case {"dtype": str(name)}:
            return DType(name)
        case {"device": "any"}:
            return Device()
        case {"memory_format": str(name)}:
            return MemoryFormat(name)
        case {"layout": str(name)}:
            return Layout(name)
        case {"str": str(text)}:
            return text
        case {"float": "inf" | "-inf" | "nan" as text}:
            return float(text)
        case {"dict": dict(items)}:
            return {key: arg_from_json(item) for key, item in items.items()}  # type: ignore[return-value]
    raise ManifestInvalid(f"{data!r} is not an argument of an operation")


def op_to_json(op: Op, types: Mapping[str, TensorType]) -> dict[str, Any]:
    row: dict[str, Any] = {"op": op.name, "args": arg_to_json(op.args)}
    if op.kwargs:
        row["kwargs"] = {key: arg_to_json(arg) for key, arg in op.kwargs.items()}
    if op.attrs:
        row["attrs"] = dict(op.attrs)
    row["out"] = [f"{name} {types[name]}" for name in op.outputs]
    return row


def _op_from_json(row: Mapping[str, Any], types: dict[str, TensorType]) -> Op:
    outputs = []
    for text in _is(list, row["out"]):
        name, _, type_ = text.partition(" ")
        types[name] = type_from_json(type_)
        outputs.append(name)
    args = arg_from_json(row["args"])
    if not isinstance(args, tuple):
        raise ManifestInvalid("the arguments of an operation must be a list")
    kwargs = {key: arg_from_json(arg) for key, arg in row.get("kwargs", {}).items()}
    return safe_equal(Op(_is(str, row["op"]), args, tuple(outputs), kwargs, _is(dict, row.get("attrs", {}))))


def _is(kind: type[_T], value: Any) -> _T:
    if not isinstance(value, kind):
        raise TypeError(f"{str(value)[:40]!r} is no {kind.__name__}")
    return value


def _named(name: str, sigil: str) -> str:
    if not name.startswith(sigil):
        raise ManifestInvalid(f"{name!r} does not start with {sigil!r}")
    return name


def _text_from_json(text: Any) -> dict[str, Any]:
    """Reads a text template, checked as far as the listing and the runtime read it without checks."""
    for row in _is(list, text["rows"]):
        if "text" in row:
            _is(str, row["text"])
            continue
        for key in ("keyword", "prefix", "suffix"):
            _is(str, row[key])
        if _is(int, row["index"]) < 0:
            raise ManifestInvalid(f"{row!r}: an index below zero")
    _is(str, text["tokenizer"])
    for name in (*_is(list, text["transforms"]), *_is(list, text.get("marks", []))):
        _is(str, name)
    _is(int | None, text["max_length"])  # type: ignore[arg-type]
    return _is(dict, text)


def _deeper_than(data: Any, limit: int) -> bool:
    level = [data]
    for _ in range(limit):
        nests = [item for item in level if isinstance(item, dict | list)]
        level = [child for item in nests for child in (item.values() if isinstance(item, dict) else item)]
        if not level:
            return False
    return True


def program_to_json(program: Program) -> dict[str, Any]:
    results = {name for op in program.ops for name in op.outputs} | {i.name for i in program.inputs}
    data: dict[str, Any] = {
        "name": program.name,
        "inputs": [
            {"name": i.name, "type": str(i.type)} | ({"source": dict(i.source)} if i.source else {})
            for i in program.inputs
        ],
        "weights": {n: str(t) for n, t in sorted(program.types.items()) if n.startswith("@") and n not in results},
        "constants": {n: str(t) for n, t in sorted(program.types.items()) if n.startswith("#") and n not in results},
        "ops": [op_to_json(op, program.types) for op in program.ops],
        "outputs": [ref.name for ref in program.outputs],
    }
    if program.texts:
        data["texts"] = [dict(text) for text in program.texts]
    if program.ahead:
        data["ahead"] = True
    if program.slots is not None:
        data |= {"slots": program.slots, "instead_of": program.instead_of}
    if program.signature:
        data["signature"] = {key: arg_to_json(value) for key, value in program.signature.items()}
    return data


def program_from_json(data: Any) -> Program:
    """Reads one program. Raises `ManifestInvalid` for malformed data; `verify` checks what the program says."""
    if _deeper_than(data, MAX_DEPTH):
        raise ManifestInvalid(f"not a program: it nests deeper than {MAX_DEPTH}")
    try:
        types: dict[str, TensorType] = {}
        inputs = tuple(
            Input(_is(str, i["name"]), type_from_json(i["type"]), _is(dict, i.get("source", {})))
            for i in data["inputs"]
        )
        types.update({i.name: i.type for i in inputs})
        for sigil, table in (("@", data["weights"]), ("#", data["constants"])):
            types.update({_named(name, sigil): type_from_json(text) for name, text in table.items()})
        ops = tuple(_op_from_json(row, types) for row in data["ops"])
        outputs = tuple(Ref(_is(str, name)) for name in _is(list, data["outputs"]))
        texts = tuple(_text_from_json(text) for text in data.get("texts", ()))
        signature = {key: arg_from_json(value) for key, value in data.get("signature", {}).items()}
        name = _is(str, data["name"])
        ahead = _is(bool, data.get("ahead", False))
        slots, full = _is(int | None, data.get("slots")), _is(str, data.get("instead_of", ""))  # type: ignore[arg-type]
        batch = batch_of(name)
        return Program(name, inputs, ops, outputs, types, texts, signature, batch, ahead, slots, full)
    except (KeyError, TypeError, AttributeError, ValueError, RecursionError) as error:
        raise ManifestInvalid(f"not a program: {type(error).__name__} {error}") from error


def module_to_json(module: Module) -> dict[str, Any]:
    return {
        "component": module.component,
        "programs": {name: program_to_json(program) for name, program in sorted(module.programs.items())},
        "regions": {name: program_to_json(program) for name, program in sorted(module.regions.items())},
    }


def module_from_json(data: Any) -> Module:
    try:
        return Module(
            _is(str, data["component"]),
            {name: program_from_json(item) for name, item in data["programs"].items()},
            {name: program_from_json(item) for name, item in data["regions"].items()},
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise ManifestInvalid(f"not a component's programs: {type(error).__name__} {error}") from error


def dumps(data: Any) -> bytes:
    """Returns deterministic JSON, one operation a line, so that a diff of two programs reads well."""
    return (_layout(data, 0) + "\n").encode()


def _layout(data: Any, depth: int) -> str:
    flat = json.dumps(data, sort_keys=True, ensure_ascii=False, allow_nan=False)
    if depth >= 5 or len(flat) <= 100 or (isinstance(data, dict) and "op" in data) or not isinstance(data, dict | list):
        return flat
    pad, inner = "  " * depth, "  " * (depth + 1)
    if isinstance(data, dict):
        rows = [f"{inner}{json.dumps(key)}: {_layout(data[key], depth + 1)}" for key in sorted(data)]
        return "{\n" + ",\n".join(rows) + f"\n{pad}}}"
    return "[\n" + ",\n".join(inner + _layout(item, depth + 1) for item in data) + f"\n{pad}]"


def fingerprint(program: Program) -> str:
    """Returns the SHA-256 of what the program computes. Its name does not count, so equal programs have equal
    fingerprints.
    """
    data = program_to_json(program)
    del data["name"]
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()
