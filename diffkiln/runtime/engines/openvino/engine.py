"""Run what the backend `openvino` built, with OpenVINO, on torch's tensors.

Inputs and outputs are bound where torch has them: nothing is copied on its way in or out, and what a call returned is
never written to again. Weights that the engine holds lie in a file that OpenVINO maps from the private copy.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from diffkiln.bundle.openvino import Facts, import_openvino
from diffkiln.errors import Incompatible, MissingDependency
from diffkiln.guards import forks
from diffkiln.interpreter.aten import dtype_of, in_pairs
from diffkiln.runtime.engines import Layout, check_inputs
from diffkiln.runtime.engines.openvino.compiled import compiled_model
from diffkiln.runtime.engines.openvino.files import check_machine, read_facts


class OpenvinoEngine:
    """One compiled model. Calls from several threads run at a time where the engine has several streams.

    Args:
        directory: as `diffkiln.exporters.openvino` lays it out.
        inputs: the layouts of the engine's inputs in order.
        device: where its tensors are: a CPU.

    Attributes:
        holds_weights: whether the engine holds weights of its own, so that those among its inputs are not looked at.

    Raises:
        Incomplete: a file is missing or cut short.
        MissingDependency: OpenVINO is not installed.
        Incompatible: it is of another version, or cannot compile the engine on this CPU.
    """

    def __init__(self, directory: Path, inputs: Sequence[Layout], device: torch.device | str = "cpu") -> None:
        self.inputs = tuple(inputs)
        self.device = torch.device(device)
        self._name = f"the engine {directory.name}"
        facts = read_facts(directory)
        self.holds_weights = facts.weights == "engine"
        if len(facts.inputs) != len(self.inputs):
            raise Incompatible(f"{directory}: found {len(facts.inputs)} inputs, required {len(self.inputs)}")
        check_machine(directory, facts, self.device)
        self._directory, self._facts = directory, facts
        self._lock = forks.Lock()
        self._own: Any = None
        #: Requests that no call uses.
        self._idle: list[Any] = []
        forks.renewed(self)
        model = self._model
        #: OpenVINO's class of tensors, looked up once.
        self._tensor = _imported(directory).Tensor
        at = {name: position for position, name in enumerate(facts.inputs) if name is not None}
        self._takes = [at[item.get_any_name()] for item in model.inputs]
        self._gives = [(tuple(item.shape), dtype_of(_torch_name(item))) for item in model.outputs]

    def __call__(self, flat: list[torch.Tensor]) -> list[torch.Tensor]:
        held = [in_pairs(flat[position].detach()).contiguous() for position in self._takes]
        outputs = [torch.empty(shape, dtype=dtype) for shape, dtype in self._gives]
        try:
            request = self._idle.pop()
        except IndexError:
            request = self._model.create_infer_request()
        for port, tensor in enumerate(held):
            request.set_input_tensor(port, self._shared(tensor))
        for port, tensor in enumerate(outputs):
            request.set_output_tensor(port, self._shared(tensor))
        request.start_async()
        request.wait()
        self._idle.append(request)
        return outputs

    def renew(self) -> None:
        """Leaves the model to the parent, in a forked child, which has none of its threads and compiles its own."""
        self._parents = (self._own, self._idle)
        self._own, self._idle = None, []

    @property
    def _model(self) -> Any:
        with self._lock:
            if self._own is None:
                self._own = _opened(self._directory, self._facts)
            return self._own

    def _shared(self, tensor: torch.Tensor) -> Any:
        """Returns a contiguous tensor as OpenVINO's, in the same memory."""
        return self._tensor(tensor.numpy(), shared_memory=True)

    def check(self, flat: Sequence[torch.Tensor]) -> None:
        check_inputs(flat, self.inputs, self.device, self._name)


def _opened(directory: Path, facts: Facts) -> Any:
    """Returns the compiled model of an engine."""
    core = _imported(directory).Core()
    if facts.inference_precision == "bf16" and "BF16" not in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        raise Incompatible(f"{directory}: found a CPU without bfloat16, required one with it. Compile it for f32")
    return compiled_model(core, directory, facts)


def _imported(directory: Path) -> Any:
    try:
        return import_openvino()
    except ImportError as error:
        raise MissingDependency(f"{directory} is run by OpenVINO, which cannot be imported: {error}") from None


def _torch_name(output: Any) -> str:
    """Returns torch's name of an output's type, which OpenVINO calls "f32", "i64" or "boolean"."""
    name = output.get_element_type().get_type_name()
    return DTYPES[name]


#: Types that an engine takes and gives, as OpenVINO and torch name them.
DTYPES = {
    "f32": "float32", "f64": "float64", "u8": "uint8", "i8": "int8", "i16": "int16", "i32": "int32", "i64": "int64",
    "boolean": "bool",
}  # fmt: skip
