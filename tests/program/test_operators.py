"""The closed list: operators that exist, write to nothing and draw nothing."""

from __future__ import annotations

import pytest
import torch

from diffkiln.aten import overload
from diffkiln.errors import VerifyError
from diffkiln.program.operators import OPERATORS, allowed


def overloads():
    for packet_name in sorted(OPERATORS):
        packet = getattr(torch.ops.aten, packet_name)
        for which in packet.overloads():
            if allowed(f"aten.{packet_name}.{which}"):
                yield f"aten.{packet_name}.{which}", getattr(packet, which)


def test_every_operator_of_the_list_exists_in_this_torch():
    assert [name for name in OPERATORS if not hasattr(torch.ops.aten, name)] == []


def test_what_the_interpreter_runs_writes_to_nothing_and_draws_nothing():
    runnable = 0
    for name, found in overloads():
        if found._schema.is_mutable:
            with pytest.raises(VerifyError, match="writes"):
                overload(name)
            continue
        runnable += 1
        if "scaled_dot_product" not in name:  # which has a rate of dropout; the recorder refuses any but zero
            assert torch.Tag.nondeterministic_seeded not in found.tags, name
    assert runnable > 250


@pytest.mark.parametrize(
    "name", ["aten.add_.Tensor", "aten.randn.default", "aten.add.out", "aten.add.__class__", "os.system", "aten", ""]
)
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
