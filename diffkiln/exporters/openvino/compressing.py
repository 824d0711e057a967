"""Weights of eight or four bits in an engine of OpenVINO, by NNCF, from the weights alone.

NNCF keeps embeddings and the last layer at eight bits where the others have four.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from contextlib import redirect_stdout
from importlib import metadata
from typing import Any

from diffkiln.bundle.openvino import import_without_telemetry
from diffkiln.errors import ExportError, MissingDependency
from diffkiln.exporters.openvino.check import NNCF, NNCF_INSTALL
from diffkiln.interpreter.quiet import heard

#: Weights of a row that share a scale at four bits, where the spec states no number. It is NNCF's own.
GROUP_SIZE = 128


def compress(model: Any, options: Mapping[str, Any]) -> None:
    """Replaces the weights in a graph of OpenVINO.

    Args:
        model: whose constants are float32.
        options: of the engine, among them `weight_format`, and `group_size` for four bits.

    Raises:
        MissingDependency: NNCF is not installed.
        ExportError: NNCF refuses the graph.
    """
    nncf = _imported()
    for node in model.get_ordered_ops():
        _join_transpose(node)
    settings: dict[str, Any] = {"mode": nncf.CompressWeightsMode.INT8_ASYM}
    if options["weight_format"] == "int4":
        # A row that no group divides has smaller groups, or eight bits.
        fallback = nncf.AdvancedCompressionParameters(group_size_fallback_mode=nncf.GroupSizeFallbackMode.ADJUST)
        settings = {
            "mode": nncf.CompressWeightsMode.INT4_ASYM,
            "group_size": options.get("group_size", GROUP_SIZE),
            "advanced_parameters": fallback,
        }
    with heard(NNCF), redirect_stdout(io.StringIO()):
        try:
            nncf.compress_weights(model, **settings)
        except Exception as error:
            raise ExportError(f"NNCF cannot compress the weights: {error}. Remove weight_format") from error


def _join_transpose(node: Any) -> None:
    """Has a product of matrices transpose its second one, where an operation of its own does: NNCF knows only that."""
    if node.get_type_name() != "MatMul":
        return
    transpose = node.input_value(1).get_node()
    if transpose.get_type_name() != "Transpose":
        return
    weight, order = (transpose.input_value(index).get_node() for index in (0, 1))
    if weight.get_type_name() == "Constant" and list(order.get_data()) == [1, 0]:
        node.set_attribute("transpose_b", not node.get_attributes()["transpose_b"])
        node.input(1).replace_source_output(weight.output(0))


def version() -> str:
    """Returns NNCF's version.

    Raises:
        MissingDependency: it is not installed.
    """
    try:
        return metadata.version(NNCF)
    except metadata.PackageNotFoundError as error:
        raise _missing(error) from None


def _imported() -> Any:
    try:
        return import_without_telemetry(NNCF)
    except ImportError as error:
        raise _missing(error) from None


def _missing(error: ImportError) -> MissingDependency:
    return MissingDependency(f"weight_format needs NNCF ({error}): {NNCF_INSTALL}")
