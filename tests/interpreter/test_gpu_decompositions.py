"""What a GPU's kernels cannot take is computed by others that give the same numbers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from diffkiln.compiler.compile import check
from diffkiln.compiler.dry_run import dry_run
from diffkiln.errors import VerifyError
from diffkiln.exporters.aot_inductor import build as aot_inductor
from diffkiln.exporters.artefact import Lowering
from diffkiln.interpreter.aten import Interpreter
from diffkiln.interpreter.fx import as_graph
from diffkiln.interpreter.gpu_decompositions import gpu_decompositions, int_mm
from diffkiln.interpreter.quiet import quiet_libraries
from diffkiln.program import Program
from diffkiln.record.constants import Constants
from diffkiln.record.pipeline import record
from tests.end_to_end.test_families import spec_of
from tests.exporters.regions import RTX_4090, Writer
from tests.pipelines import WARNING_FILTERS

pytestmark = [pytest.mark.filterwarnings(text) for text in WARNING_FILTERS]
META = torch.device("meta")
SIZES = [(1, 16, 24), (16, 16, 24), (17, 16, 24), (3, 5, 7), (40, 9, 8), (40, 8, 9)]


class Strict(TorchDispatchMode):
    """The product of int8 as a GPU has it: more than 16 rows, columns in multiples of 8."""

    def __init__(self) -> None:
        super().__init__()
        self.products = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._int_mm.default:
            first, second = args
            assert first.shape[0] > 16
            assert first.shape[1] % 8 == second.shape[1] % 8 == 0
            self.products += 1
        return func(*args, **(kwargs or {}))


def product(rows: int, inner: int, columns: int) -> Program:
    w = Writer()
    x, weight = w.value("%x", rows, inner, dtype="int8"), w.value("@weight", inner, columns, dtype="int8")
    return w.program("Int8Product", w.op("_int_mm.default", x, weight))


def matrices(rows: int, inner: int, columns: int) -> list[torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    return [
        torch.randint(-128, 128, size, dtype=torch.int8, generator=draw) for size in ((rows, inner), (inner, columns))
    ]


@pytest.mark.parametrize("size", SIZES)
def test_products_of_int8_are_the_same_numbers_in_shapes_that_a_gpu_takes(size) -> None:
    first, second = matrices(*size)
    with Strict() as strict:
        found = int_mm(first, second)
    assert strict.products == 1
    assert torch.equal(found, (first.long() @ second.long()).int())


def test_on_a_cpu_operators_stay_as_they_are() -> None:
    assert gpu_decompositions(torch.device("cpu")) == {}


@pytest.mark.parametrize("size", SIZES)
def test_an_engine_for_a_gpu_has_products_of_these_shapes(size, monkeypatch) -> None:
    given: list[Any] = []
    monkeypatch.setattr(aot_inductor, "traced", lambda lowering, flat, special: given.append(special))
    region = product(*size)
    aot_inductor._exported(Lowering(region, RTX_4090))
    first, second = (matrix.to(META) for matrix in matrices(*size))
    with Strict() as strict:
        (found,) = Interpreter(region, META, given[0])([first], {"weight": second})
    assert strict.products == 1
    assert found.shape == (size[0], size[2])


@pytest.mark.parametrize("size", SIZES)
def test_a_region_that_is_compiled_at_load_has_products_of_these_shapes(size) -> None:
    graph = as_graph(product(*size), META, {})
    with Strict() as strict:
        (found,) = graph(*(matrix.to(META) for matrix in matrices(*size)))
    assert strict.products == 1
    assert found.shape == (size[0], size[2])


def test_a_pipeline_with_int8_activations_has_one_row_and_runs_on_a_gpu(families, monkeypatch) -> None:
    """FLUX's modulations: the product of one row, which a GPU refuses."""
    quantize = {"name": "quantize", "component": "transformer", "type": "int8_dynamic"}
    made = check(spec_of("flux", families) | {"passes": [quantize]})
    with quiet_libraries():
        recording = record(made.pipe, made.requests, Constants())
    dry_run(recording)
    monkeypatch.setattr("diffkiln.runtime.executor.gpu_decompositions", lambda device: {})
    with pytest.raises(VerifyError, match=r"_int_mm.*more than 16 rows"):
        dry_run(recording)
