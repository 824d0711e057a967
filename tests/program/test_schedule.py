"""What a call's steps compute, in a line of symbols."""

from diffkiln.program import CALL, REGION, STEP, Module, Op, Program
from diffkiln.program.schedule import line, schedule


def program(name, blocks):
    ops = tuple(Op(REGION, (), (), attrs={"region": "Block", "instance": f"b.{index}"}) for index in range(blocks))
    return Program(name, (), ops, (), {})


def call(*steps):
    """Each step is the (component, program) pairs that it calls."""
    ops = []
    for number, calls in enumerate(steps):
        ops += [Op(CALL, (), (), attrs={"component": part, "program": name}) for part, name in calls]
        ops.append(Op(STEP, (), (), attrs={"step": number, "timestep": 1.0}))
    return Program("call", (), tuple(ops), (), {})


MODULES = {name: Module(name, {"whole": program("whole", 4), "less": program("less", 1)}) for name in ("high", "low")}


def shown(component, *steps):
    return line(schedule(call(*steps), MODULES, component))


def test_steps_run_all_of_the_blocks_some_or_none():
    text = ("text", "text")
    assert shown("high", [text, ("high", "whole")], [("high", "less")], [], [("high", "whole")]) == "●◐○●"


def test_steps_of_another_denoiser_are_not_steps_that_reuse():
    steps = [("high", "whole")], [], [("low", "whole")], [("low", "less")]
    assert shown("high", *steps) == "●○··"
    assert shown("low", *steps) == "·○●◐"


def test_compiled_arithmetic_is_no_denoiser():
    arithmetic = ("scheduler", "step")
    assert shown("high", [("high", "whole"), arithmetic], [arithmetic]) == "●○"
