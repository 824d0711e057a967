"""Programs that differ by sizes alone, as one."""

from dataclasses import replace

import pytest

from diffkiln.program import Op, Program, Ref, TensorType
from diffkiln.program.ir import Input
from diffkiln.program.sizes import families


def viewed(batch, height, width, *view, dtype="float32", weight=(4, 4), name=""):
    """A program that views its input [batch, 4, height, width] as something else."""
    x = TensorType(dtype, (batch, 4, height, width))
    types = {"%x": x, "@w": TensorType(dtype, weight), "%0": x, "%1": TensorType(dtype, tuple(view))}
    ops = (
        Op("aten.matmul.default", (Ref("%x"), Ref("@w")), ("%0",)),
        Op("aten.view.default", (Ref("%0"), tuple(view)), ("%1",)),
    )
    return Program(name, (Input("%x", x),), ops, (Ref("%1"),), types)


def at(family, *shape):
    return family.at(lambda dimension: shape[dimension[1]]).ops[1].args[1]


def test_programs_that_differ_by_sizes_are_one_family():
    sizes = [(8, 8), (8, 12), (12, 12)]
    (family,) = families([viewed(2, h, w, 2, 4 * h * w) for h, w in sizes])
    assert len(family.members) == 3
    assert family.ranges == {(0, 2): (8, 12), (0, 3): (8, 12)}


@pytest.mark.parametrize(
    "view",
    [
        pytest.param(lambda h, w: (2, 4, h * w), id="a product"),
        pytest.param(lambda h, w: (2, 4, 2 * h, w // 2), id="multiples"),
        pytest.param(lambda h, w: (2, h + 5, w - 3), id="sums"),
        pytest.param(lambda h, w: (2, h * w // 4 + 7), id="a part of a product and more"),
    ],
)
def test_numbers_follow_the_dimensions(view):
    sizes = [(8, 8), (8, 12), (12, 16), (16, 12)]
    (family,) = families([viewed(2, h, w, *view(h, w)) for h, w in sizes])
    for h, w in sizes:
        assert at(family, 2, 4, h, w) == view(h, w)


def test_number_that_follows_no_dimension_keeps_programs_apart():
    odd = [viewed(2, h, h, 2, number) for h, number in ((8, 3), (12, 7), (16, 4))]
    assert [family.ranges for family in families(odd)] == [{}, {}, {}]


def test_dimension_of_one_is_no_size():
    one, two, three = (viewed(batch, 8, 8, batch, 256) for batch in (1, 2, 3))
    assert sorted(len(family.members) for family in families([one, two, three])) == [1, 2]


@pytest.mark.parametrize(
    "other",
    [
        pytest.param(viewed(2, 12, 12, 2, 576, dtype="bfloat16"), id="a dtype"),
        pytest.param(viewed(2, 12, 12, 2, 576, weight=(4, 8)), id="a weight's shape"),
    ],
)
def test_programs_that_differ_by_more_are_apart(other):
    assert len(families([viewed(2, 8, 8, 2, 256), other])) == 2


def test_single_program_is_a_family_without_ranges():
    program = viewed(2, 8, 8, 2, 256)
    (family,) = families([program])
    assert family.members == (program,)
    assert not family.ranges
    assert family.at(lambda dimension: 0) == program


def test_names_do_not_keep_programs_apart():
    a, b = viewed(2, 8, 8, 2, 256, name="Block"), viewed(2, 12, 12, 2, 576, name="Block-2")
    (family,) = families([a, replace(b, signature={"result": Ref("%1")})])
    assert [member.name for member in family.members] == ["Block", "Block-2"]
