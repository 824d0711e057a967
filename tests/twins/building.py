"""Writes twins: `python -m tests.twins.building FOLDER CASE...`. Each case gets a folder.

    failed           only where it failed: why

engine/          what torch's loader takes: the twin's library
model.cpp ...    what the library is made of, so that a mistake can be made in it (tests/twins/mistakes.py)
kernels/*.py     the engine's Triton kernels as Inductor wrote them
case.pickle      a `Written` (tests/twins/written.py)
"""

from __future__ import annotations

import json
import pickle
import shutil
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import tests  # noqa: F401  (says how torch is to compute, before torch is imported)
from diffkiln.exporters import toolchain
from diffkiln.exporters.aot_inductor import absent_gpu, build
from diffkiln.exporters.aot_inductor.attention import gpu_kernel
from diffkiln.exporters.aot_inductor.cubins import cubins_of
from diffkiln.exporters.artefact import Lowering
from diffkiln.interpreter.quiet import quiet_libraries
from diffkiln.program import SDPA, Op, Program
from diffkiln.program.attention import read_attention
from diffkiln.spec import TARGETS, Target
from tests.exporters.regions import engine_cache
from tests.twins.cases import CASES, Case
from tests.twins.translating import flags, translated
from tests.twins.written import Attention, Kernel, Written


def without_cudnns_layout() -> AbstractContextManager[object]:
    """Leaves out what gives convolutions the layout that they have on a GPU."""
    return mock.patch.object(absent_gpu, "_convolutions", return_value=nullcontext())


@contextmanager
def watched(kernels: dict[str, Kernel], folder: Path) -> Iterator[None]:
    """Collects the kernels that are compiled inside the `with` block, and copies their files."""
    from torch._inductor.runtime.triton_heuristics import CachingAutotuner

    keep = CachingAutotuner.save_gpu_kernel

    def save_gpu_kernel(kernel: Any, stream: object, launcher: Any) -> Any:
        name, meta = kernel.inductor_meta["kernel_name"], kernel.triton_meta
        shutil.copy(kernel.filename, folder / f"{name}.py")
        settled = dict(meta["constants"]) | dict(launcher.config.kwargs)
        settled = {_name(key, meta["signature"]): value for key, value in settled.items()}
        told = meta["configs"][0]
        aligned = tuple(place for (place,), facts in told.items() if ["tt.divisibility", 16] in facts)
        kernels[name] = Kernel(f"{name}.py", dict(meta["signature"]), settled, aligned)
        return keep(kernel, stream, launcher)

    with mock.patch.object(CachingAutotuner, "save_gpu_kernel", save_gpu_kernel):
        yield


def _name(key: Any, signature: dict[str, str]) -> str:
    """Returns the name of an argument that is named by its position, or by a tuple of it."""
    if isinstance(key, str):
        return key
    return list(signature)[key[0] if isinstance(key, tuple) else key]


def attentions(region: Program, target: Target) -> tuple[Attention, ...]:
    """Returns the calls of fused attention that a region's engine is to make."""
    found = ((gpu_kernel(op, region.types, target), op) for op in region.ops if op.name == SDPA)
    return tuple(_attention(kernel, op, region) for kernel, op in found if kernel != "native_math")


def _attention(kernel: str, op: Op, region: Program) -> Attention:
    call = read_attention(op)
    query, key = region.types[call.query.name].shape, region.types[call.key.name].shape
    scale = query[-1] ** -0.5 if call.scale is None else call.scale
    return Attention(kernel, query, key, call.causal, scale, call.mask is not None)


def write(case: Case, folder: Path) -> None:
    """Generates a case's engine, and builds its twin."""
    scratch, kernels_folder = folder / "scratch", folder / "kernels"
    scratch.mkdir(parents=True)
    kernels_folder.mkdir()
    target, compiler = TARGETS[case.target], toolchain.find_compiler()
    kernels: dict[str, Kernel] = {}
    began = time.perf_counter()
    with watched(kernels, kernels_folder), nullcontext() if case.cudnns else without_cudnns_layout():
        _, files = build._generate(Lowering(case.region, target, family=case.family), compiler, scratch)
    seconds = time.perf_counter() - began
    source = translated(build._one(files, ".cpp").read_text())
    told = flags(
        compiler, target.isa, build._json(files, "_compile_flags.json"), build._json(files, "_linker_flags.json")
    )
    objects = [Path(shutil.copy(file, folder)) for file in files if file.suffix == ".o"]
    cubins = tuple(sorted({cubin.sm for file in objects for cubin in cubins_of(file)}))
    (folder / "twin.pickle").write_bytes(pickle.dumps(source))
    library(source, objects, told, folder, files)
    constants = {key: case.constants[key] for key in case.region.constants}
    calls = tuple(attentions(member, target) for member in case.members)
    names = tuple(map(str, objects))
    written = Written(case.members, constants, kernels, calls, cubins, names, told, seconds)
    (folder / "case.pickle").write_bytes(pickle.dumps(written))
    shutil.rmtree(scratch)


def library(
    source: toolchain.Sources, objects: Sequence[Path], told: toolchain.Flags, folder: Path, files: Sequence[Path] = ()
) -> None:
    """Compiles and links a twin into the folder's `engine`."""
    work = folder / "work"
    work.mkdir()
    made = toolchain.build(source, objects, told, engine_cache().toolchain, work)
    build._lay_out(made, files, folder / "engine", "cpu")
    shutil.rmtree(work)


def main(folder: Path, names: Sequence[str]) -> None:
    with quiet_libraries():
        for name in names:
            began = time.perf_counter()
            try:
                write(CASES[name](), folder / name)
            except Exception:
                (folder / name).mkdir(exist_ok=True)
                (folder / name / "failed").write_text(traceback.format_exc())
            print(json.dumps({"case": name, "seconds": round(time.perf_counter() - began, 1)}), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
