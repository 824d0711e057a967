"""Lower a region with torch's AOTInductor: a shared object with the region's fused kernels, for a CPU or a GPU.

    Program ──interpreter──▶ torch.export ──Inductor──▶ C++ ──toolchain──▶ engine.so

The region is traced with fake tensors, so the memory of its weights is never taken. Inductor is told the target's
instruction set and of more threads than most machines have: by default it sizes its buffers for the builder's, and an
engine that meets more threads writes beyond them. What is particular to GPUs is in `gpu`.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from diffkiln.bundle.manifest import TensorSpec
from diffkiln.errors import DiffkilnError, ExportError
from diffkiln.exporters import toolchain
from diffkiln.exporters.aot_inductor import gpu
from diffkiln.exporters.aot_inductor.attention import explicit_attention
from diffkiln.exporters.aot_inductor.check import AotInductor
from diffkiln.exporters.aot_inductor.host import host_options
from diffkiln.exporters.artefact import Artefact, Lowering
from diffkiln.exporters.base import input_specs
from diffkiln.exporters.cache import EngineCache
from diffkiln.exporters.cuda import gpu_is_here
from diffkiln.exporters.tracing import examples, layouts, traced
from diffkiln.interpreter.attention import kernel_for
from diffkiln.interpreter.gpu_decompositions import gpu_decompositions
from diffkiln.interpreter.inductor import INDUCTOR, host_settings, quiet
from diffkiln.program.convolutions import heavy_weights

#: Bytes that a build may take: sources, objects, and the precompiled headers that builds share.
_ROOM = 512 * 2**20


def tools(lowering: Lowering) -> dict[str, str]:
    found = {"torch": torch.__version__, "compiler": toolchain.find_compiler().version}
    if _keeps_layout(lowering):
        found["layout"] = "kept"
    return found | (gpu.gpu_tools(lowering.target) if lowering.target.device == "cuda" else {})


def build(lowering: Lowering, folder: Path, cache: EngineCache) -> Artefact:
    target, compiler = lowering.target, toolchain.find_compiler()
    for each in (folder, cache.toolchain):
        _require_room(each)
    outputs, files = _generate(lowering, compiler, folder)
    flags = toolchain.Flags.from_inductor(
        compiler, target.isa, _json(files, "_compile_flags.json"), _json(files, "_linker_flags.json")
    )
    work = folder / "build"
    work.mkdir()
    source = _one(files, ".cpp").read_text()
    if target.device == "cuda":
        flags = gpu.gpu_flags(flags, source, folder)
    sources = toolchain.take_apart(source, target.device)
    objects = [file for file in files if file.suffix == ".o"]  # constants, and for a GPU its kernels
    library = toolchain.build(sources, objects, flags, cache.toolchain, work)
    requires, tuned = toolchain.requirements(library), None
    if target.device == "cuda":
        requires |= gpu.gpu_requirements(library, target)
        tuned = gpu_is_here(target)
    directory = _lay_out(library, files, folder / "engine", target.device)
    inputs, options = input_specs(lowering.region), dict(lowering.options)
    return Artefact(AotInductor.name, directory, inputs, outputs, options, requires, autotuned=tuned)


def _require_room(folder: Path) -> None:
    """Checks for disk space first: a disk that fills up later would look like an error of the compiler or of Triton."""
    free = shutil.disk_usage(folder).free
    if free < _ROOM:
        raise ExportError(
            f"building an engine may take {_ROOM} bytes, and there are {free} on the disk of {folder}. Make room, or "
            "set TMPDIR and DIFFKILN_CACHE_DIR to folders on another disk"
        )


def _generate(
    lowering: Lowering, compiler: toolchain.Compiler, scratch: Path
) -> tuple[tuple[TensorSpec, ...], list[Path]]:
    """Returns the outputs' layouts, and the C++ files that Inductor writes for the region."""
    folder = scratch / "inductor"
    options = _options(lowering, compiler, folder / "out")  # before anything stands in for a GPU
    with INDUCTOR, quiet(), torch.no_grad():
        try:
            with _settings(lowering, folder):
                flat, exported = _exported(lowering)
                outputs = layouts(exported, lowering)
                files = torch._inductor.aot_compile(exported.module(), flat, options=options)  # type: ignore[arg-type]
        except DiffkilnError:
            raise
        except Exception as error:
            first = str(error).strip().partition("\n")[0].rstrip(".")
            raise ExportError(
                f"Inductor stopped with {type(error).__name__}: {first}. Leave the component out of `compile`, or "
                "choose another backend"
            ) from error
    if not isinstance(files, list) or not all(isinstance(file, str) for file in files):
        raise ExportError("Inductor did not return the files that it wrote; this torch is not supported")
    return outputs, [Path(str(file)) for file in files]


@contextmanager
def _settings(lowering: Lowering, folder: Path) -> Iterator[None]:
    """Tells Inductor the target inside the `with` block."""
    target = lowering.target
    with host_settings(target.isa, folder):
        if target.device == "cuda":
            with gpu.gpu_settings(target, folder):
                yield
        else:
            with kernel_for(lowering.region):
                yield


def _exported(lowering: Lowering) -> tuple[tuple[torch.Tensor, ...], torch.export.ExportedProgram]:
    if lowering.target.device == "cpu":
        flat = examples(lowering.region)
        return flat, traced(lowering, flat)
    flat = examples(lowering.region, gpu.DEVICE)
    special = {**explicit_attention(lowering.region, lowering.target), **gpu_decompositions(gpu.DEVICE)}
    return flat, traced(lowering, flat, special)


def _options(lowering: Lowering, compiler: toolchain.Compiler, folder: Path) -> dict[str, Any]:
    """Returns Inductor's configuration, as far as this torch has it."""
    import torch._inductor

    target = lowering.target
    given = dict(lowering.options)
    wanted = host_options(target.isa, compiler, folder)
    wanted |= gpu.gpu_options(target, given) if target.device == "cuda" else given
    if _keeps_layout(lowering):
        wanted["layout_optimization"] = False
    known = set(torch._inductor.list_options())
    must = {"aot_inductor.package": True, "aot_inductor.package_cpp_only": True}
    return must | {name: value for name, value in wanted.items() if name in known}


def _keeps_layout(lowering: Lowering) -> bool:
    """Returns True if Inductor leaves the layout of convolutions alone. Measured on CPUs; GPUs keep its own rule."""
    return lowering.target.device == "cpu" and heavy_weights(lowering.region)


def _lay_out(library: Path, files: Sequence[Path], directory: Path, device: str) -> Path:
    """Makes the folder that torch's loader takes for an unpacked package, with only the files that it needs."""
    folder = directory / "data" / "aotinductor" / "model"
    folder.mkdir(parents=True)
    library.rename(folder / "engine.so")
    (folder / "engine_metadata.json").write_text(json.dumps({"AOTI_DEVICE_KEY": device}) + "\n")
    for file in files:
        if file.name == "engine.wrapper.json":  # calls that have no C engine block
            (folder / "engine.json").write_bytes(file.read_bytes())
        elif file.suffix in (".bin", ".blob") or file.name.startswith("custom_obj"):
            raise ExportError(f"it has constants that cannot be linked in ({file.name}). Make them weights")
    return directory


def _one(files: Sequence[Path], suffix: str) -> Path:
    matching = [file for file in files if file.name.endswith(suffix)]
    if len(matching) != 1:
        raise ExportError(f"Inductor wrote {len(matching)} files *{suffix} where one was expected")
    return matching[0]


def _json(files: Sequence[Path], suffix: str) -> dict[str, Any]:
    return json.loads(_one(files, suffix).read_text())
