"""The closed list: operators that exist, write to nothing and draw nothing."""

from __future__ import annotations

import inspect

import pytest
import torch

from diffkiln.interpreter.aten import overload
from diffkiln.program.operators import OPERATORS, allowed

#: Names that operators which share an entry have for one argument.
_ALIASES = {"self", "input", "shape", "size", "negative_slope", "alpha", "dim", "axis0", "axis1", "source", "tensors"}


def test_every_operator_of_the_list_exists_in_this_torch():
    for name in OPERATORS:
        overload(name)


def test_no_operator_of_the_list_writes_or_draws():
    for name in OPERATORS:
        found = overload(name)
        assert not found._schema.is_mutable, name
        if "scaled_dot_product" not in name:  # which has a rate of dropout; the list takes none but zero
            assert torch.Tag.nondeterministic_seeded not in found.tags, name


def test_parameters_of_an_entry_are_those_of_the_schema_in_its_order():
    for name, entry in OPERATORS.items():
        parameters = inspect.signature(entry.infer).parameters.values()
        taken = [item.name for item in parameters if item.kind is item.POSITIONAL_OR_KEYWORD]
        positions = [argument.name for argument in overload(name)._schema.arguments if not argument.kwarg_only]
        if not any(item.kind is item.VAR_POSITIONAL for item in parameters):
            shared = [own == theirs or {own, theirs} <= _ALIASES for own, theirs in zip(taken, positions, strict=False)]
            assert all(shared), (name, taken, positions)


@pytest.mark.parametrize(
    "name", ["aten.add_.Tensor", "aten.randn.default", "aten.add.out", "aten.add.__class__", "os.system", "aten", "",
             "aten.empty.memory_format", "aten.empty_like.default", "aten.new_empty_strided.default",
             "aten._reshape_alias.default", "aten.native_batch_norm.default", "aten.repeat_interleave.Tensor"]
)  # fmt: skip
def test_everything_else_is_refused(name):
    assert not allowed(name)


@pytest.mark.parametrize(
    "name",
    ["aten._local_scalar_dense.default", "aten.item.default", "aten.nonzero.default", "aten.masked_select.default",
     "aten.equal.default", "aten.is_nonzero.default", "aten.unique_dim.default"],
)  # fmt: skip
def test_nothing_that_reads_a_value_back_from_the_device_is_in_the_list(name):
    """So no program waits for its device between the first operation and the last."""
    assert not allowed(name)
