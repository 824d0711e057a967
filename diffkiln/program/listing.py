"""A program as text for a person: one operation a line.

%4 float32[1,64,128] = aten.linear.default(%hidden_states, @x_embedder.weight, @x_embedder.bias)
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from diffkiln.program.ir import Device, DType, Layout, MemoryFormat, Module, Op, Program, Ref
from diffkiln.program.text_rules import rules_of


def listing(program: Program) -> str:
    lines = [f"program {program.name}"]
    lines += [text_line(text) for text in program.texts]
    for item in program.inputs:
        source = " ".join(f"{key}={value}" for key, value in item.source.items())
        lines.append(f"  input {item.name} {item.type}" + (f"  from {source}" if source else ""))
    lines += [f"  {op_line(op, program)}" for op in program.ops]
    lines.append(f"  return {', '.join(ref.name for ref in program.outputs)}")
    return "\n".join(lines)


def text_line(text: Mapping[str, Any]) -> str:
    """Returns a line that says how the prompts become tokens."""
    length = f"{text['max_length']} tokens" if text["max_length"] else "any length"
    how = ", ".join([*text["transforms"], *(rule.shown for rule in rules_of(text)), length])
    return f"  text {' | '.join(map(_row, text['rows']))} → {text['tokenizer']} ({how})"


def _row(row: Mapping[str, Any]) -> str:
    """Returns a fixed text, or a prompt between its prefix and suffix; later prompts of the batch have their index."""
    if "text" in row:
        return repr(row["text"])
    which = f"[{row['index']}]" if row["index"] else ""
    return f"{row['prefix']!r} {row['keyword']}{which} {row['suffix']!r}"


def module_listing(module: Module) -> str:
    parts = [*module.programs.values(), *module.regions.values()]
    return "\n\n".join([f"component {module.component}", *map(listing, parts)])


def op_line(op: Op, program: Program) -> str:
    out = ", ".join(f"{name} {program.types[name]}" for name in op.outputs)
    words = [argument(arg) for arg in op.args]
    words += [f"{key}={argument(arg)}" for key, arg in op.kwargs.items()]
    words += [f"{key}={value}" for key, value in op.attrs.items()]
    return (f"{out} = " if out else "") + f"{op.name}({', '.join(words)})"


def argument(arg: Any) -> str:
    match arg:
        case Ref(name):
            return name if len(name) < 40 or not name.startswith("#") else name[:13]
        case DType(name) | MemoryFormat(name) | Layout(name):
            return name
        case Device():
            return "device"
        case tuple() | list():
            return f"[{', '.join(argument(item) for item in arg)}]"
    return repr(arg)
