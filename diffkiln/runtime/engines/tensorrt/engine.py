"""Run what the backend `tensorrt` built, with TensorRT, on torch's tensors and in the order of torch's stream.

Inputs, weights and outputs are bound where torch has them. TensorRT for RTX compiles its kernels when an engine first
runs on a GPU; what it compiled is kept for the next load. Nothing is deserialized before library, version and GPU are
those that the engine was built for.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from diffkiln.bundle.tensorrt import ENGINE, KERNELS
from diffkiln.errors import Incompatible
from diffkiln.interpreter.aten import in_pairs
from diffkiln.runtime.accelerator import accelerator
from diffkiln.runtime.engines import Layout, check_inputs
from diffkiln.runtime.engines.tensorrt.files import check_machine, read_facts
from diffkiln.runtime.engines.tensorrt.kernels import Kernels

#: Bytes that an address must be a multiple of (NvInferRuntime.h, setTensorAddress). torch's own allocations are.
_ALIGNMENT = 256


class TensorrtEngine:
    """One engine with one execution context. Calls from several threads take turns.

    Args:
        directory: as `diffkiln.exporters.tensorrt` lays it out.
        inputs: the layouts of the engine's inputs in order.
        device: where its tensors are: a GPU.

    Attributes:
        holds_weights: whether the engine holds weights of its own, so that those among its inputs are not looked at.

    Raises:
        Incomplete: a file is missing or cut short.
        MissingDependency: the library is not installed.
        Incompatible: the library is of another version, or the GPU another; or TensorRT refuses the engine.
    """

    def __init__(self, directory: Path, inputs: Sequence[Layout], device: torch.device | str = "cpu") -> None:
        self.inputs = tuple(inputs)
        self.device = torch.device(device)
        self._name = f"the engine {directory.name}"
        self._facts = facts = read_facts(directory)
        self.holds_weights = facts.holds_weights
        if len(facts.inputs) != len(self.inputs):
            raise Incompatible(f"{directory}: found {len(facts.inputs)} inputs, required {len(self.inputs)}")
        check_machine(directory, facts, self.device)
        self._trt = import_module(facts.library.module)
        self._kernels = Kernels(directory)
        self._lock = threading.Lock()
        there = accelerator(self.device)
        assert there is not None, "check_machine lets no engine through that is for no GPU"
        self._accelerator = there
        with there.active():
            self._load(directory)

    def _load(self, directory: Path) -> None:
        trt = self._trt
        self._logger = trt.Logger(trt.Logger.ERROR)
        self._runtime = trt.Runtime(self._logger)
        self._engine = self._runtime.deserialize_cuda_engine((directory / ENGINE).read_bytes())
        if self._engine is None:
            raise Incompatible(f"{directory}: {self._facts.library.title} {trt.__version__} refuses the engine")
        if self._facts.weight_budget is not None:  # to be set before there is a context
            self._engine.weight_streaming_budget_v2 = min(
                self._facts.weight_budget, self._engine.streamable_weights_size
            )
        # Contexts with memory of their own would keep it for as long as they live, each engine the most that it needs.
        self._context = self._kernels.context(self._engine, trt.ExecutionContextAllocationStrategy.USER_MANAGED)
        if self._context is None:
            raise Incompatible(f"{directory}: there is no memory left on {self.device} to run the engine")
        #: TensorRT waits for the whole device after each call in the default stream, so it has one of its own.
        self._stream = self._accelerator.stream()
        self._scratch = int(self._engine.device_memory_size_v2)
        self._takes = _by_name(self._engine, trt.TensorIOMode.INPUT)
        self._gives = {name: _torch_type(trt, self._engine.get_tensor_dtype(name)) for name in self._facts.outputs}
        self._sizes: set[tuple[torch.Size, ...]] = set()

    def __call__(self, flat: list[torch.Tensor]) -> list[torch.Tensor]:
        held = [self._weights_at(tensor) for tensor in flat]
        with self._lock, self._accelerator.active():
            # What a context needs while it runs is torch's memory, so all engines share it. Whatever is made of it next
            # in this stream is used after the call.
            scratch = self._accelerator.empty(self._scratch)
            self._context.set_device_memory(scratch.data_ptr(), self._scratch)
            for name, tensor in zip(self._facts.inputs, held, strict=True):
                if name in self._takes:
                    self._bind_input(name, tensor)
            outputs = [self._bind_output(name, dtype) for name, dtype in self._gives.items()]
            self._enqueue()
            del scratch
            self._keep_kernels(tuple(tensor.shape for tensor in held))
        return outputs

    def learned(self) -> Mapping[str, bytes]:
        """Returns the kernels that were compiled for this GPU and driver, for a bundle that is built where it runs."""
        kernels = self._kernels.compiled()
        return {KERNELS: kernels} if kernels else {}

    def check(self, flat: Sequence[torch.Tensor]) -> None:
        check_inputs(flat, self.inputs, self.device, self._name)

    def _weights_at(self, tensor: torch.Tensor) -> torch.Tensor:
        """Returns the tensor as TensorRT takes it: real, contiguous, aligned, and on the GPU, also for constants of one
        number.
        """
        tensor = in_pairs(tensor).to(self.device).contiguous()
        return tensor.clone() if tensor.data_ptr() % _ALIGNMENT else tensor

    def _bind_input(self, name: str, tensor: torch.Tensor) -> None:
        if not self._context.set_input_shape(name, tuple(tensor.shape)):
            raise Incompatible(
                f"{self._name}: {name} found {tuple(tensor.shape)}, required "
                f"{tuple(self._engine.get_tensor_shape(name))}, where -1 is a size within the range it was built for"
            )
        self._context.set_tensor_address(name, tensor.data_ptr())

    def _bind_output(self, name: str, dtype: torch.dtype) -> torch.Tensor:
        tensor = torch.empty(tuple(self._context.get_tensor_shape(name)), dtype=dtype, device=self.device)
        self._context.set_tensor_address(name, tensor.data_ptr())
        return tensor

    def _enqueue(self) -> None:
        """Runs after the work that torch has queued, and before the work that it queues next."""
        current: Any = self._accelerator.current_stream()
        own: Any = self._stream if current == self._accelerator.default_stream() else current
        own.wait_stream(current)
        done = self._context.execute_async_v3(own.cuda_stream)
        current.wait_stream(own)
        if not done:
            raise Incompatible(f"{self._name}: {self._facts.library.title} cannot run it on {self.device}")

    def _keep_kernels(self, sizes: tuple[torch.Size, ...]) -> None:
        """Keeps the kernels that the first call at these sizes may have compiled."""
        if sizes not in self._sizes:
            self._sizes.add(sizes)
            self._kernels.keep()


def _by_name(engine: Any, mode: Any) -> frozenset[str]:
    names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
    return frozenset(name for name in names if engine.get_tensor_mode(name) == mode)


def _torch_type(trt: Any, dtype: Any) -> torch.dtype:
    """Returns torch's name of TensorRT's dtype."""
    return {
        trt.float32: torch.float32, trt.float16: torch.float16, trt.bfloat16: torch.bfloat16, trt.int8: torch.int8,
        trt.int32: torch.int32, trt.int64: torch.int64, trt.bool: torch.bool,
    }[dtype]  # fmt: skip
