"""What a call's steps compute, in a line of symbols."""

from diffkiln.program import CALL, NOISE, REGION, STEP, Module, Op, Program, Ref, TensorType
from diffkiln.program.schedule import line, schedule, why_unseen


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


def steps(*after):
    """Two steps, each of which computes a value and the latents, and the operations after them."""
    ops = []
    for number in range(2):
        value = Ref(f"%value{number}")
        ops.append(Op("aten.neg.default", (Ref("%start"),), (value.name,)))
        ops.append(Op(STEP, (value,), (f"%latents{number}",), attrs={"step": number, "timestep": 1.0}))
    ops += after
    kind = TensorType("float32", (1,))
    types = {name: kind for op in ops for name in op.outputs}
    return Program("call", (), tuple(ops), (Ref("%after"),), types)


def test_steps_can_be_shown_where_what_follows_needs_their_latents_alone_and_no_noise():
    latents, after = Ref("%latents1"), ("%after",)
    decoded = Op("aten.neg.default", (latents,), after)
    assert why_unseen(steps(decoded)) == ""
    noise = Op(NOISE, (), ("%noise",), attrs={"shape": [1], "dtype": "float32"})
    assert why_unseen(steps(noise, decoded)) == "what follows the last step draws noise"
    both = Op("aten.add.Tensor", (latents, Ref("%value1")), after)
    assert "needs more of it than the latents" in why_unseen(steps(both))
    assert why_unseen(program("no steps", 1)) == "it shows no steps"
