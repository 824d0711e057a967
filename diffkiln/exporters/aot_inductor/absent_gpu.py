"""A GPU that is not there: what torch's Inductor and Triton ask of one while they compile, answered from numbers.

Compiling needs no GPU. But Inductor asks the driver which GPU it compiles for, loads each kernel to look at it, and
runs it to choose between forms of it. Inside `absent_gpu` it is told what the target's GPU would answer, kernels are
compiled and not loaded, and the first form of each is taken: *nothing is tuned*.

Each stand-in below replaces what one part of torch asks, says why, and puts back what was there. They are the
process's, so whoever enters waits for nobody else to be compiling. They were written against the insides of torch
2.11 to 2.15; one that is gone in another is an error, never left out.
"""

from __future__ import annotations

import ctypes
import functools
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from diffkiln.bundle.scratch import folder_to_run
from diffkiln.errors import ExportError
from diffkiln.exporters import toolchain
from diffkiln.exporters.cuda import cuda_version
from diffkiln.exporters.processes import call

OLDEST, NEWEST = (2, 11), (2, 15)

#: Compute capability: (multiprocessors, threads resident on each, bytes of shared memory that a block may opt in to).
#: The first is of a common card, for Inductor's choice of how far to split reductions. Sources: CUDA C++ Programming
#: Guide, "Technical Specifications per Compute Capability"; NVIDIA's data sheets.
_LIMITS = {
    (7, 5): (40, 1024, 65536),
    (8, 0): (108, 2048, 166912),
    (8, 6): (84, 1536, 101376),
    (8, 9): (128, 1536, 101376),
    (9, 0): (132, 2048, 232448),
    (10, 0): (148, 2048, 232448),
    (10, 3): (148, 2048, 232448),
    (12, 0): (170, 1536, 101376),
}


@dataclass(frozen=True)
class Gpu:
    """Properties of a GPU by the names that torch gives them."""

    major: int
    minor: int
    multi_processor_count: int
    max_threads_per_multi_processor: int
    shared_memory_per_block_optin: int
    name: str = "a GPU that is not there"
    regs_per_multiprocessor: int = 65536
    max_threads_per_block: int = 1024
    warp_size: int = 32
    shared_memory_per_block: int = 49152
    shared_memory_per_multiprocessor: int = 65536
    L2_cache_size: int = 4 * 2**20
    total_memory: int = 16 * 2**30
    is_integrated: int = 0
    gcnArchName: str = ""


def numbers_of(capability: tuple[int, int]) -> Gpu:
    """Returns the numbers of a GPU of this compute capability.

    Raises:
        ExportError: they are not known here.
    """
    if capability not in _LIMITS:
        known = ", ".join(f"{major}.{minor}" for major, minor in _LIMITS)
        raise ExportError(
            f"building without the GPU needs numbers of it, which are known here for compute capability {known}, not "
            f"for {capability[0]}.{capability[1]}. Build on a machine that has the GPU"
        )
    return Gpu(*capability, *_LIMITS[capability])


def torch_problem() -> str:
    """Returns why this torch cannot build for an absent GPU; empty if it can."""
    found = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    if OLDEST <= found <= NEWEST:
        return ""
    oldest, newest = (".".join(map(str, version)) for version in (OLDEST, NEWEST))
    return f"found torch {torch.__version__}, and building without the GPU is written for {oldest} to {newest}"


@contextmanager
def absent_gpu(capability: tuple[int, int]) -> Iterator[None]:
    """Makes this process compile for a GPU of this compute capability, present or not, inside the `with` block.

    Raises:
        ExportError: this torch is none that it was written for, or the GPU's numbers are not known.
    """
    if problem := torch_problem():
        raise ExportError(f"{problem}. Install one of these, or build on a machine that has the GPU")
    gpu = numbers_of(capability)
    with ExitStack() as stack:
        stack.callback(_forget)
        torchs = (_build, _guard, _fake_tensors, _device, _interface, _random_state, _convolutions, _folding)
        for stand_in in (*torchs, _driver, _untuned):
            stack.enter_context(stand_in(gpu))
        _forget()
        yield


@contextmanager
def _build(_: Gpu) -> Iterator[None]:
    """Lets a torch that is built for CPUs name the CUDA of its release's other build, by which Inductor decides."""
    with _replaced(torch.version, cuda=cuda_version()):
        yield


@contextmanager
def _guard(_: Gpu) -> Iterator[None]:
    """Gives a torch that is built for CPUs a device guard for CUDA, without which it makes no fake tensors there."""
    if torch.backends.cuda.is_built():
        yield
        return
    switch = _guard_switch()
    switch(True)
    try:
        yield
    finally:
        switch(False)


