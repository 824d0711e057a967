"""Lower a region with torch's AOTInductor: a shared object with the region's fused kernels, for the CPU.

    Program ──interpreter──▶ torch.export ──Inductor──▶ C++ ──toolchain──▶ engine.so

The region is traced with fake tensors, so the memory of its weights is never taken. Inductor is told the target's
instruction set and of more threads than most machines have: by default it sizes its buffers for the builder's, and an
engine that meets more threads writes beyond them.
"""

from __future__ import annotations

import json
import os
import threading
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import torch

from diffkiln.attention import kernel_for
from diffkiln.bundle.manifest import TensorSpec
from diffkiln.errors import DiffkilnError, ExportError, Problem
from diffkiln.exporters import toolchain
from diffkiln.exporters.base import Artefact, Lowering, contiguous, engine_inputs, foreign_operators, unknown_options
from diffkiln.exporters.cache import EngineCache, export_once
from diffkiln.exporters.tracing import examples, layouts, traced
from diffkiln.program import Input, Op, Program, Ref, TensorType
from diffkiln.spec.targets import Target

#: Instruction set: (width of Inductor's vectors in bits, its class for them). One bit stands for scalar code.
_ISAS = {"x86-64-v2": (1, None), "x86-64-v3": (256, "VecAVX2"), "x86-64-v4": (512, "VecAVX512")}
_VECTOR = TensorType("float32", (8,))
_SMALLEST = Program(
    "prepare",
    (Input("%x", _VECTOR),),
    (Op("aten.neg.default", (Ref("%x"),), ("%1",)),),
    (Ref("%1"),),
    {"%x": _VECTOR, "%1": _VECTOR},
)

#: Inductor's configuration, the environment that names its cache and the instruction set are the process's.
_INDUCTOR = threading.Lock()


#: Inductor's flags that a caller may set.
FLAGS = (
    "conv_1x1_as_mm",
    "coordinate_descent_check_all_directions",
    "coordinate_descent_tuning",
    "epilogue_fusion",
    "force_fuse_int_mm_with_mul",
    "max_autotune",
)


class AotInductor:
    """The backend `aot_inductor`. Its options are those of Inductor's flags that diffusers' guides recommend."""

    name: ClassVar[str] = "aot_inductor"
    version: ClassVar[int] = 1

    def check(self, region: Program, target: Target, options: Mapping[str, Any]) -> Sequence[Problem]:
        problems = unknown_options(options, FLAGS)
        if target.device != "cpu":
            problems.append(Problem("$.target", "aot_inductor builds for the CPU only", "Choose another backend."))
        elif target.isa not in _ISAS:
            problems.append(Problem("$.target.isa", f"no {target.isa!r} here", f"Choose one of {', '.join(_ISAS)}."))
        elif target.isa == "x86-64-v4" and not torch.cpu._is_avx512_supported():
            problems.append(
                Problem(
                    "$.target.isa",
                    "engines for x86-64-v4 are tried out as they are built, and this machine has no AVX-512",
                    "Build on a machine that has it, or for x86-64-v3.",
                )
            )
        return problems + foreign_operators(region)

    def export(self, lowering: Lowering, cache: EngineCache) -> Artefact:
        def tools() -> dict[str, str]:
            return {"torch": torch.__version__, "compiler": toolchain.find_compiler().version}

        def build(scratch: Path) -> Artefact:
            return self._build(lowering, toolchain.find_compiler(), cache, scratch)

        return export_once(self, lowering, cache, tools, build)

    def prepare(self, target: Target, cache: EngineCache) -> None:
        """Make what all engines for this target share, if it is not there: 20 s that can pass while a model is read.

        It imports Inductor, so a process of its own is a better place for it than a thread.
        """
        self.export(Lowering(_SMALLEST, target), cache)

    def _build(self, lowering: Lowering, compiler: toolchain.Compiler, cache: EngineCache, scratch: Path) -> Artefact:
        isa = lowering.target.isa
        outputs, files = _generate(lowering, compiler, scratch)
        flags = toolchain.Flags.from_inductor(
            compiler, isa, _json(files, "_compile_flags.json"), _json(files, "_linker_flags.json")
        )
        work = scratch / "build"
        work.mkdir()
        sources = toolchain.take_apart(_one(files, ".cpp").read_text())
        library = toolchain.build(sources, [_one(files, ".o")], flags, cache.toolchain, work)
        requires = toolchain.requirements(library)
        directory = _lay_out(library, files, scratch / "engine")
        inputs = tuple(contiguous(type_) for type_ in engine_inputs(lowering.region))
        return Artefact(self.name, directory, inputs, outputs, dict(lowering.options), requires)


