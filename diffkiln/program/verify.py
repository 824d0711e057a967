"""The rules of the IR, as code. `verify` runs after the recorder, after every pass, and when a bundle is read."""

from __future__ import annotations

from collections.abc import Mapping

from diffkiln.errors import VerifyError
from diffkiln.program.ir import CALL, NOISE, REGION, STEP, Module, Op, Program, refs
from diffkiln.program.operators import allowed

#: More operations than any pipeline needs; a guard against hostile files.
MAX_OPS = 1_000_000

_ATTRS = {
    CALL: {"component", "program"},
    REGION: {"region", "instance"},
    NOISE: {"shape", "dtype"},
    STEP: {"step", "timestep"},
}


def verify(
    program: Program,
    *,
    modules: Mapping[str, Module] | None = None,
    regions: Mapping[str, Program] | None = None,
) -> None:
    """Check that `program` is well formed.

    Args:
        program: any of the three levels.
        modules: the components that CALL operations may name; None when the program is not a call.
        regions: the regions that REGION operations may name; None when the program is not a component.

    Raises:
        VerifyError: names the program, the operation and the rule that it breaks.
    """
    if len(program.ops) > MAX_OPS:
        raise VerifyError(f"program {program.name!r} has {len(program.ops)} operations; the limit is {MAX_OPS}")
    defined = {item.name for item in program.inputs}
    if len(defined) != len(program.inputs):
        raise VerifyError(f"program {program.name!r}: two inputs have one name")
    for index, op in enumerate(program.ops):
        where = f"program {program.name!r}, operation {index} ({op.name})"
        _verify_kind(op, where, modules, regions)
        for ref in refs((op.args, op.kwargs)):
            _verify_use(ref.name, program, defined, where)
        for name in op.outputs:
            if not name.startswith("%") or name in defined or name not in program.types:
                raise VerifyError(f"{where}: result {name!r} is defined twice, has no type, or is not a value name")
            defined.add(name)
    for ref in program.outputs:
        _verify_use(ref.name, program, defined, f"program {program.name!r}, its outputs")


def verify_module(module: Module) -> None:
    """`verify` for every program and region of a component."""
    for region in module.regions.values():
        verify(region)
    for program in module.programs.values():
        verify(program, regions=module.regions)


def _verify_use(name: str, program: Program, defined: set[str], where: str) -> None:
    if name not in program.types:
        raise VerifyError(f"{where}: {name!r} has no type")
    if name.startswith("%") and name not in defined:
        raise VerifyError(f"{where}: {name!r} is used before it is defined")


def _verify_kind(
    op: Op, where: str, modules: Mapping[str, Module] | None, regions: Mapping[str, Program] | None
) -> None:
    if op.is_aten:
        if not allowed(op.name):
            raise VerifyError(f"{where}: this operator is not in the closed list of diffkiln.program.operators")
        return
    if op.name not in _ATTRS:
        raise VerifyError(f"{where}: there is no such operation")
    if not _ATTRS[op.name] <= set(op.attrs):
        raise VerifyError(f"{where}: it lacks {sorted(_ATTRS[op.name] - set(op.attrs))}")
    if op.name == CALL:
        callee = (modules or {}).get(op.attrs["component"])
        program = callee.programs.get(op.attrs["program"]) if callee else None
        _verify_call(op, program, where, f"component program {op.attrs['component']}/{op.attrs['program']}")
    elif op.name == REGION:
        _verify_call(op, (regions or {}).get(op.attrs["region"]), where, f"region {op.attrs['region']}")
    elif op.name in (NOISE, STEP) and modules is None:
        raise VerifyError(f"{where}: only the call of a pipeline may hold this operation")


def _verify_call(op: Op, callee: Program | None, where: str, what: str) -> None:
    if callee is None:
        raise VerifyError(f"{where}: there is no {what}")
    if len(op.args) != len(callee.inputs) or len(op.outputs) != len(callee.outputs):
        raise VerifyError(
            f"{where}: {what} takes {len(callee.inputs)} values and gives {len(callee.outputs)}, "
            f"here {len(op.args)} and {len(op.outputs)}"
        )


def verify_types(program: Program, callee: Mapping[str, Program]) -> None:
    """Check that what a REGION or CALL operation passes has the types that its callee expects.

    `callee` maps a region's or program's name to it.
    """
    for index, op in enumerate(program.ops):
        target = callee.get(op.attrs.get("region") or op.attrs.get("program", "")) if not op.is_aten else None
        if target is None:
            continue
        for ref, item in zip(refs(op.args), target.inputs, strict=True):
            if program.types[ref.name] != item.type:
                raise VerifyError(
                    f"program {program.name!r}, operation {index} ({op.name}): {ref.name} is "
                    f"{program.types[ref.name]}, {item.name} of {target.name!r} takes {item.type}"
                )
