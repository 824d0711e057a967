"""The programs before and after, as listings, and the polynomial's weights."""

import pytest

from diffkiln.passes.caching import Kept, apply_schedule, call_sites_of, residuals, split
from diffkiln.passes.caching.applying import coefficients
from diffkiln.program import Op, Program, Ref, TensorType, listing, verify
from diffkiln.program.ir import CALL, NOISE, REGION, STEP, Input

TYPE = TensorType("float32", (2,))


def program(name, inputs, ops, outputs):
    names = [*inputs, *(output for op in ops for output in op.outputs)]
    types = dict.fromkeys(names, TYPE)
    return Program(name, tuple(Input(i, TYPE) for i in inputs), tuple(ops), tuple(map(Ref, outputs)), types)


def region(index, *names):
    return Op(REGION, (Ref(names[0]),), (names[1],), attrs={"region": "Block", "instance": f"blocks.{index}"})


def denoiser():
    ops = [
        Op("aten.neg.default", (Ref("%x"),), ("%a",)),
        region(0, "%a", "%b"),
        region(1, "%b", "%c"),
        region(2, "%c", "%d"),
        Op("aten.mul.Tensor", (Ref("%d"), Ref("%t")), ("%e",)),
    ]
    return program("net", ["%x", "%t"], ops, ["%e"])


REGIONS = {"Block": program("Block", ["%hidden_states"], [], ["%hidden_states"])}


def call(steps, lanes=1):
    ops, latents = [Op(NOISE, (), ("%0",), attrs={"shape": [2], "dtype": "float32"})], "%0"
    for step in range(steps):
        values = []
        for lane in range(lanes):
            name = f"%n{step}{lane}"
            attrs = {"component": "net", "program": "net"}
            ops.append(Op(CALL, (Ref(latents), Ref("%0")), (name,), attrs=attrs))
            values.append(Ref(name))
        ops.append(Op("aten.add.Tensor", (values[0], values[-1]), (f"%u{step}",)))
        latents = f"%l{step}"
        ops.append(Op(STEP, (Ref(f"%u{step}"),), (latents,), attrs={"step": step, "timestep": 1.0}))
    return program("call", [], ops, [latents])


def lines(program):
    return [line.strip() for line in listing(program).splitlines()[1:]]


def test_what_the_middle_adds_is_kept_and_added():
    kept = residuals(denoiser(), REGIONS, 1, 1)
    assert kept == (Kept("%c", "%b"),)
    part = split(denoiser(), kept)
    assert lines(part.keeping)[-3:] == [
        "%e float32[2] = aten.mul.Tensor(%d, %t)",
        "%kept.0 float32[2] = aten.sub.Tensor(%c, %b)",
        "return %e, %kept.0",
    ]
    assert lines(part.reusing) == [
        "input %x float32[2]",
        "input %t float32[2]",
        "input %kept.0 float32[2]",
        "%a float32[2] = aten.neg.default(%x)",
        "%b float32[2] = region(%a, region=Block, instance=blocks.0)",
        "%c float32[2] = aten.add.Tensor(%b, %kept.0)",
        "%d float32[2] = region(%c, region=Block, instance=blocks.2)",
        "%e float32[2] = aten.mul.Tensor(%d, %t)",
        "return %e",
    ]


def test_inputs_that_nothing_needs_are_not_taken():
    part = split(denoiser(), (Kept("%d"),))
    assert part.takes == (1,)
    assert lines(part.reusing) == [
        "input %t float32[2]",
        "input %kept.0 float32[2]",
        "%e float32[2] = aten.mul.Tensor(%kept.0, %t)",
        "return %e",
    ]


def test_a_step_that_reuses_the_output_calls_nothing():
    part = split(denoiser(), (Kept("%e"),))
    assert part.reusing is None
    woven = apply_schedule(call(3), "net", call_sites_of(call(3), "net"), (True, False, True), {"net": part})
    verify_all(woven, part)
    assert lines(woven) == [
        "%0 float32[2] = noise(shape=[2], dtype=float32)",
        "%n00 float32[2], %net.0.0.kept.0 float32[2] = call(%0, %0, component=net, program=net.keeping)",
        "%u0 float32[2] = aten.add.Tensor(%n00, %n00)",
        "%l0 float32[2] = step_end(%u0, step=0, timestep=1.0)",
        "%u1 float32[2] = aten.add.Tensor(%net.0.0.kept.0, %net.0.0.kept.0)",
        "%l1 float32[2] = step_end(%u1, step=1, timestep=1.0)",
        "%n20 float32[2] = call(%l1, %0, component=net, program=net)",
        "%u2 float32[2] = aten.add.Tensor(%n20, %n20)",
        "%l2 float32[2] = step_end(%u2, step=2, timestep=1.0)",
        "return %l2",
    ]


def test_each_lane_of_a_step_has_its_own_state():
    part = split(denoiser(), residuals(denoiser(), REGIONS, 0, 0))
    woven = apply_schedule(
        call(2, lanes=2), "net", call_sites_of(call(2, lanes=2), "net"), (True, False), {"net": part}
    )
    verify_all(woven, part)
    reusing = [op for op in woven.ops if op.attrs.get("program") == "net.reusing"]
    assert [op.args[-1] for op in reusing] == [Ref("%net.0.0.kept.0"), Ref("%net.0.1.kept.0")]
    lanes = call_sites_of(call(2, lanes=2), "net")
    assert (len(lanes.sites), sorted(lanes.step_of.values())) == (2, [(0, 0), (0, 1), (1, 0), (1, 1)])


def test_an_extrapolation_is_a_weighted_sum_of_what_was_kept():
    part = split(denoiser(), (Kept("%e"),))
    woven = apply_schedule(
        call(4), "net", call_sites_of(call(4), "net"), (True, True, False, False), {"net": part}, order=1
    )
    verify_all(woven, part)
    assert [line for line in lines(woven) if "foretold" in line and "step" not in line][:4] == [
        "%net.2.0.foretold.0.0 float32[2] = aten.mul.Tensor(%net.1.0.kept.0, 2.0)",
        "%net.2.0.foretold.0.1 float32[2] = aten.add.Tensor(%net.2.0.foretold.0.0, %net.0.0.kept.0, alpha=-1.0)",
        "%u2 float32[2] = aten.add.Tensor(%net.2.0.foretold.0.1, %net.2.0.foretold.0.1)",
        "%net.3.0.foretold.0.0 float32[2] = aten.mul.Tensor(%net.1.0.kept.0, 3.0)",
    ]


@pytest.mark.parametrize(
    ("step", "known", "wanted"),
    [
        (5, [4], [1.0]),
        (5, [4, 2], [1.5, -0.5]),
        (3, [2, 1, 0], [2.5, -2.0, 0.5]),
        (5, [4, 2, 0], [1.625, -0.75, 0.125]),
    ],
)
def test_weights_are_those_of_taylors_polynomial(step, known, wanted):
    assert coefficients(step, known) == wanted


def verify_all(woven, part):
    from diffkiln.program import Module

    programs = {p.name: p for p in (denoiser(), part.keeping, part.reusing) if p is not None}
    verify(woven, modules={"net": Module("net", programs, REGIONS)})
