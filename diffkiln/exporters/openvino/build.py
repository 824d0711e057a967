"""Lower a region to a model of OpenVINO's own form. Where it holds its weights they are part of it.

    Program ──interpreter──▶ torch.export ──torch.onnx──▶ ONNX ──reader──▶ graph + weights ──▶ engine.xml, engine.bin

By way of ONNX, since what torch's exporter lacks is written in other operators for all backends already (complex
numbers, strides), and OpenVINO reads ONNX in its C++ library alone. Its frontend for PyTorch would need all that again,
and is reached through its Python converter, which reports usage. Weights and folded constants become the graph's own
only then, so the 2 GB of a protobuf do not matter.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch

from diffkiln.bundle.digest import sha256_file
from diffkiln.bundle.openvino import FACTS, INSTALL, MODEL, PACKAGE, WEIGHTS, Facts, import_openvino
from diffkiln.bundle.scratch import scratch
from diffkiln.errors import ExportError, MissingDependency
from diffkiln.exporters._onnx.needs import exporting_tools
from diffkiln.exporters._onnx.writing import MODEL as ONNX_MODEL
from diffkiln.exporters._onnx.writing import Written, write_model
from diffkiln.exporters.artefact import Artefact, Lowering
from diffkiln.exporters.base import input_specs
from diffkiln.exporters.cache import EngineCache
from diffkiln.exporters.held import digest_of, held_weights
from diffkiln.exporters.openvino import compressing
from diffkiln.exporters.openvino.check import NNCF, Openvino
from diffkiln.exporters.openvino.comparing import compare
from diffkiln.interpreter.aten import in_pairs

#: Options of an engine that say how its weights are compressed.
_COMPRESSED = frozenset({"weight_format", "group_size"})
_HINT = "Compile the component with another backend, or leave it out of `compile`"


def tools(lowering: Lowering) -> dict[str, str]:
    """Returns what decides an engine's bytes besides region, target and options: versions, and the weights."""
    found = exporting_tools() | {PACKAGE: _version(), "weights": digest_of(_weights(lowering))}
    return found | ({NNCF: compressing.version()} if lowering.options.get("weight_format") else {})


def build(lowering: Lowering, folder: Path, cache: EngineCache) -> Artefact:
    if lowering.family:
        raise ExportError("an engine of OpenVINO is compiled for one size")
    held = _weights(lowering) | _constants(lowering)
    openvino = _imported()
    with scratch("export") as staged:
        written = write_model(lowering, staged)
        model = _read(openvino, staged / ONNX_MODEL, written)
        _hold(openvino, model, {written.inputs[position]: tensor for position, tensor in held.items()})
        _clamp(openvino, model)
        model.set_friendly_name(lowering.region.name)
        _write(openvino, model, folder, written, _uncompressed(lowering))
        if lowering.options.get("weight_format"):
            compressing.compress(model, lowering.options)
            _write(openvino, model, folder, written, lowering)
    return Artefact(
        Openvino.name,
        folder,
        input_specs(lowering.region),
        written.outputs,
        dict(lowering.options),
        packages={PACKAGE: f"=={_version()}"},
    )


def _uncompressed(lowering: Lowering) -> Lowering:
    options = {name: value for name, value in lowering.options.items() if name not in _COMPRESSED}
    return replace(lowering, options=options)


def _write(openvino: Any, model: Any, folder: Path, written: Written, lowering: Lowering) -> None:
    """Writes an engine, and compares it with the replay."""
    _name(model)
    openvino.save_model(model, folder / MODEL, compress_to_fp16=False)
    taken = {item.get_any_name() for item in model.inputs}
    facts = Facts(
        version=_version(),
        digest=_digest(folder),
        sizes=((folder / MODEL).stat().st_size, (folder / WEIGHTS).stat().st_size),
        inputs=tuple(name if name in taken else None for name in written.inputs),
        **lowering.options,
    )
    (folder / FACTS).write_text(facts.model_dump_json(indent=1) + "\n")
    compare(openvino, folder, facts, lowering)


def _version() -> str:
    try:
        return metadata.version(PACKAGE)
    except metadata.PackageNotFoundError:
        raise MissingDependency(f"the backend openvino needs OpenVINO: {INSTALL}") from None


def _imported() -> Any:
    try:
        return import_openvino()
    except ImportError as error:
        raise MissingDependency(f"the backend openvino needs OpenVINO ({error}): {INSTALL}") from None


def _weights(lowering: Lowering) -> dict[int, torch.Tensor]:
    """Returns the weights that the engine is to hold, by the position of the input that each replaces."""
    return held_weights(lowering) if lowering.options.get("weights") == "engine" else {}


def _constants(lowering: Lowering) -> dict[int, torch.Tensor]:
    """Returns the folded constants, by the position of the input that each replaces."""
    region = lowering.region
    first = len(region.inputs) + len(region.weights)
    tensors = (in_pairs(lowering.constants[key]).cpu().contiguous() for key in region.constants)
    return dict(enumerate(tensors, first))


def _read(openvino: Any, path: Path, written: Written) -> Any:
    """Returns an ONNX model as OpenVINO's.

    Raises:
        ExportError: OpenVINO has no form of an operator.
    """
    try:
        return openvino.Core().read_model(path)
    except RuntimeError as error:
        said = str(error)
        named = sorted((node for node in written.origins if node in said), key=len)
        origin = f" (it comes from {written.origins[named[-1]]})" if named else ""
        raise ExportError(
            f"OpenVINO {_version()} cannot read the model: {_last_line(said)}{origin}. {_HINT}"
        ) from error


def _hold(openvino: Any, model: Any, held: Mapping[str, torch.Tensor]) -> None:
    """Replaces inputs of a model by tensors, which must live until the model is saved."""
    for parameter in model.get_parameters():
        tensor = held.get(parameter.output(0).get_any_name())
        if tensor is None:
            continue
        constant = openvino.op.Constant(tensor.numpy(), shared_memory=True)
        parameter.output(0).replace(constant.output(0))
        model.remove_parameter(parameter)
    model.validate_nodes_and_infer_types()


def _clamp(openvino: Any, model: Any) -> None:
    """Brings integers into the range of int32, in which OpenVINO computes them: torch's "to the end" is the last int64.

    OpenVINO 2026.4 takes them for -1 where a kept compilation reads them from the file of weights.
    """
    for node in model.get_ordered_ops():
        if node.get_type_name() != "Constant" or node.get_element_type() != openvino.Type.i64:
            continue
        values, limits = node.get_data(), np.iinfo(np.int32)
        clamped = np.clip(values, limits.min, limits.max)
        if not np.array_equal(values, clamped):
            constant = openvino.op.Constant(clamped, shared_memory=False)
            node.output(0).replace(constant.output(0))


def _name(model: Any) -> None:
    """Names a model's operations by their order. OpenVINO's own names count those of the process."""
    for index, node in enumerate(model.get_ordered_ops()):
        if node.get_type_name() not in ("Parameter", "Result"):
            node.set_friendly_name(f"{node.get_type_name()}_{index}")


def _digest(folder: Path) -> str:
    """Returns the digest of a graph and its weights."""
    return hashlib.sha256(f"{sha256_file(folder / MODEL)} {sha256_file(folder / WEIGHTS)}".encode()).hexdigest()


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:300].rstrip(". ") if lines else "it does not say why"
