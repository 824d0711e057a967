"""Run what the backend `onnx` built, with ONNX Runtime, on the bundle's own tensors.

Inputs, weights and outputs are bound where torch has them, by address: nothing is copied on its way in or out. Complex
tensors are bound as the pairs of real numbers that they are in memory. Graph optimizations run when the session is
made, from the graph alone; libraries of custom operators are never loaded.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch

from diffkiln.errors import Incompatible, MissingDependency
from diffkiln.guards import forks
from diffkiln.interpreter.aten import dtype_name, dtype_of, in_pairs
from diffkiln.runtime.accelerator import accelerator
from diffkiln.runtime.engines import Layout, check_inputs
from diffkiln.runtime.engines.onnx.files import check_files

MODEL = "engine.onnx"
#: Types by the number that ONNX gives them (TensorProto.DataType).
NUMBERS = {
    "float32": 1, "uint8": 2, "int8": 3, "int16": 5, "int32": 6, "int64": 7, "bool": 9, "float16": 10, "float64": 11,
    "bfloat16": 16, "float8_e4m3fn": 17, "float8_e5m2": 19,
}  # fmt: skip
_PROVIDERS = {"cpu": ("CPUExecutionProvider",), "cuda": ("CUDAExecutionProvider", "CPUExecutionProvider")}
#: ONNX Runtime's severities: messages of errors alone, and errors are raised as well.
_ERRORS = 3


class OnnxEngine:
    """One session of ONNX Runtime. It may be called from several threads at once.

    Args:
        directory: holds `engine.onnx`, and beside it the external data that it refers to, if any.
        inputs: the layouts of the engine's inputs in order.
        device: where its tensors are.

    Raises:
        MissingDependency: ONNX Runtime is not installed.
        Incomplete: a file is missing or cut short.
        PathEscape: the model refers to a file outside its directory.
        Incompatible: ONNX Runtime cannot run it here.
    """

    #: Distributions that bring the module `onnxruntime`.
    stand_ins: ClassVar = {"onnxruntime": ("onnxruntime-gpu",)}

    def __init__(self, directory: Path, inputs: Sequence[Layout], device: torch.device | str = "cpu") -> None:
        self.inputs = tuple(inputs)
        self.device = torch.device(device)
        self._name = f"the engine {directory.name}"
        self._model = directory / MODEL
        check_files(self._model)
        self._own: Any = _session(self._model, self.device)
        forks.renewed(self)
        self._takes = [item.name for item in self._session.get_inputs()]
        if len(self._takes) != len(self.inputs):
            raise Incompatible(f"{directory}: found {len(self._takes)} inputs, required {len(self.inputs)}")
        self._gives = [(item.name, _torch_type(item.type)) for item in self._session.get_outputs()]
        #: The shapes of outputs by those of inputs: only a run shows them where sizes are free.
        self._shapes: dict[tuple[torch.Size, ...], list[list[int]]] = {}
        fixed = [item.shape for item in self._session.get_outputs()]
        self._fixed = fixed if all(isinstance(size, int) for shape in fixed for size in shape) else None

    def __call__(self, flat: list[torch.Tensor]) -> list[torch.Tensor]:
        held = [in_pairs(tensor).contiguous() for tensor in flat]
        binding = self._session.io_binding()
        for name, tensor in zip(self._takes, held, strict=True):
            self._bind(binding.bind_input, name, tensor)
        shapes = self._fixed or self._found(binding, tuple(tensor.shape for tensor in held))
        outputs = [
            torch.empty(shape, dtype=dtype, device=self.device)
            for shape, (_, dtype) in zip(shapes, self._gives, strict=True)
        ]
        for (name, _), tensor in zip(self._gives, outputs, strict=True):
            self._bind(binding.bind_output, name, tensor)
        self._run(binding)
        return outputs

    def renew(self) -> None:
        """Leaves the session to the parent, in a forked child, since its threads are the parent's and its end would
        wait for them.
        """
        self._parents, self._own = self._own, None

    @property
    def _session(self) -> Any:
        if self._own is None:
            self._own = _session(self._model, self.device)
        return self._own

    def check(self, flat: Sequence[torch.Tensor]) -> None:
        check_inputs(flat, self.inputs, self.device, self._name)

    def _bind(self, bind: Any, name: str, tensor: torch.Tensor) -> None:
        kind, index = tensor.device.type, tensor.device.index or 0
        bind(name, kind, index, NUMBERS[dtype_name(tensor.dtype)], tuple(tensor.shape), tensor.data_ptr())

    def _found(self, binding: Any, sizes: tuple[torch.Size, ...]) -> list[list[int]]:
        """Returns the outputs' shapes; the first time at these sizes, by a run into ONNX Runtime's own memory."""
        if sizes in self._shapes:
            return self._shapes[sizes]
        for name, _ in self._gives:
            binding.bind_output(name, self.device.type, self.device.index or 0)
        self._run(binding)
        shapes = self._shapes[sizes] = [value.shape() for value in binding.get_outputs()]
        binding.clear_binding_outputs()
        return shapes

    def _run(self, binding: Any) -> None:
        if there := accelerator(self.device):  # ONNX Runtime has a stream of its own, and waits for that alone
            there.current_stream().synchronize()
        self._session.run_with_iobinding(binding)


def _session(model: Path, device: torch.device) -> Any:
    """Opens ONNX Runtime with as many threads as torch has now."""
    try:
        import onnxruntime
    except ImportError:
        raise MissingDependency(f"{model.parent} is run by ONNX Runtime: pip install onnxruntime") from None
    providers = _providers(onnxruntime.get_available_providers(), device)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.inter_op_num_threads = 1
    options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
    options.use_deterministic_compute = True
    options.log_severity_level = _ERRORS
    # Threads that wait for work sleep: torch's own need the cores.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    try:
        return onnxruntime.InferenceSession(str(model), options, providers=providers)
    except Exception as error:  # its classes have no common one but this
        first = str(error).partition("\n")[0]
        raise Incompatible(
            f"{model.parent}: ONNX Runtime {onnxruntime.__version__} cannot load the engine: {first}"
        ) from error


def _providers(available: Sequence[str], device: torch.device) -> list[Any]:
    """Returns the providers for a device, best first.

    Raises:
        Incompatible: this ONNX Runtime has none for it.
    """
    wanted = _PROVIDERS.get(device.type, ())
    if not wanted or wanted[0] not in available:
        raise Incompatible(
            f"provider of ONNX Runtime: found {', '.join(available)}, required {wanted[0] if wanted else device.type}. "
            + ("pip install onnxruntime-gpu" if device.type == "cuda" else "Run it on a CPU")
        )
    own = (wanted[0], {"device_id": str(device.index or 0)}) if device.type == "cuda" else wanted[0]
    return [own, *wanted[1:]]


def _torch_type(name: str) -> torch.dtype:
    """Returns the dtype that ONNX Runtime calls "tensor(float)"."""
    kind = name.removeprefix("tensor(").removesuffix(")")
    return dtype_of(_NAMES.get(kind, kind))


_NAMES = {
    "float": "float32",
    "double": "float64",
    "float8e4m3fn": "float8_e4m3fn",
    "float8e5m2": "float8_e5m2",
}
