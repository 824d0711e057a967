"""What a GPU refuses and a CPU does not is found by fake CUDA tensors, in the build itself."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

import diffkiln
from diffkiln.compiler.compile import check
from diffkiln.compiler.dry_run import dry_run
from diffkiln.errors import VerifyError
from diffkiln.interpreter.quiet import quiet_libraries
from diffkiln.program import CALL, Device, DType, Input, Module, Op, Program, Ref, TensorType
from diffkiln.record.constants import Constants
from diffkiln.record.pipeline import Recording, record
from tests.end_to_end.test_families import spec_of
from tests.pipelines import FAMILIES, WARNING_FILTERS

pytestmark = [pytest.mark.filterwarnings(text) for text in WARNING_FILTERS]

_LATENTS, _NUMBER, _MASK = TensorType("float32", (4,)), TensorType("float32", ()), TensorType("bool", (4,))
_IMAGE, _TWICE = TensorType("float32", (1, 1, 2**16, 2**14)), TensorType("float32", (1, 1, 2**17, 2**15))
_WHERE = {"component": "unet", "program": "forward"}


def recording(*ops: Op, types: dict[str, TensorType] | None = None) -> Recording:
    """A call of a component of these operations, whose last result is %out."""
    inputs = (Input("%latents", _LATENTS),)
    constants = Constants()
    number, table = constants.add(torch.tensor(2.0)), constants.add(torch.arange(4.0))
    named = {"%latents": _LATENTS, "%out": _LATENTS, f"#{number}": _NUMBER, f"#{table}": _LATENTS, **(types or {})}
    names = {"#number": f"#{number}", "#table": f"#{table}"}
    renamed = tuple(replace(op, args=_renamed(op.args, names)) for op in ops)
    inside = Program("forward", inputs, renamed, (Ref("%out"),), named)
    call = Program("call", inputs, (Op(CALL, (Ref("%latents"),), ("%out",), attrs=_WHERE),), (Ref("%out"),), named)
    return Recording([{"call": call}], {"unet": Module("unet", {"forward": inside})}, constants, [{}])


def _renamed(arg: Any, names: dict[str, str]) -> Any:
    if isinstance(arg, tuple):
        return tuple(_renamed(item, names) for item in arg)
    return Ref(names.get(arg.name, arg.name)) if isinstance(arg, Ref) else arg


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_every_familys_whole_call_runs_on_fake_gpu_tensors(name: str, families) -> None:
    made = check(spec_of(name, families))
    with quiet_libraries():
        recorded = record(made.pipe, made.requests, Constants())
    for graphs in (None, "step"):
        dry_run(recorded, graphs)


def test_arithmetic_with_a_number_and_with_a_table_runs() -> None:
    dry_run(
        recording(
            Op("aten.mul.Tensor", (Ref("%latents"), Ref("#number")), ("%0",)),
            Op("aten.add.Tensor", (Ref("%0"), Ref("#table")), ("%1",)),
            Op("aten.stack.default", ((Ref("#number"), Ref("#number"), Ref("#number"), Ref("#number")),), ("%2",)),
            Op("aten.add.Tensor", (Ref("%1"), Ref("%2")), ("%out",)),
            types={"%0": _LATENTS, "%1": _LATENTS, "%2": _LATENTS},
        )
    )


def test_operator_whose_result_has_a_size_that_a_value_decides_is_not_in_the_list() -> None:
    with pytest.raises(VerifyError, match="not in the closed list"):
        dry_run(recording(Op("aten.repeat_interleave.Tensor", (Ref("%latents"),), ("%out",))), None)


@pytest.mark.parametrize(
    ("ops", "operator", "reason", "types"),
    [
        (
            (
                Op("aten.zeros.default", ((1, 1, 2**16, 2**14),), ("%0",), {"device": Device()}),
                Op("aten.upsample_nearest2d.vec", (Ref("%0"), None, (2.0, 2.0)), ("%1",)),
                Op("aten.mean.default", (Ref("%1"),), ("%2",)),
                Op("aten.mul.Tensor", (Ref("%latents"), Ref("%2")), ("%out",)),
            ),
            "aten.upsample_nearest2d.vec",
            "more than 2³¹ values",
            {"%0": _IMAGE, "%1": _TWICE, "%2": _NUMBER},
        ),
        (
            (
                Op("aten.arange.default", (4,), ("%0",), {"dtype": DType("float32")}),
                Op("aten.mul.Tensor", (Ref("%latents"), Ref("%0")), ("%out",)),
            ),
            "aten.arange.default",
            "its result is on the host",
            {"%0": _LATENTS},
        ),
        (
            (
                Op("aten.gt.Scalar", (Ref("%latents"), 0), ("%0",)),
                Op("aten.index.Tensor", (Ref("%latents"), (Ref("%0"),)), ("%out",)),
            ),
            "aten.index.Tensor",
            "an index is a mask",
            {"%0": _MASK},
        ),
        (
            (
                Op("aten.scalar_tensor.default", (2.0,), ("%0",)),
                Op("aten._to_copy.default", (Ref("%0"),), ("%1",), {"device": Device()}),
                Op("aten.mul.Tensor", (Ref("%latents"), Ref("%1")), ("%out",)),
            ),
            "aten._to_copy.default",
            "copies from the host",
            {"%0": _NUMBER, "%1": _NUMBER},
        ),
    ],
    ids=[
        "too many values for upsampling",
        "a tensor of the host",
        "an index by a mask",
        "a copy from the host",
    ],
)
@pytest.mark.parametrize("graphs", [None, "step", "program"])
def test_what_a_gpu_refuses_or_waits_for_is_an_error_that_names_the_operator(
    ops, operator, reason, types, graphs
) -> None:
    with pytest.raises(VerifyError, match=reason) as error:
        dry_run(recording(*ops, types=types), graphs)
    assert operator in str(error.value)
    assert str(error.value).startswith("unet/forward: ")


def test_a_build_for_a_gpu_runs_the_call_dry_and_one_for_a_cpu_does_not(tmp_path, families, monkeypatch) -> None:
    ran: list[str | None] = []
    monkeypatch.setattr("diffkiln.compiler.compile.dry_run", lambda recording, graphs, parallel: ran.append(graphs))
    spec = spec_of("sdxl", families)
    diffkiln.compile(spec, tmp_path / "cpu")
    assert ran == []
    diffkiln.compile(spec | {"target": {"device": "cuda", "gpu": "nvidia-l4"}}, tmp_path / "gpu")
    graphs = {"target": {"device": "cuda", "gpu": "nvidia-l4"}, "runtime": {"cuda_graphs": "step"}}
    diffkiln.compile(spec | graphs, tmp_path / "graphs")
    assert ran == [None, "step"]
