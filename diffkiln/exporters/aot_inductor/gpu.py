"""What AOTInductor is told for an NVIDIA GPU, and what its engines are made of there.

    Inductor ──▶ Triton kernels ──ptxas──▶ cubins ─┐
             └─▶ C++ that calls them ──toolchain───┴──▶ engine.so

The cubins are linked into the engine, so an engine is one file wherever it lies. Kernels are tuned by running them
where the target's GPU is here; where it is not, `absent_gpu` stands for it and their first forms are taken. The engine
asks for the driver's library, which is there where it runs: it is linked against an empty one of the same name. So is
it with torch's library for CUDA, where torch is built for CPUs.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from diffkiln.errors import ExportError
from diffkiln.exporters import toolchain
from diffkiln.exporters.aot_inductor.absent_gpu import absent_gpu
from diffkiln.exporters.aot_inductor.cubins import cubins_of
from diffkiln.exporters.aot_inductor.linking import driver_library, torch_library
from diffkiln.exporters.cuda import (
    DRIVERS,
    cuda_version,
    find_cudart,
    find_headers,
    find_library_headers,
    find_ptxas,
    gpu_is_here,
)
from diffkiln.interpreter.inductor import environment
from diffkiln.spec.targets import Target

#: The device that a region is traced on. An engine runs on whichever it is loaded for.
DEVICE = "cuda:0"

#: Flags that have kernels run to choose between them.
TUNING = ("max_autotune", "coordinate_descent_tuning", "coordinate_descent_check_all_directions")

#: From this compute capability on Triton assembles for an architecture's own features, the `a` of `sm_90a`.
_OWN_FEATURES = (9, 0)


def gpu_tools(target: Target) -> dict[str, str]:
    """Returns what decides an engine's code beyond the compiler: Triton, CUDA, and the GPU that it was tuned on, if
    any.
    """
    import triton  # pyright: ignore[reportMissingImports]

    here = gpu_is_here(target)
    found = {"triton": triton.__version__, "cuda": str(cuda_version())}
    found["tuned on"] = torch.cuda.get_device_name() if here else "nothing"
    # Engines that were built without the GPU before this was so read convolutions from wrong places.
    return found if here else found | {"convolutions": "cuDNN's layout"}


def gpu_options(target: Target, options: Mapping[str, Any]) -> dict[str, Any]:
    """Returns Inductor's configuration on top of the host's, with the caller's flags as far as they apply here."""
    ours = {
        # They are compared in the self-test alone (toolchain).
        "size_asserts": True,
        "aot_inductor.embed_kernel_binary": True,
        "aot_inductor.emit_multi_arch_kernel": False,
        "triton.autotune_at_compile_time": True,
        "triton.unique_kernel_names": True,
    }
    if gpu_is_here(target):
        return ours | dict(options)
    # Whether a product's operands are worth padding is found by timing it.
    return ours | {"shape_padding": False} | {name: value for name, value in options.items() if name not in TUNING}


@contextmanager
def gpu_settings(target: Target, folder: Path) -> Iterator[None]:
    """Gives Inductor and Triton the target's GPU, present or absent, and CUDA's headers, inside the `with` block."""
    from torch.utils import cpp_extension

    headers = find_headers()
    assert headers is not None  # the check says so first
    with ExitStack() as stack:
        # Lines of generated sources, in folders that are gone, would be kept in the code of every kernel.
        # torch 2.11 brings an assembler of its own, which is not the one of Triton's version. Triton 3.9 warns that a
        # later one will not fuse products with sums unless it is told to.
        variables = {"TRITON_DISABLE_LINE_INFO": "1", "TRITON_PTXAS_PATH": str(find_ptxas())}
        variables["TRITON_DEFAULT_FP_FUSION"] = os.environ.get("TRITON_DEFAULT_FP_FUSION", "1")
        stack.enter_context(environment(TRITON_CACHE_DIR=str(folder / "triton"), **variables))
        stack.callback(setattr, cpp_extension, "CUDA_HOME", cpp_extension.CUDA_HOME)
        cpp_extension.CUDA_HOME = str(headers.parent)
        if not gpu_is_here(target):
            stack.enter_context(absent_gpu(target.capability))
        yield


def gpu_flags(flags: toolchain.Flags, source: str, scratch: Path) -> toolchain.Flags:
    """Returns the flags with CUDA's C++ library and its runtime, and with empty libraries for those that are missing.

    Args:
        source: the engine's C++, which shows what it calls of the driver.
        scratch: where the empty libraries come to lie.
    """
    empty = scratch / "empty"
    driver_library(flags.compiler, source, empty)
    if torch.version.cuda is None:
        torch_library(flags.compiler, empty)
    headers = ("-isystem", str(find_library_headers()))
    return replace(flags, compile=(*flags.compile, *headers), link=(f"-L{empty}", *flags.link, str(find_cudart())))


def gpu_requirements(library: Path, target: Target) -> dict[str, str]:
    """Returns what an engine needs of the machine's GPU and driver.

    Raises:
        ExportError: a kernel is for another GPU than the target's.
    """
    wanted = target_sm(target)
    # CUDA 13's assembler marks as an architecture's own only those kernels that use features of it.
    found = sorted({cubin.sm for cubin in cubins_of(library)} - {wanted, target.sm})
    if found:
        raise ExportError(f"its kernels were assembled for {', '.join(found)}, not for {wanted}: this is a fault here")
    cuda = str(cuda_version())
    major = int(cuda.partition(".")[0])
    return {"sm": wanted, "cuda": cuda} | ({"driver": DRIVERS[major]} if major in DRIVERS else {})


def target_sm(target: Target) -> str:
    """Returns the SM of the cubins for a target, such as "sm_89" or "sm_90a"."""
    return f"{target.sm}{'a' if target.capability >= _OWN_FEATURES else ''}"
