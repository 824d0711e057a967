"""Lower a region with torch's AOTInductor: a shared object with the region's fused kernels, for a CPU or a GPU.

    Program ──interpreter──▶ torch.export ──Inductor──▶ C++ ──toolchain──▶ engine.so

The region is traced with fake tensors, so the memory of its weights is never taken. Inductor is told the target's
instruction set and of more threads than most machines have: by default it sizes its buffers for the builder's, and an
engine that meets more threads writes beyond them. What is particular to GPUs is in `aot_inductor_cuda`.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import torch

from diffkiln.bundle.manifest import TensorSpec
from diffkiln.errors import DiffkilnError, ExportError, Problem
from diffkiln.exporters import aot_inductor_cuda as cuda
from diffkiln.exporters import toolchain
from diffkiln.exporters.aot_inductor_host import host_options, isa_problems
from diffkiln.exporters.artefact import Artefact, Lowering
from diffkiln.exporters.attention import explicit_attention
from diffkiln.exporters.base import contiguous, engine_inputs, export_once, foreign_operators, unknown_options
from diffkiln.exporters.cache import EngineCache
from diffkiln.exporters.tracing import examples, layouts, traced
from diffkiln.interpreter.attention import kernel_for
from diffkiln.interpreter.cuda import gpu_is_here
from diffkiln.interpreter.gpu_forms import gpu_forms
from diffkiln.interpreter.inductor import FLAGS, INDUCTOR, quiet, told_host
from diffkiln.program import Input, Op, Program, Ref, TensorType
from diffkiln.program.convolutions import heavy_weights
from diffkiln.spec.targets import Target

_VECTOR = TensorType("float32", (8,))
_SMALLEST = Program(
    "prepare",
    (Input("%x", _VECTOR),),
    (Op("aten.neg.default", (Ref("%x"),), ("%1",)),),
    (Ref("%1"),),
    {"%x": _VECTOR, "%1": _VECTOR},
)

#: Bytes that a build may take: sources, objects, and the precompiled headers that builds share.
_ROOM = 512 * 2**20


class AotInductor:
    """The backend `aot_inductor`. Its options are those of Inductor's flags that diffusers' guides recommend."""

    name: ClassVar[str] = "aot_inductor"
    version: ClassVar[int] = 1

    def check(self, region: Program, target: Target, options: Mapping[str, Any]) -> Sequence[Problem]:
        problems = unknown_options(options, FLAGS) + isa_problems(target)
        if target.device == "cuda":
            problems += cuda.gpu_problems(target)
        return problems + foreign_operators(region)

    def export(self, lowering: Lowering, cache: EngineCache) -> Artefact:
        target = lowering.target

        def tools() -> dict[str, str]:
            found = {"torch": torch.__version__, "compiler": toolchain.find_compiler().version}
            if _keeps_layout(lowering):
                found["layout"] = "kept"
            return found | (cuda.gpu_tools(target) if target.device == "cuda" else {})

        def build(scratch: Path) -> Artefact:
            return self._build(lowering, toolchain.find_compiler(), cache, scratch)

        return export_once(self, lowering, cache, tools, build)

    def prepare(self, target: Target, cache: EngineCache) -> None:
        """Make what all engines for this target share, if it is not there: 20 s that can pass while a model is read.

        It imports Inductor, so a process of its own is a better place for it than a thread.
        """
        self.export(Lowering(_SMALLEST, target), cache)

    def _build(self, lowering: Lowering, compiler: toolchain.Compiler, cache: EngineCache, scratch: Path) -> Artefact:
        target = lowering.target
        for place in (scratch, cache.toolchain):
            _require_room(place)
        outputs, files = _generate(lowering, compiler, scratch)
        flags = toolchain.Flags.from_inductor(
            compiler, target.isa, _json(files, "_compile_flags.json"), _json(files, "_linker_flags.json")
        )
        work = scratch / "build"
        work.mkdir()
        source = _one(files, ".cpp").read_text()
        if target.device == "cuda":
            flags = cuda.gpu_flags(flags, source, scratch)
        sources = toolchain.take_apart(source, target.device)
        objects = [file for file in files if file.suffix == ".o"]  # constants, and for a GPU its kernels
        library = toolchain.build(sources, objects, flags, cache.toolchain, work)
        requires, tuned = toolchain.requirements(library), None
        if target.device == "cuda":
            requires |= cuda.gpu_requirements(library, target)
            tuned = gpu_is_here(target)
        directory = _lay_out(library, files, scratch / "engine", target.device)
        inputs = tuple(contiguous(type_) for type_ in engine_inputs(lowering.region))
        return Artefact(self.name, directory, inputs, outputs, dict(lowering.options), requires, autotuned=tuned)


def _require_room(folder: Path) -> None:
    """A disk that is full in the middle of it would be the compiler's error, or Triton's."""
    free = shutil.disk_usage(folder).free
    if free < _ROOM:
        raise ExportError(
            f"building an engine may take {_ROOM} bytes, and there are {free} on the disk of {folder}. Make room, or "
            "set TMPDIR and DIFFKILN_CACHE_DIR to folders on another disk"
        )


def _generate(
    lowering: Lowering, compiler: toolchain.Compiler, scratch: Path
) -> tuple[tuple[TensorSpec, ...], list[Path]]:
    """The outputs' layouts, and the C++ that Inductor writes for the region with what belongs to it."""
    folder = scratch / "inductor"
    options = _options(lowering, compiler, folder / "out")  # before anything stands in for a GPU
    with INDUCTOR, quiet(), torch.no_grad():
        try:
            with _told(lowering, folder):
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
def _told(lowering: Lowering, folder: Path) -> Iterator[None]:
    """Inductor, told of the target."""
    target = lowering.target
    with told_host(target.isa, folder):
        if target.device == "cuda":
            with cuda.told_gpu(target, folder):
                yield
        else:
            with kernel_for(lowering.region):
                yield


