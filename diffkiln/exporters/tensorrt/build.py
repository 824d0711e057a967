"""Lower a region to an engine of TensorRT, by way of the same ONNX that the backend `onnx` writes.

    Program ──interpreter──▶ torch.export ──torch.onnx──▶ engine.onnx ──parser──▶ strongly typed network ──▶ engine.trt

Weights are inputs of the engine, as everywhere, unless `"weights": "engine"` has it hold them: they then take the place
of the network's inputs, and can be streamed from host memory within a budget. The model beside the engine is the very
one that it was built from, so that another runtime can show what it computes; it holds no weights in either case.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from diffkiln.bundle.tensorrt import ENGINE, FACTS, LAYERS, TIMING, Library
from diffkiln.errors import ExportError, MissingDependency
from diffkiln.exporters._onnx.needs import exporting_tools
from diffkiln.exporters._onnx.writing import write_model
from diffkiln.exporters.artefact import Artefact, Lowering
from diffkiln.exporters.base import input_specs
from diffkiln.exporters.cache import EngineCache
from diffkiln.exporters.held import digest_of, held_weights
from diffkiln.exporters.tensorrt.check import Tensorrt, library_for
from diffkiln.exporters.tensorrt.network import Engine, Wanted, build_engine
from diffkiln.spec.targets import Target


def build(lowering: Lowering, folder: Path, cache: EngineCache) -> Artefact:
    library = library_for(lowering.target.capability)
    trt = _imported(library)
    _check_gpu(library, lowering.target)
    written = write_model(lowering, folder)
    weights, budget = _weights(lowering), _budget(lowering)
    wanted = Wanted(
        written.inputs,
        lowering.target.capability,
        _ranges(lowering),
        weights,
        budget is not None,
        written.origins,
    )
    engine = build_engine(trt, library, folder, wanted)
    facts = {
        "library": library.module,
        "version": trt.__version__,
        "sm": lowering.target.sm,
        "bytes": len(engine.data),
        "inputs": engine.inputs,
        "outputs": engine.outputs,
        "holds_weights": bool(weights),
        "weight_budget": budget,
    }
    _write(folder, engine, facts)
    return Artefact(
        Tensorrt.name,
        folder,
        input_specs(lowering.region),
        written.outputs,
        dict(lowering.options),
        {"sm": str(lowering.target.sm)},
        packages={library.package: f"=={trt.__version__}"},
        exact=True,
    )


def _write(folder: Path, engine: Engine, facts: Mapping[str, Any]) -> None:
    (folder / ENGINE).write_bytes(engine.data)
    (folder / FACTS).write_text(json.dumps(facts, indent=1, sort_keys=True) + "\n")
    (folder / LAYERS).write_text("[\n" + ",\n".join(map(json.dumps, engine.layers)) + "\n]\n")
    if engine.timing:
        (folder / TIMING).write_bytes(engine.timing)


def tools(lowering: Lowering) -> dict[str, str]:
    """Returns what decides an engine's bytes besides region, target and options: versions, and the weights that it
    holds.

    Raises:
        MissingDependency: names the package and what installs it.
    """
    library = library_for(lowering.target.capability)
    found = exporting_tools() | {library.module: _imported(library).__version__}
    if weights := _weights(lowering):
        found |= {"weights": digest_of(weights), "weight_budget": str(_budget(lowering))}
    return found


def _imported(library: Library) -> Any:
    try:
        return import_module(library.module)
    except ImportError as error:
        raise MissingDependency(
            f"the backend tensorrt needs {library.title}: found no package {library.package}, required for this target "
            f"({error}). {library.install}"
        ) from None


def _check_gpu(library: Library, target: Target) -> None:
    """Checks that the target's GPU is here. TensorRT times kernels on it; TensorRT for RTX needs none.

    Raises:
        ExportError: this machine's GPU is another, or there is none.
    """
    if target.capability in library.portable:
        return
    found = torch.cuda.get_device_capability() if torch.cuda.is_available() else None
    if found != target.capability:
        here = f"sm_{found[0]}{found[1]}" if found else "no CUDA GPU"
        raise ExportError(
            f"GPU to build on: found {here}, required {target.sm} ({target.name}), since {library.title} times kernels "
            "on the GPU itself. Compile on such a machine, or choose another backend"
        )


def _ranges(lowering: Lowering) -> dict[int, dict[int, tuple[int, int]]]:
    """Returns the free sizes, by input and dimension."""
    found: dict[int, dict[int, tuple[int, int]]] = {}
    for (position, dimension), ends in (lowering.family.ranges if lowering.family else {}).items():
        found.setdefault(position, {})[dimension] = ends
    return found


def _weights(lowering: Lowering) -> dict[int, torch.Tensor]:
    """Returns the weights that the engine is to hold, by the position of the input that each replaces.

    Raises:
        ExportError: one is missing.
    """
    return held_weights(lowering) if lowering.options.get("weights") == "engine" else {}


def _budget(lowering: Lowering) -> int | None:
    """Returns how many bytes of its own weights stay on the GPU, by options or the target's memory; None for all."""
    total = sum(tensor.nbytes for tensor in _weights(lowering).values())
    stated = lowering.options.get("weight_budget")
    if stated is None:
        return planned_budget(lowering.target.memory_bytes, total)
    return stated if stated < total else None


def planned_budget(memory: int | None, weights: int) -> int | None:
    """Returns how many bytes of an engine's own weights stay on the GPU; None if all do.

    A quarter of the memory is left to activations, to the two buffers that weights are streamed through, and to the
    other components.

    Args:
        memory: of the target's GPU, in bytes; None is not known.
        weights: of the engine, in bytes.
    """
    kept = None if memory is None else memory * 3 // 4
    return kept if kept is not None and weights > kept else None