@functools.cache
def _guard_switch() -> Callable[[bool], None]:
    """Compiles the guard, and returns what turns it on and off. It stays loaded for the process."""
    torch_home, source = Path(torch.__file__).parent, Path(__file__).with_name("guard.cpp")
    compiler = toolchain.find_compiler()
    what = ["-std=c++20", "-w", "-fPIC", "-shared", f"-I{torch_home / 'include'}", str(source)]
    with tempfile.TemporaryDirectory(prefix="diffkiln-guard-", dir=folder_to_run()) as folder:
        how = [f"-L{torch_home / 'lib'}", "-lc10", "-o", "guard.so"]
        call([compiler.path, *what, *how], Path(folder), toolchain.plain_environment(), 300)
        return ctypes.CDLL(str(Path(folder) / "guard.so")).diffkiln_guard


@contextmanager
def _fake_tensors(_: Gpu) -> Iterator[None]:
    """Stops fake tensors from asking for a GPU and moving constants to it."""
    from torch._subclasses import fake_tensor

    with (
        _replaced(fake_tensor.FakeTensorMode, avoid_device_init=property(lambda _: True)),
        _replaced(fake_tensor, init_gpu_context=lambda device: None),
    ):
        yield


@contextmanager
def _device(gpu: Gpu) -> Iterator[None]:
    """Answers for `torch.cuda`, which Inductor and export ask for the device and make current before they compile."""
    with _replaced(
        torch.cuda,
        _lazy_init=lambda: None,
        is_available=lambda: True,
        device_count=lambda: 1,
        current_device=lambda: 0,
        set_device=lambda device: None,
        synchronize=lambda device=None: None,
        get_device_properties=lambda device=None: gpu,
        get_device_capability=lambda device=None: (gpu.major, gpu.minor),
        is_bf16_supported=lambda *_, **__: gpu.major >= 8,
        _exchange_device=lambda device: 0,
        _maybe_exchange_device=lambda device: 0,
    ):
        yield


@contextmanager
def _interface(gpu: Gpu) -> Iterator[None]:
    """Answers for Dynamo's table of devices, which keeps functions of `torch.cuda`."""
    from torch._dynamo.device_interface import CudaInterface

    answers: dict[str, Callable[..., Any]] = {
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "synchronize": lambda device=None: None,
        "get_device_properties": lambda device=None: gpu,
        "is_bf16_supported": lambda *_, **__: gpu.major >= 8,
        "exchange_device": lambda device: 0,
        "maybe_exchange_device": lambda device: 0,
    }
    worker = {name: staticmethod(answers[name]) for name in ("current_device", "get_device_properties")}
    with (
        _replaced(CudaInterface, **{name: staticmethod(answer) for name, answer in answers.items()}),
        _replaced(CudaInterface.Worker, **worker),
    ):
        yield


@contextmanager
def _random_state(_: Gpu) -> Iterator[None]:
    """Replaces the GPU's random state, which tracing saves and restores."""
    with _replaced(
        torch.cuda, get_rng_state=lambda device=None: torch.empty(0), set_rng_state=lambda state, device=None: None
    ):
        yield


@contextmanager
def _convolutions(_: Gpu) -> Iterator[None]:
    """Gives the results of convolutions the layout that cuDNN gives them on a GPU.

    Where torch finds no GPU, it finds no cuDNN for bfloat16 either, and takes the results for contiguous. On a GPU
    cuDNN keeps the channels last that Inductor gives it: the engine would read values from wrong places.
    Source: torch 2.13, aten/src/ATen/native/ConvUtils.h, cudnn_conv_suggest_memory_format.
    """
    from torch._prims_common import suggest_memory_format

    recorded = torch._C._conv_determine_backend_memory_format

    def layout(input: torch.Tensor, weight: torch.Tensor, backend: Any) -> torch.memory_format:
        if input.device.type != "cuda":
            return recorded(input, weight, backend)
        last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(weight.ndim)
        known = torch.float64 not in (input.dtype, weight.dtype)
        if known and last in (suggest_memory_format(input), suggest_memory_format(weight)):
            return last
        return torch.contiguous_format

    with _replaced(torch._C, _conv_determine_backend_memory_format=layout):
        yield


