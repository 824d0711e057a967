"""Lower a region to an engine of TensorRT, by way of the same ONNX that the backend `onnx` writes.

    Program ──interpreter──▶ torch.export ──torch.onnx──▶ engine.onnx ──parser──▶ strongly typed network ──▶ engine.trt

Weights are inputs of the engine, as everywhere, unless `"weights": "engine"` has it hold them: they then take the place
of the network's inputs, and can be streamed from host memory within a budget. The model beside the engine is the very
one that it was built from, so that another runtime can show what it computes; it holds no weights in either case.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar

import torch

from diffkiln.errors import ExportError, MissingDependency, Problem
from diffkiln.exporters.artefact import Artefact, Lowering
from diffkiln.exporters.base import contiguous, engine_inputs, export_once, foreign_operators, unknown_options
from diffkiln.exporters.cache import EngineCache
from diffkiln.exporters.onnx import exporting_tools, write_model
from diffkiln.exporters.tensorrt_network import Engine, Wanted, build
from diffkiln.interpreter.aten import in_pairs
from diffkiln.program import Program
from diffkiln.program.tensorrt import (
    ENGINE,
    FACTS,
    LAYERS,
    OLDEST,
    TIMING,
    Library,
    library_for,
    planned_budget,
    type_problems,
)
from diffkiln.spec.targets import Target

_OPTIONS = ("weights", "weight_budget")
_CAST = "Cast the component to float32, float16 or bfloat16 before it is compiled, or choose another backend."


class Tensorrt:
    """The backend `tensorrt`.

    Options: `weights`, "input" or "engine"; `weight_budget`, the bytes of an engine's own weights that stay on the GPU.
    """

    name: ClassVar[str] = "tensorrt"
    version: ClassVar[int] = 2

    def check(self, region: Program, target: Target, options: Mapping[str, Any]) -> Sequence[Problem]:
        problems = unknown_options(options, _OPTIONS)
        if target.device != "cuda":
            reason = f"TensorRT builds for NVIDIA's GPUs, the target is {target.name}"
            return [*problems, Problem("", reason, "Choose a GPU, or the backend onnx or aot_inductor.")]
        if target.capability < OLDEST:
            least = ".".join(map(str, OLDEST))
            reason = f"compute capability: found {target.compute_capability} ({target.name}), required {least} or later"
            problems.append(Problem("", reason))
        problems += [Problem("", reason, _CAST) for reason in type_problems(region, target.capability)]
        return problems + foreign_operators(region)

    def export(self, lowering: Lowering, cache: EngineCache) -> Artefact:
        return export_once(
            self, lowering, cache, lambda: _tools(lowering), lambda scratch: self._build(lowering, scratch)
        )

    def _build(self, lowering: Lowering, scratch: Path) -> Artefact:
        library = library_for(lowering.target.capability)
        trt = _imported(library)
        _check_gpu(library, lowering.target)
        written = write_model(lowering, scratch)
        weights, budget = _weights(lowering), _budget(lowering)
        wanted = Wanted(
            written.inputs,
            lowering.target.capability,
            _ranges(lowering),
            weights,
            budget is not None,
            written.origins,
        )
        engine = build(trt, library, scratch, wanted)
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
        _write(scratch, engine, facts)
        inputs = tuple(contiguous(type_) for type_ in engine_inputs(lowering.region))
        return Artefact(
            self.name,
            scratch,
            inputs,
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


def _tools(lowering: Lowering) -> dict[str, str]:
    """What decides an engine's bytes beside region, target and options: versions, and the weights that it holds.

    Raises:
        MissingDependency: names the package and what installs it.
    """
    library = library_for(lowering.target.capability)
    tools = exporting_tools() | {library.module: _imported(library).__version__}
    if weights := _weights(lowering):
        digest = hashlib.sha256()
        for position, tensor in weights.items():
            digest.update(f"{position} {tensor.dtype} {tuple(tensor.shape)};".encode())
            digest.update(memoryview(tensor.reshape(-1).view(torch.uint8).numpy().data))
        tools |= {"weights": digest.hexdigest(), "weight_budget": str(_budget(lowering))}
    return tools


def _imported(library: Library) -> Any:
    try:
        return import_module(library.module)
    except ImportError as error:
        raise MissingDependency(
            f"the backend tensorrt needs {library.title}: found no package {library.package}, required for this target "
            f"({error}). {library.install}"
        ) from None


def _check_gpu(library: Library, target: Target) -> None:
    """TensorRT times its kernels, so it builds for the GPU that it runs on. TensorRT for RTX needs none.

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
    """The sizes that are free, by input and dimension."""
    found: dict[int, dict[int, tuple[int, int]]] = {}
    for (position, dimension), ends in (lowering.family.ranges if lowering.family else {}).items():
        found.setdefault(position, {})[dimension] = ends
    return found


def _weights(lowering: Lowering) -> dict[int, torch.Tensor]:
    """By the position of the input whose place each takes, the weights that the engine is to hold.

    Raises:
        ExportError: one is missing.
    """
    if lowering.options.get("weights") != "engine":
        return {}
    region = lowering.region
    if missing := [name for name in region.weights if name not in lowering.weights]:
        raise ExportError(f"the engine is to hold its weights, and {missing[0]} is not given")
    first = len(region.inputs)
    tensors = (in_pairs(lowering.weights[name].detach()).cpu().contiguous() for name in region.weights)
    return dict(enumerate(tensors, first))


def _budget(lowering: Lowering) -> int | None:
    """Bytes of the engine's own weights that stay on the GPU, by the options or the target's memory; None for all."""
    total = sum(tensor.nbytes for tensor in _weights(lowering).values())
    stated = lowering.options.get("weight_budget")
    if stated is None:
        return planned_budget(lowering.target.memory_bytes, total)
    return stated if stated < total else None