def _exported(lowering: Lowering) -> tuple[tuple[torch.Tensor, ...], torch.export.ExportedProgram]:
    if lowering.target.device == "cpu":
        flat = examples(lowering.region)
        return flat, traced(lowering, flat)
    flat = examples(lowering.region, cuda.DEVICE)
    special = {**explicit_attention(lowering.region, lowering.target), **gpu_forms(cuda.DEVICE)}
    return flat, traced(lowering, flat, special)


def _options(lowering: Lowering, compiler: toolchain.Compiler, folder: Path) -> dict[str, Any]:
    """Inductor's configuration, as far as this torch has it."""
    import torch._inductor

    target = lowering.target
    given = dict(lowering.options)
    wanted = host_options(target.isa, compiler, folder)
    wanted |= cuda.gpu_options(target, given) if target.device == "cuda" else given
    if _keeps_layout(lowering):
        wanted["layout_optimization"] = False
    known = set(torch._inductor.list_options())
    must = {"aot_inductor.package": True, "aot_inductor.package_cpp_only": True}
    return must | {name: value for name, value in wanted.items() if name in known}


def _keeps_layout(lowering: Lowering) -> bool:
    """Whether Inductor leaves the layout of convolutions alone. Measured on CPUs; GPUs keep its own rule."""
    return lowering.target.device == "cpu" and heavy_weights(lowering.region)


def _lay_out(library: Path, files: Sequence[Path], directory: Path, device: str) -> Path:
    """The folder that torch's loader takes for an unpacked package, with what it needs and no more."""
    folder = directory / "data" / "aotinductor" / "model"
    folder.mkdir(parents=True)
    library.rename(folder / "engine.so")
    (folder / "engine_metadata.json").write_text(json.dumps({"AOTI_DEVICE_KEY": device}) + "\n")
    for file in files:
        if file.name == "engine.wrapper.json":  # calls that have no C shim
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
