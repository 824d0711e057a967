"""Lower a region to ONNX with torch's dynamo exporter: one graph, whose weights and constants are inputs.

    Program ──interpreter──▶ torch.export ──torch.onnx──▶ engine.onnx

ONNX Runtime is given the bundle's own weights when it runs, so the file holds the graph and little else. It names no
place, time or version of torch: the same region gives the same bytes. Tensors that the graph itself makes and that
would take it over the 2 GB of a protobuf lie beside it, in `engine.onnx.data`.
"""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from diffkiln.bundle.manifest import TensorSpec
from diffkiln.errors import DiffkilnError, ExportError
from diffkiln.exporters._onnx.decompositions import onnx_decompositions
from diffkiln.exporters.artefact import Lowering
from diffkiln.exporters.tracing import examples, layouts, traced
from diffkiln.guards import forks
from diffkiln.interpreter.aten import in_pairs

MODEL, DATA = "engine.onnx", "engine.onnx.data"
#: The version of ONNX's operators. Later ones are for later runtimes.
OPSET = 21
#: Bytes of a graph's own tensors that may stand in its file: a protobuf ends at 2 GB.
_LIMIT = 2**31 - 2**24

#: torch's exporter keeps registries and sets loggers of the process.
_EXPORTING = forks.Lock()


@dataclass(frozen=True)
class Written:
    """A model on disk: its inputs' names, its outputs' layouts, and by each node's name the operator it comes from."""

    inputs: tuple[str, ...]
    outputs: tuple[TensorSpec, ...]
    origins: Mapping[str, str]


def write_model(lowering: Lowering, folder: Path) -> Written:
    """Writes the region as a model into the folder.

    Raises:
        ExportError: torch's exporter or ONNX's checker refuses it.
    """
    with _EXPORTING, _quiet(), torch.no_grad():
        try:
            flat = tuple(map(in_pairs, examples(lowering.region)))
            exported = traced(lowering, flat, onnx_decompositions(lowering.region))
            program: Any = torch.onnx.export(
                exported,
                (),
                dynamo=True,
                opset_version=OPSET,
                verbose=False,
                optimize=False,
                custom_translation_table=_translations(),
            )
        except DiffkilnError:
            raise
        except Exception as error:
            raise ExportError(_explained(error)) from error
        if len(program.model.graph.inputs) != len(flat):
            raise ExportError(
                f"the graph takes {len(program.model.graph.inputs)} inputs, the region {len(flat)}; this torch is not "
                "supported"
            )
        _fold(program.model)
        _part(program.model.graph)
        origins = {node.name: _origin(node) for node in program.model.graph.all_nodes() if node.name}
        _save(program.model, folder)
        names = tuple(str(value.name) for value in program.model.graph.inputs)
        return Written(names, layouts(exported, lowering), origins)


def _origin(node: Any) -> str:
    """Returns the ATen operator that a node was translated from, as torch's exporter notes it."""
    found = re.search(r"target=torch\.ops\.([\w.]+)", node.metadata_props.get("pkg.torch.onnx.fx_node", ""))
    return found[1] if found else "the graph itself"


def _translations() -> dict[Any, Any]:
    """Returns translations of operators that quantized layers use and torch's exporter does not know."""
    from onnxscript import opset21 as op

    def int_mm(a: Any, b: Any) -> Any:
        return op.MatMulInteger(a, b)

    return {torch.ops.aten._int_mm.default: int_mm}


def _fold(model: Any) -> None:
    """Computes what depends on no input, and drops unused nodes.

    No more than that: onnxscript's rewrites take every number below 1e-8 for zero, also the epsilon of a division. ONNX
    Runtime optimizes the graph for its machine when it loads it.
    """
    from onnxscript import optimizer

    optimizer.fold_constants(model)
    optimizer.remove_unused_nodes(model)


def _part(graph: Any) -> None:
    """Gives each output a value of its own. Outputs are bound by name, so the second of two with one name would stay
    unwritten.
    """
    import onnx_ir

    seen: set[Any] = set()
    for position, value in enumerate(graph.outputs):
        if value in seen:
            reduced = onnx_ir.Value(name=f"{value.name}_{position}", type=value.type, shape=value.shape)
            graph.append(onnx_ir.Node("", "Identity", [value], outputs=[reduced]))
            graph.outputs[position] = reduced
        seen.add(graph.outputs[position])


def _save(model: Any, folder: Path) -> None:
    """Writes a model without traces of where it was made, and checks the written file.

    Raises:
        ExportError: the checker or the shape inference of ONNX refuses it.
    """
    import onnx
    import onnx_ir

    _strip(model)
    path = folder / MODEL
    own = sum(value.const_value.nbytes for value in model.graph.initializers.values() if value.const_value is not None)
    onnx_ir.save(model, path, external_data=DATA if own > _LIMIT else None)
    try:
        onnx.checker.check_model(str(path), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        first = str(error).strip().partition("\n")[0]
        raise ExportError(
            f"onnx.checker refuses the model that torch wrote: {first}. Choose another backend"
        ) from error


def _strip(model: Any) -> None:
    """Removes producer, comments and Python's stack traces from every part of a model."""
    model.producer_name, model.producer_version, model.doc_string = "diffkiln", None, None
    model.metadata_props.clear()
    for graph in (model.graph, *model.functions.values()):
        graph.doc_string = None
        graph.metadata_props.clear()
        for node in graph.all_nodes():
            node.doc_string = None
            node.metadata_props.clear()
            for value in node.outputs:
                value.metadata_props.clear()
    for value in (*model.graph.inputs, *model.graph.initializers.values()):
        value.metadata_props.clear()


def _explained(error: BaseException) -> str:
    """Returns the exporter's message in one line: the operator that it cannot translate, or its own first line."""
    chain: list[BaseException] = []
    at: BaseException | None = error
    while at is not None and at not in chain:
        chain.append(at)
        at = at.__cause__ or at.__context__
    text = "\n".join(str(item) for item in chain)
    if found := re.search(r"No (?:ONNX function|decompositions?) (?:registered|found) for[^']*'([\w.]+)'", text):
        reason = f"ONNX has no operator for {found[1]}, and torch no translation of it"
    else:
        innermost = chain[-1]
        first = str(innermost).strip().partition("\n")[0].partition(" Signature:")[0].rstrip(".")
        operator = re.search(r"aten\.\w+(?:\.\w+)?", text)
        at_operator = f" at {operator[0]}" if operator and operator[0] not in first else ""
        reason = f"torch's exporter stopped{at_operator} with {type(innermost).__name__}: {first}"
    return f"{reason}. Compile the component with aot_inductor, or leave it out of `compile`"


@contextmanager
def _quiet() -> Iterator[None]:
    """Hides torch's and onnxscript's warnings to their own authors, and those about vision packages that are not
    installed.
    """
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            for category in (DeprecationWarning, FutureWarning, UserWarning):
                warnings.simplefilter("ignore", category)
            yield
    finally:
        logger.setLevel(level)