def _generate(
    lowering: Lowering, compiler: toolchain.Compiler, scratch: Path
) -> tuple[tuple[TensorSpec, ...], list[Path]]:
    """The outputs' layouts, and the C++ that Inductor writes for the region with what belongs to it."""
    region, isa = lowering.region, lowering.target.isa

    with _INDUCTOR, _quiet(), torch.no_grad(), _told(isa, scratch / "inductor"), kernel_for(region):
        try:
            flat = examples(region)
            exported = traced(lowering, flat)
            outputs = layouts(exported, lowering)
            options = _options(isa, compiler, scratch / "inductor" / "out") | dict(lowering.options)
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


def _options(isa: str, compiler: toolchain.Compiler, folder: Path) -> dict[str, Any]:
    """Inductor's configuration, as far as this torch has it."""
    import torch._inductor

    wanted = {
        "aot_inductor.output_path": str(folder),
        "aot_inductor.model_name_for_generated_files": "engine",
        "aot_inductor.metadata": {},  # Inductor writes into its own default
        "aot_inductor.precompile_headers": False,
        "aot_inductor.enable_line_tables": False,
        "aot_inductor.enable_frame_pointer": False,
        "cpp.cxx": (None, compiler.path),
        "cpp.march": isa,
        "cpp.simdlen": _ISAS[isa][0],
        "cpp.vec_isa_ok": True,
        "cpp.dynamic_threads": False,
        "cpp.threads": toolchain.MAX_THREADS,
        "size_asserts": False,
        "freezing": False,
        "max_autotune": False,
        "max_autotune_gemm": False,
        "fx_graph_cache": False,
        "fx_graph_remote_cache": False,
    }
    known = set(torch._inductor.list_options())
    must = {"aot_inductor.package": True, "aot_inductor.package_cpp_only": True}
    return must | {name: value for name, value in wanted.items() if name in known}


@contextmanager
def _told(isa: str, folder: Path) -> Iterator[None]:
    """Inductor with a cache of its own and the target's vectors, which it would otherwise find by trying compilers."""
    from torch._inductor import cpu_vec_isa

    vectors = _ISAS[isa][1]
    isas = [getattr(cpu_vec_isa, vectors)()] if vectors else []
    before, cache = cpu_vec_isa.valid_vec_isa_list, os.environ.get("TORCHINDUCTOR_CACHE_DIR")
    folder.mkdir()
    cpu_vec_isa.valid_vec_isa_list = lambda: isas  # type: ignore[assignment]
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder)
    try:
        yield
    finally:
        cpu_vec_isa.valid_vec_isa_list = before
        if cache is None:
            del os.environ["TORCHINDUCTOR_CACHE_DIR"]
        else:
            os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what torch warns its own authors of: parts of it that use parts that are deprecated."""
    with warnings.catch_warnings():
        for category in (DeprecationWarning, FutureWarning):
            warnings.simplefilter("ignore", category)
        # Rotary embeddings as complex numbers: what it has no code for, it leaves to ATen.
        warnings.filterwarnings("ignore", "Torchinductor does not support code generation for complex operators")
        yield


def _lay_out(library: Path, files: Sequence[Path], directory: Path) -> Path:
    """The folder that torch's loader takes for an unpacked package, with what it needs and no more."""
    folder = directory / "data" / "aotinductor" / "model"
    folder.mkdir(parents=True)
    library.rename(folder / "engine.so")
    (folder / "engine_metadata.json").write_text(json.dumps({"AOTI_DEVICE_KEY": "cpu"}) + "\n")
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
