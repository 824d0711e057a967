"""Libraries that an engine for a GPU is linked against where the real ones are missing: empty ones of the same names.

An engine states which libraries it needs and which of their functions it calls; all of that is settled where it runs.
The linker looks into a library for its name, and for whether it has the functions. So these have the functions and do
nothing in them: the driver's library everywhere, and torch's library for CUDA where torch is built for CPUs.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

import torch

from diffkiln.exporters import toolchain
from diffkiln.exporters.processes import call

_DRIVER_CALL = re.compile(r"\bcu[A-Z]\w+(?=\()")
#: Those in the headers that every engine includes.
_ALWAYS = ("cuGetErrorString", "cuModuleUnload")

#: Headers of torch's functions for engines, which its builds for CPUs bring as well: those of operators for CUDA, and
#: those of every device, of which the library for CUDA has what stands under a condition.
_INCLUDE = Path(torch.__file__).parent / "include" / "torch" / "csrc" / "inductor" / "aoti_torch"
_OPERATORS, _COMMON = _INCLUDE / "generated" / "c_shim_cuda.h", _INCLUDE / "c" / "shim.h"
_FOR_CUDA = re.compile(r"^#ifdef USE_CUDA$.*?^#endif // USE_CUDA$", re.MULTILINE | re.DOTALL)
_DECLARED = re.compile(r"\bAOTI_TORCH_EXPORT\s+AOTITorchError\s+(aoti_torch_\w+)\(")


def driver_library(compiler: toolchain.Compiler, source: str, folder: Path) -> None:
    """Writes a library in the place of the driver's.

    Args:
        source: the engine's C++, which shows what it calls of the driver.
        folder: is made, and holds the library.
    """
    _write(compiler, folder, "libcuda.so", "libcuda.so.1", {*_ALWAYS, *_DRIVER_CALL.findall(source)})


def torch_library(compiler: toolchain.Compiler, folder: Path) -> None:
    """Writes a library in the place of torch's for CUDA into a folder that is there."""
    _write(compiler, folder, "libtorch_cuda.so", "libtorch_cuda.so", declared())


def declared() -> frozenset[str]:
    """Returns the functions for engines that torch's library for CUDA has, by torch's own headers."""
    guarded = "".join(_FOR_CUDA.findall(_COMMON.read_text()))
    return frozenset(_DECLARED.findall(guarded + _OPERATORS.read_text()))


def _write(compiler: toolchain.Compiler, folder: Path, file: str, name: str, functions: Iterable[str]) -> None:
    folder.mkdir(exist_ok=True)
    source = f"{file}.c"
    (folder / source).write_text("".join(f"void {function}(void) {{}}\n" for function in sorted(functions)))
    how = ["-shared", "-fPIC", "-x", "c", source, f"-Wl,-soname,{name}", "-o", file]
    call([compiler.path, *how], folder, toolchain.plain_environment(), 60)
