"""What of a program's complex numbers has a form in pairs of real ones."""

from __future__ import annotations

import pytest

from diffkiln.program import Input, Op, Program, Ref, TensorType
from diffkiln.program.pairs import pair_problems


def complex_program(name: str, result: str = "float32") -> Program:
    types = {"%x": TensorType("complex64", (2, 3)), "%1": TensorType(result, (2, 3))}
    return Program("p", (Input("%x", types["%x"]),), (Op(name, (Ref("%x"),), ("%1",)),), (Ref("%1"),), types)


@pytest.mark.parametrize("name", ["aten.real.default", "aten.view_as_real.default"])
def test_what_leads_to_real_numbers_is_taken(name: str) -> None:
    assert not list(pair_problems(complex_program(name)))


def test_an_operator_without_a_form_is_named_with_those_that_have_one() -> None:
    (reason,) = pair_problems(complex_program("aten.abs.default"))
    assert reason.startswith("found aten.abs.default of complex numbers, required one of cat, clone,")


def test_results_are_real() -> None:
    (reason,) = pair_problems(complex_program("aten.conj_physical.default", "complex64"))
    assert reason == "found complex64 as a result (1), required real numbers"
