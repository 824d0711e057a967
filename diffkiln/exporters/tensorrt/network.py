"""A model becomes TensorRT's network, and the network an engine; what TensorRT says on the way becomes an error.

Networks are strongly typed: every operation computes in the types that the model states, and TensorRT chooses none.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from diffkiln.bundle.tensorrt import MODEL, RTX, Library
from diffkiln.errors import ExportError
from diffkiln.guards import forks

#: One network is built at a time: TensorRT logs for the process, with the first logger that it was given.
_BUILDING = forks.Lock()
_SAID: list[str] = []
_loggers: dict[str, Any] = {}

#: A layer's note of the node that it was made of.
_NODE = re.compile(r"\[ONNX Layer: ([^\]]+)\]")


@dataclass(frozen=True)
class Wanted:
    """The properties of an engine to be built.

    Attributes:
        inputs: the model's, by name, in their order.
        capability: the GPU's, such as (8, 9).
        ranges: of each input, by its position, the dimensions whose size is free, with the smallest and the largest.
        weights: by position, the tensors of the inputs that become the engine's own.
        streams: whether the engine's own weights may be streamed to the GPU.
        origins: the operator that each node of the model comes from.
    """

    inputs: tuple[str, ...]
    capability: tuple[int, int]
    ranges: Mapping[int, Mapping[int, tuple[int, int]]]
    weights: Mapping[int, torch.Tensor]
    streams: bool
    origins: Mapping[str, str]


@dataclass(frozen=True)
class Engine:
    """A serialized engine; the names of its inputs by position, None where it takes none; outputs; layers.

    `timing` is what timing kernels gave, empty where nothing is timed.
    """

    data: bytes
    inputs: tuple[str | None, ...]
    outputs: tuple[str, ...]
    layers: tuple[Mapping[str, Any], ...]
    timing: bytes = b""


def build_engine(trt: Any, library: Library, folder: Path, wanted: Wanted) -> Engine:
    """Builds the engine of the model in a folder.

    Args:
        trt: the library's module.
        library: which of the two it is.
        folder: holds the model.

    Raises:
        ExportError: the parser cannot take an operation, which is named with the operator that it comes from; or the
            builder refuses the network.
    """
    with _BUILDING:
        _SAID.clear()
        builder = trt.Builder(_logger(trt))
        network = _parsed(trt, builder, library, folder, wanted)
        outputs = tuple(network.get_output(position).name for position in range(network.num_outputs))
        for position, tensor in wanted.weights.items():
            _hold(trt, network, wanted.inputs[position], tensor)
        config = _configured(trt, builder, network, library, wanted)
        serialized = builder.build_serialized_network(network, config)
        if serialized is None:
            raise ExportError(_refusal(library, trt, wanted))
        taken = _inputs(network)
        inputs = tuple(name if name in taken else None for name in wanted.inputs)
        return Engine(bytes(serialized), inputs, outputs, _layers(network, wanted.origins), _timing(config, library))


def _inputs(network: Any) -> dict[str, Any]:
    return {value.name: value for value in map(network.get_input, range(network.num_inputs))}


def _logger(trt: Any) -> Any:
    """Returns the process's only logger for this library; its errors are collected in `_SAID`."""
    if trt.__name__ not in _loggers:
        worst = (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR)

        class Logger(trt.ILogger):
            def __init__(self) -> None:
                trt.ILogger.__init__(self)

            def log(self, severity: Any, msg: str) -> None:
                if severity in worst:
                    _SAID.append(msg)

        _loggers[trt.__name__] = Logger()
    return _loggers[trt.__name__]


def _parsed(trt: Any, builder: Any, library: Library, folder: Path, wanted: Wanted) -> Any:
    """Returns the model as a network."""
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, _logger(trt))
    if not parser.parse_from_file(str(folder / MODEL)):
        errors = [parser.get_error(index) for index in range(parser.num_errors)]
        raise ExportError(_unparsed(library, trt, errors, wanted.origins))
    network.name = "diffkiln"  # its own counts the networks of the process, and stands in the engine
    for name, value in _inputs(network).items():
        if value.is_shape_tensor:
            raise ExportError(f"found a shape that follows the values of the input {name}, required sizes alone")
    return network


def _hold(trt: Any, network: Any, name: str, tensor: torch.Tensor) -> None:
    """Replaces the network's input of this name by a tensor, which must live until the engine is built."""
    value = _inputs(network).get(name)
    if value is None:  # nothing reads it
        return
    weights = trt.Weights(value.dtype, tensor.data_ptr(), tensor.numel())
    constant = network.add_constant(value.shape, weights)
    constant.name = name
    for layer in map(network.get_layer, range(network.num_layers)):
        for index in range(layer.num_inputs):
            found = layer.get_input(index)
            if found is not None and found.name == name:
                layer.set_input(index, constant.get_output(0))
    network.remove_tensor(value)