@contextmanager
def _folding(_: Gpu) -> Iterator[None]:
    """Computes tensors of one value on the CPU. Inductor computes one element of each on the GPU, to fold them."""
    from torch._inductor.fx_passes.joint_graph import UniformValueConstantFolder
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_map_only

    class OnTheHost(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            args, kwargs = tree_map_only(torch.device, lambda _: torch.device("cpu"), (args, kwargs or {}))
            return func(*args, **kwargs)

    def on_the_host(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            with OnTheHost():
                return function(*args, **kwargs)

        return call

    folder = UniformValueConstantFolder
    moved = {"__init__": on_the_host(folder.__init__), "_deduce_value": on_the_host(folder._deduce_value)}
    with _replaced(folder, **moved):
        yield


@contextmanager
def _driver(gpu: Gpu) -> Iterator[None]:
    """Stands in for Triton's driver, which Inductor looks for, and which is asked for the target and loads code."""
    from torch._inductor.runtime import triton_helpers
    from triton.backends.compiler import GPUTarget  # pyright: ignore[reportMissingImports]
    from triton.runtime import driver  # pyright: ignore[reportMissingImports]

    properties = {
        "max_shared_mem": gpu.shared_memory_per_block_optin,
        "multiprocessor_count": gpu.multi_processor_count,
    }
    stand_in = SimpleNamespace(
        get_current_target=lambda: GPUTarget("cuda", gpu.major * 10 + gpu.minor, gpu.warp_size),
        get_current_device=lambda: 0,
        get_current_stream=lambda device=None: 0,
        get_active_torch_device=lambda: torch.device("cuda", 0),
        launcher_cls=lambda source, metadata: None,
        utils=SimpleNamespace(
            # Module, function, registers, spilled registers, most threads of a block: nothing is loaded.
            load_binary=lambda name, kernel, shared, device: (None, None, 0, 0, gpu.max_threads_per_block),
            get_device_properties=lambda device: properties,
        ),
    )
    with _replaced(driver, _active=stand_in), _replaced(triton_helpers, set_driver_to_gpu=lambda: None):
        yield


@contextmanager
def _untuned(_: Gpu) -> Iterator[None]:
    """Takes the first form of each kernel, since there is no GPU to time the forms on.

    Inductor would run each kernel on random data to choose its form. It also compiles in other processes, where these
    stand-ins would be missing.
    """
    from torch._inductor.async_compile import AsyncCompile
    from torch._inductor.codegen.wrapper import PythonWrapperCodegen
    from torch._inductor.runtime.triton_heuristics import CachingAutotuner, NoTritonConfigsError

    first = _first_that_compiles(CachingAutotuner._precompile_worker, NoTritonConfigsError)
    with (
        _replaced(AsyncCompile, use_process_pool=classmethod(lambda _: False)),
        _replaced(PythonWrapperCodegen, generate_and_run_autotune_block=_keep_first_forms),
        _replaced(CachingAutotuner, _precompile_worker=first),
    ):
        yield


def _keep_first_forms(wrapper: Any) -> None:
    """Compiles kernels instead of running them, and keeps their code. Their definitions compile them."""
    from torch._inductor.runtime.triton_heuristics import CachingAutotuner

    scope: dict[str, Any] = {}
    exec(f"{wrapper.kernel_autotune_defs.getvalue()}\nasync_compile.wait(globals())\n", scope)
    for kernel in scope.values():
        if isinstance(kernel, CachingAutotuner):
            if not kernel.launchers:
                kernel.precompile()
            kernel.save_gpu_kernel(0, kernel.launchers[0])


def _first_that_compiles(compile_all: Callable[[Any], None], none: type[Exception]) -> Callable[[Any], None]:
    """Returns a function that compiles forms until one succeeds; `none` is raised if no form compiles."""

    def compile_first(kernel: Any) -> None:
        decompositions = kernel.configs
        if kernel.compile_results or not decompositions:
            return compile_all(kernel)
        for storage in decompositions[:-1]:
            kernel.configs = [storage]
            try:
                return compile_all(kernel)
            except none:
                continue
        kernel.configs = [decompositions[-1]]
        return compile_all(kernel)

    return compile_first


@contextmanager
def _replaced(owner: Any, **attributes: Any) -> Iterator[None]:
    """Replaces attributes of a module, class or object inside the `with` block.

    Raises:
        ExportError: one of them is not there to be replaced.
    """
    with ExitStack() as stack:
        for name, value in attributes.items():
            if name not in vars(owner):
                what = getattr(owner, "__name__", type(owner).__name__)
                raise ExportError(
                    f"torch {torch.__version__} has no {what}.{name}, which stands for the GPU that is not there. "
                    "Build on a machine that has the GPU"
                )
            stack.callback(setattr, owner, name, vars(owner)[name])
            setattr(owner, name, value)
        yield


#: Modules whose cached functions look at the GPU, and at nothing that is dear to find out again.
_LOOKED = (
    "torch._inductor.codegen.cuda.cuda_env",
    "torch._inductor.runtime.hints",
    "torch._inductor.utils",
    "torch.utils._triton",
    "triton.compiler.compiler",
)
_CACHED = type(functools.lru_cache(lambda: None))


def _forget() -> None:
    """Drops what functions remember of the GPU: before, of the machine's own; afterwards, of the absent one."""
    from torch._dynamo import device_interface
    from torch._inductor.codecache import CacheBase, CudaKernelParamCache
    from torch._subclasses.fake_tensor import FakeTensorMode

    FakeTensorMode.cache_clear()  # layouts of convolutions among others, which a dry run may have asked for
    device_interface.caching_worker_device_properties.clear()
    device_interface.caching_worker_current_devices.clear()
    CudaKernelParamCache.cache_clear()
    CacheBase.get_system.cache_clear()
    for name in _LOOKED:
        module = sys.modules.get(name)
        values = list(vars(module).values()) if module else []
        methods = [method for value in values if isinstance(value, type) for method in vars(value).values()]
        for value in (*values, *methods):
            function = getattr(value, "__func__", value) if isinstance(value, (staticmethod, classmethod)) else value
            if isinstance(function, _CACHED):
                function.cache_clear()
