"""What torch's Inductor is told, whoever calls it: the exporters, and the runtime for what it compiles itself."""

from __future__ import annotations

import inspect
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

from diffkiln.guards import forks

#: Instruction set: (width of Inductor's vectors in bits, its class for them). One bit stands for scalar code.
ISAS = {"x86-64-v2": (1, None), "x86-64-v3": (256, "VecAVX2"), "x86-64-v4": (512, "VecAVX512")}

#: Inductor's configuration, the environment that names its cache and the instruction set are the process's: whoever
#: turns them holds this.
INDUCTOR = forks.Lock()


@contextmanager
def host_settings(isa: str, folder: Path) -> Iterator[None]:
    """Gives Inductor its own cache and the target's vectors, which it would otherwise find by trying compilers.

    Args:
        isa: the host's instruction set; empty for what the machine has.
        folder: of the cache; made where it is not there.
    """
    from torch._inductor import cpu_vec_isa

    if not isa:
        with environment(TORCHINDUCTOR_CACHE_DIR=str(folder)):
            yield
        return
    from torch._inductor.codegen.cpp_wrapper_cpu import CppWrapperCpu

    vectors = ISAS[isa][1]
    isas = [getattr(cpu_vec_isa, vectors)()] if vectors else []
    before = cpu_vec_isa.valid_vec_isa_list
    folder.mkdir(exist_ok=True)
    cpu_vec_isa.valid_vec_isa_list = lambda: isas  # type: ignore[assignment]
    try:
        with environment(TORCHINDUCTOR_CACHE_DIR=str(folder)), declared_once(CppWrapperCpu):
            yield
    finally:
        cpu_vec_isa.valid_vec_isa_list = before


@contextmanager
def declared_once(wrapper: Any) -> Iterator[None]:
    """Makes Inductor's writer of C++ declare the arrays of a shape once for each place that they are written to.

    torch 2.11 identifies a place by the address of a method that is bound anew for every line. Which arrays it takes
    for declared is then chance, and two builds differ. Later versions know the object that the method is bound to.
    """
    original = wrapper.codegen_int_array_var
    if "__self__" in inspect.getsource(original):
        yield
        return

    def codegen_int_array_var(
        self: Any, int_array: str, writeline: Any, known_statically: bool = False, graph: Any = None
    ) -> str:
        writer = getattr(writeline, "__self__", writeline)
        key = int_array, id(writer), known_statically, id(graph) if graph else None
        if key not in self.codegen_int_array_var_cache:
            name = self._codegen_int_array_var_impl(int_array, writeline, known_statically)
            self.codegen_int_array_var_cache[key] = name, writer  # which lives as long as its address is a key
        return self.codegen_int_array_var_cache[key][0]

    with mock.patch.object(wrapper, "codegen_int_array_var", codegen_int_array_var):
        yield


@contextmanager
def environment(**variables: str) -> Iterator[None]:
    """Sets environment variables inside the `with` block."""
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
    """Hides torch's warnings about its own use of deprecated parts."""
    with warnings.catch_warnings():
        for category in (DeprecationWarning, FutureWarning):
            warnings.simplefilter("ignore", category)
        # Rotary embeddings as complex numbers: what it has no code for, it leaves to ATen.
        warnings.filterwarnings("ignore", "Torchinductor does not support code generation for complex operators")
        # Precision is the bundle's `tf32`, not the builder's.
        warnings.filterwarnings("ignore", "TensorFloat32 tensor cores")
        yield
