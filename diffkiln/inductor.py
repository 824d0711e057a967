"""What torch's Inductor is told, whoever calls it: the exporters, and the runtime for what it compiles itself."""

from __future__ import annotations

import os
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

#: Instruction set: (width of Inductor's vectors in bits, its class for them). One bit stands for scalar code.
ISAS = {"x86-64-v2": (1, None), "x86-64-v3": (256, "VecAVX2"), "x86-64-v4": (512, "VecAVX512")}

#: Inductor's flags that a caller may set.
FLAGS = (
    "conv_1x1_as_mm",
    "coordinate_descent_check_all_directions",
    "coordinate_descent_tuning",
    "epilogue_fusion",
    "force_fuse_int_mm_with_mul",
    "max_autotune",
)

#: Inductor's configuration, the environment that names its cache and the instruction set are the process's: whoever
#: turns them holds this.
INDUCTOR = threading.Lock()


@contextmanager
def told_host(isa: str, folder: Path) -> Iterator[None]:
    """Inductor with a cache of its own and the target's vectors, which it would otherwise find by trying compilers.

    Args:
        isa: the host's instruction set; empty for what the machine has.
        folder: of the cache; made where it is not there.
    """
    from torch._inductor import cpu_vec_isa

    if not isa:
        with environment(TORCHINDUCTOR_CACHE_DIR=str(folder)):
            yield
        return
    vectors = ISAS[isa][1]
    isas = [getattr(cpu_vec_isa, vectors)()] if vectors else []
    before = cpu_vec_isa.valid_vec_isa_list
    folder.mkdir(exist_ok=True)
    cpu_vec_isa.valid_vec_isa_list = lambda: isas  # type: ignore[assignment]
    try:
        with environment(TORCHINDUCTOR_CACHE_DIR=str(folder)):
            yield
    finally:
        cpu_vec_isa.valid_vec_isa_list = before


@contextmanager
def environment(**variables: str) -> Iterator[None]:
    """Environment variables while it lasts."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@contextmanager
def quiet() -> Iterator[None]:
    """Without what torch warns its own authors of: parts of it that use parts that are deprecated."""
    with warnings.catch_warnings():
        for category in (DeprecationWarning, FutureWarning):
            warnings.simplefilter("ignore", category)
        # Rotary embeddings as complex numbers: what it has no code for, it leaves to ATen.
        warnings.filterwarnings("ignore", "Torchinductor does not support code generation for complex operators")
        # Precision is the bundle's `tf32`, not the builder's.
        warnings.filterwarnings("ignore", "TensorFloat32 tensor cores")
        yield
