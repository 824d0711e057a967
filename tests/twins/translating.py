"""An engine's C++ for a GPU as C++ for the CPU: the same calls, with what `stand_in.h` has in the place of CUDA."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from diffkiln.exporters import toolchain

_STAND_IN = Path(__file__).parent / "stand_in.h"

_HEADERS = ("aoti_include/cuda.h", "aoti_include/cpu.h")
#: The functions that load and launch kernels by CUDA's driver.
_DRIVER = re.compile(r"^#define CUDA_DRIVER_CHECK\(EXPR\).*?(?=^CACHE_TORCH_)", re.MULTILINE | re.DOTALL)

#: (pattern, replacement). The first kinds are in every engine, the others in some.
_EVERYWHERE = (
    (r"\bcached_torch_device_type_cuda\b", "cached_torch_device_type_cpu"),
    (r"\bCACHE_TORCH_DEVICE\(cuda\)", "CACHE_TORCH_DEVICE(cpu)"),
    (r"reinterpret_cast<CUdeviceptr>\((\w+)\.data_ptr\(\)\)", r"twin_pointer(\1)"),
    (r", &kernels_\.loaded_modules_\)", ")"),
)
_SOMEWHERE = (
    (r"\baoti_torch_empty_strided\(", "twin_empty("),
    (r"\baoti_torch_cuda__scaled_dot_product_(flash|cudnn|efficient)_attention\(", r"twin_\1_attention("),
    (r"\baoti_torch_cuda_", "aoti_torch_cpu_"),
)
#: Of the linker's and the compiler's words, those that are CUDA's.
_CUDAS = ("USE_CUDA", "cuda", "torch_cuda")


def translated(source: str) -> toolchain.Sources:
    """Returns the C++ of an engine's twin. Fails where the engine's is not as expected."""
    sources = toolchain.take_apart(source, "cuda")
    assert sources.interface, "the engine's source was not taken apart"
    assert not sources.kernels, "an engine for a GPU has loops for the CPU"
    model, drivers = _DRIVER.subn("", sources.model.replace(*_HEADERS))
    assert drivers == 1
    for pattern, text in _EVERYWHERE:
        model, count = re.subn(pattern, text, model)
        assert count, f"the engine has no {pattern}"
    for pattern, text in _SOMEWHERE:
        model = re.sub(pattern, text, model)
    header = sources.header.replace(*_HEADERS)
    model = model.replace(header, f'{header}#include "{_STAND_IN}"\n', 1)
    return replace(sources, interface=sources.interface.replace(*_HEADERS), model=model, header=header)


def flags(
    compiler: toolchain.Compiler, isa: str, compile_: Mapping[str, Any], link: Mapping[str, Any]
) -> toolchain.Flags:
    """Returns what Inductor tells the compiler, without CUDA."""
    kept = {
        key: [word for word in words if word.strip() not in _CUDAS and "/nvidia/" not in word]
        for key, words in (*compile_.items(), *link.items())
        if isinstance(words, list)
    }
    return toolchain.Flags.from_inductor(compiler, isa, compile_ | kept, link | kept)
