"""What stands in for a GPU that is not there; tests/cross builds with it."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from diffkiln.errors import ExportError
from diffkiln.exporters.aot_inductor import absent_gpu
from diffkiln.exporters.aot_inductor.absent_gpu import (
    _convolutions,
    _device,
    _first_that_compiles,
    _folding,
    _replaced,
    numbers_of,
)
from diffkiln.spec.targets import GPUS


@pytest.mark.parametrize("version", ["2.10.1", "2.16.0+cu140"])
def test_refuses_a_torch_that_it_was_not_written_for(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__version__", version)
    with (
        pytest.raises(ExportError, match=r"found torch .*, and building without the GPU is written for 2\.11 to 2\.15"),
        absent_gpu.absent_gpu((8, 9)),
    ):
        raise AssertionError("it was entered")


@pytest.mark.parametrize("version", ["2.11.0", "2.13.0+cu130", "2.15.2"])
def test_takes_those_that_it_was_written_for(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__version__", version)
    assert absent_gpu.torch_problem() == ""


def test_every_gpu_that_has_a_name_has_numbers() -> None:
    for target in GPUS.values():
        assert (numbers_of(target.capability).major, numbers_of(target.capability).minor) == target.capability


def test_a_gpu_without_numbers_is_refused() -> None:
    with pytest.raises(ExportError, match=r"not for 6\.1\. Build on a machine that has the GPU"):
        numbers_of((6, 1))


def test_torch_answers_for_the_gpu_and_for_itself_again() -> None:
    before = dict(vars(torch.cuda))
    with _device(numbers_of((9, 0))):
        assert torch.cuda.is_available()
        assert torch.cuda.get_device_capability("cuda:0") == (9, 0)
        assert torch.cuda.get_device_properties(0).multi_processor_count == 132
    assert dict(vars(torch.cuda)) == before


def test_a_tensor_of_one_value_is_folded_without_the_gpu() -> None:
    from torch._inductor.fx_passes.joint_graph import constant_fold_uniform_value

    graph = torch.fx.Graph()
    with FakeTensorMode():
        kind = {"dtype": torch.float32, "device": torch.device("cuda:0"), "pin_memory": False}
        full = graph.call_function(torch.ops.aten.full.default, ([4, 4], 3), kind)
        full.meta["val"] = torch.empty(4, 4)
        square = graph.call_function(torch.ops.aten.mul.Tensor, (full, full))
        square.meta["val"] = torch.empty(4, 4)
    graph.output((square,))
    module = torch.fx.GraphModule({}, graph)
    with pytest.raises((AssertionError, RuntimeError)):
        constant_fold_uniform_value(module)
    with _folding(numbers_of((8, 9))):
        constant_fold_uniform_value(module)
    assert 9.0 in [node.args[1] for node in module.graph.find_nodes(op="call_function", target=full.target)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(("dimensions", "last"), [(2, torch.channels_last), (3, torch.channels_last_3d)])
def test_a_convolution_keeps_channels_last_as_cudnn_does(
    dtype: torch.dtype, dimensions: int, last: torch.memory_format
) -> None:
    """Without a GPU torch takes those of bfloat16 for contiguous, and an engine would read them from wrong places."""
    each = [1] * dimensions

    def convolved(given: torch.Tensor) -> torch.Tensor:
        return torch.ops.aten.convolution.default(given, weight, None, each, each, each, False, [0] * dimensions, 1)

    with FakeTensorMode(), torch.inference_mode(False):
        image = torch.empty(2, 16, *[8] * dimensions, dtype=dtype, device="cuda:0")
        weight = torch.empty(32, 16, *[3] * dimensions, dtype=dtype, device="cuda:0")
        convolved(image.to(memory_format=last))  # as a dry run does: torch remembers the layout that it finds
        with _convolutions(numbers_of((8, 9))):
            absent_gpu._forget()
            assert convolved(image).is_contiguous()
            assert convolved(image.to(memory_format=last)).is_contiguous(memory_format=last) == (dtype != torch.float64)
        absent_gpu._forget()


def test_what_torch_no_longer_has_is_an_error_and_the_rest_is_put_back() -> None:
    owner = SimpleNamespace(there=1)
    with pytest.raises(ExportError, match=r"has no SimpleNamespace\.gone"), _replaced(owner, there=2, gone=3):
        raise AssertionError("it was entered")
    assert owner.there == 1


def test_forms_are_tried_until_one_compiles() -> None:
    tried = []

    class NoConfigs(RuntimeError):
        pass

    def compile_all(kernel: SimpleNamespace) -> None:
        tried.append(kernel.configs)
        if kernel.configs == ["too large"]:
            raise NoConfigs
        kernel.compile_results = kernel.configs

    kernel = SimpleNamespace(configs=["too large", "first", "second"], compile_results=[])
    _first_that_compiles(compile_all, NoConfigs)(kernel)
    assert tried == [["too large"], ["first"]]