def _configured(trt: Any, builder: Any, network: Any, library: Library, wanted: Wanted) -> Any:
    config = builder.create_builder_config()
    config.clear_flag(trt.BuilderFlag.TF32)  # float32 means float32; the library's default rounds its products
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    if library is RTX:
        major, minor = wanted.capability
        config.num_compute_capabilities = 1
        config.set_compute_capability(getattr(trt.ComputeCapability, f"SM{major}{minor}"), 0)
    else:
        config.set_timing_cache(config.create_timing_cache(b""), False)
    if wanted.streams:
        config.set_flag(trt.BuilderFlag.WEIGHT_STREAMING)
    if wanted.ranges:
        _add_profile(builder, config, network, wanted)
    return config


def _add_profile(builder: Any, config: Any, network: Any, wanted: Wanted) -> None:
    """Adds one optimization profile for the whole range, tuned for its largest sizes."""
    profile, values = builder.create_optimization_profile(), _inputs(network)
    for position, free in wanted.ranges.items():
        value = values[wanted.inputs[position]]
        smallest, largest = list(value.shape), list(value.shape)
        for dimension, (low, high) in free.items():
            smallest[dimension], largest[dimension] = low, high
        profile.set_shape(value.name, smallest, largest, largest)
    if config.add_optimization_profile(profile) < 0:
        raise ExportError(f"{_required(wanted)}, required a range that an optimization profile takes{_last()}")


def _timing(config: Any, library: Library) -> bytes:
    """Returns the timing cache. TensorRT for RTX times nothing when it builds."""
    cache = None if library is RTX else config.get_timing_cache()
    return bytes(cache.serialize()) if cache is not None else b""


def _layers(network: Any, origins: Mapping[str, str]) -> tuple[Mapping[str, Any], ...]:
    """Returns the network's layers in order: name, kind, results, and the operator that each comes from."""
    rows = []
    for layer in map(network.get_layer, range(network.num_layers)):
        results = [layer.get_output(index) for index in range(layer.num_outputs)]
        node = _NODE.search(layer.metadata or "")
        rows.append(
            {
                "name": layer.name,
                "kind": layer.type.name,
                "outputs": [[value.dtype.name, list(value.shape)] for value in results],
                "operator": origins.get(node[1]) if node else None,
            }
        )
    return tuple(rows)


# -- what TensorRT says --

_HINT = "Compile the component with another backend, or leave it out of `compile`"


def _unparsed(library: Library, trt: Any, errors: Sequence[Any], origins: Mapping[str, str]) -> str:
    """Returns the operations that the parser cannot take, with the operators that they come from."""
    refusals = []
    for error in errors:
        kind, node = error.node_operator(), error.node_name()
        what = f"{kind} ({node})" if kind else "the model"
        origin = f", which comes from {origins[node]}" if node in origins else ""
        reason = _short(error.desc())
        refusals.append(
            f"cannot take {what}{origin}: {error.code().name}" + (f", {reason}" if reason != "false" else "")
        )
    reasons = "; ".join(dict.fromkeys(refusals)) or "cannot parse the model"
    return f"{library.title} {trt.__version__} {reasons}. {_HINT}"


def _refusal(library: Library, trt: Any, wanted: Wanted) -> str:
    """Returns the builder's message with the operator of the node that it named, and the free sizes."""
    said, origins = _SAID[0] if _SAID else "without a reason", wanted.origins
    sizes = f" for {_required(wanted)}, required a range that it takes" if wanted.ranges else ""
    named = sorted((node for node in origins if re.search(rf"\b{re.escape(node)}\b", said)), key=len)
    origin = f" (it names {named[-1]}, which comes from {origins[named[-1]]})" if named else ""
    return f"{library.title} {trt.__version__} builds no engine{sizes}: {_short(said)}{origin}. {_HINT}"


def _required(wanted: Wanted) -> str:
    """Returns the free sizes in words."""
    rows = (
        f"{low} to {high} in dimension {dimension} of {wanted.inputs[position]}"
        for position, free in wanted.ranges.items()
        for dimension, (low, high) in free.items()
    )
    return f"sizes found {', '.join(rows)}"


def _last() -> str:
    return f": {_short(_SAID[0])}" if _SAID else ""


def _short(text: str) -> str:
    """Returns the first line, without the place in TensorRT's own source."""
    line = text.strip().partition("\n")[0]
    return re.sub(r"\s*In \w+ at /_src\S*\)?\s*$", "", line).rstrip(". )")[:400]
