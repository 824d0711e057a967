"""AOTInductor's C++ into a shared object: fast, for a stated instruction set, and the same bytes wherever it is built.

Left to itself AOTInductor compiles one region in 10 to 20 s on this kind of machine, of which the region's own code
takes one. So the source is taken apart:

    interface   the C entry points and the container's templates: equal for every engine, compiled once
    model       the region's constructor and its sequence of calls, without optimization: it only calls
    kernels     the fused loops, fully optimized

Headers are precompiled once for the two that differ. All of this lies in the cache's `toolchain` folder, by everything
that decides it; the engine's bytes are the same with and without it. Nothing that names the build's place or moment
gets into an engine: no debug data, no build id, relative sources, torch's own folder renamed.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

from diffkiln.bundle.digest import sha256_file
from diffkiln.bundle.native import COMPARE
from diffkiln.errors import ExportError
from diffkiln.exporters.processes import call

_TORCH = Path(torch.__file__).parent
_INTERFACE = _TORCH / "_inductor" / "codegen" / "aoti_runtime" / "interface.cpp"
_MODEL_HEADER = "#include <torch/csrc/inductor/aoti_include/cpu.h>\n"
_MODEL_HEADERS = {"cpu": _MODEL_HEADER, "cuda": _MODEL_HEADER.replace("cpu", "cuda")}
#: Types that the model's calls of its kernels name, and that torch 2.11's header does not bring.
_TYPES = "".join(f"#include <c10/util/{name}.h>\n" for name in ("Float8_e4m3fn", "Float8_e5m2"))
_KERNEL_HEADER = "#include <torch/csrc/inductor/cpp_prefix.h>\n"
#: The model's base class is instantiated with the interface and nowhere else.
_BASE = "namespace torch::aot_inductor {{ {}template class AOTInductorModelBase<AOTInductorModel>; }}\n"

#: AOTInductor's checks of its inputs. They are most of the model's text, run only when an environment variable is set,
#: and leak the inputs that they reject; the runtime has its own.
_CHECK_BODY = re.compile(r"^AOTI_NOINLINE static void check_input_\d+\(.*?^}\n", re.MULTILINE | re.DOTALL)
_CHECK_CALL = re.compile(r"^ *check_input_\d+\(input_handles\);\n", re.MULTILINE)

#: Whether an engine compares the layouts of what it is given and of what torch's kernels give it. AOTInductor asks an
#: environment variable, once for a library. The runtime calls the engine's own function instead, for the self-test.
_COMPARES = re.compile(r"^static bool _check_aoti_runtime_check_inputs_env\(\) \{.*?^}\n", re.MULTILINE | re.DOTALL)
_SWITCH = f"""static bool compares = false;
static bool _check_aoti_runtime_check_inputs_env() {{ return __atomic_load_n(&compares, __ATOMIC_RELAXED); }}
extern "C" __attribute__((visibility("default"))) void {COMPARE}(bool on) {{
    __atomic_store_n(&compares, on, __ATOMIC_RELAXED);
}}
"""

#: Optimization. An engine's call took 15 µs less with the model at -O1, and the model's compilation half as long again;
#: with the interface at -O0 it took 60 µs more.
_INTERFACE_LEVEL, _MODEL_LEVEL, _KERNEL_LEVEL, _WHOLE_LEVEL = "-O1", "-O0", "-O3", "-O1"

#: Loops that run in parallel hold one buffer for each of this many threads, and take no more threads than there are.
#: Inductor parallelizes from 512 elements a thread: with 64 that is the 32768 from which ATen does.
MAX_THREADS = 64
_THREADS = f"num_threads({MAX_THREADS})"

_MINUTES = 30
_SLOTS = threading.BoundedSemaphore(max(1, len(os.sched_getaffinity(0))))


@dataclass(frozen=True)
class Compiler:
    """A C++ compiler: where it is, and the line that it calls itself by."""

    path: str
    version: str


@dataclass(frozen=True)
class Flags:
    """The arguments for the compiler. `target` is the instruction set, by its name for `-march`."""

    compiler: Compiler
    target: str
    compile: tuple[str, ...]
    link: tuple[str, ...]

    @classmethod
    def from_inductor(cls, compiler: Compiler, target: str, compile_: Mapping, link: Mapping) -> Flags:
        """Returns the flags that AOTInductor writes beside its source, except those that this module decides."""
        ours = ("march=", "mcpu=", "O", "g1", "gline", "shared")
        flags = [f"-D{name.strip()}" for name in compile_["definitions"]]
        flags += [f"-{flag}" for flag in compile_["cflags"] if not flag.startswith(ours)]
        flags += [f"-I{folder}" for folder in compile_["include_dirs"]]
        flags += [word for words in compile_["passthrough_args"] for word in words.split()]
        flags += [f"-march={target}", "-g0", "-w", "-frandom-seed=diffkiln", f"-ffile-prefix-map={_TORCH}=torch"]
        links = [f"-L{folder}" for folder in link["libraries_dirs"]] + [f"-l{name}" for name in link["libraries"]]
        return cls(compiler, target, tuple(flags), tuple(links))

    @property
    def key(self) -> str:
        """Decides, with torch's version, what the shared parts are."""
        levels = (_INTERFACE_LEVEL, _MODEL_LEVEL, _KERNEL_LEVEL)
        parts = (self.compiler.version, torch.__version__, sha256_file(_INTERFACE), *levels, *self.compile)
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:32]


@dataclass(frozen=True)
class Sources:
    """A region's C++. `interface` is empty where the source could not be taken apart and `model` is all of it.

    `header` is what the interface and the model begin with. `kernels` is empty where they are a GPU's.
    """

    interface: str
    model: str
    kernels: str
    header: str = _MODEL_HEADER


def find_compiler() -> Compiler:
    """Returns the compiler that `$CXX` names, else g++.

    Raises:
        ExportError: it is not installed or does not run.
    """
    name = os.environ.get("CXX") or "g++"
    path = shutil.which(name)
    if path is None:
        raise ExportError(
            f"building engines needs a C++ compiler, and there is no {name!r} on the PATH. Install g++ "
            "(on Debian and Ubuntu: apt install g++), or set CXX to the compiler to use"
        )
    return Compiler(path, _version(path))


@cache
def _version(path: str) -> str:
    try:
        done = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=60, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        raise ExportError(f"the C++ compiler {path} does not run: {error}. Set CXX to one that does") from error
    return done.stdout.partition("\n")[0].strip()


def take_apart(source: str, device: str = "cpu") -> Sources:
    """Splits the one file that AOTInductor writes. Any unexpected part stays together."""
    header = _MODEL_HEADERS[device]
    source = _CHECK_CALL.sub("", _CHECK_BODY.sub("", source))
    if device == "cuda":
        source = _COMPARES.sub(_SWITCH, source)
    source = source.replace(_THREADS, f"num_threads(std::min({MAX_THREADS}, omp_get_max_threads()))")
    interface = _INTERFACE.read_text().strip("\n")
    head, found, body = source.partition(interface)
    model, kernel_header, kernels = body.partition(_KERNEL_HEADER)
    if not found or head.strip() != header.strip() or "AOTInductorModel::run_impl(" not in model:
        return Sources("", source, "", header)
    return Sources(
        header + interface + "\n" + _BASE.format(""),
        header + _TYPES + _BASE.format("extern ") + model,
        kernel_header + kernels,
        header,
    )


def build(sources: Sources, objects: Sequence[Path], flags: Flags, shared: Path, scratch: Path) -> Path:
    """Compiles and links.

    Args:
        objects: object files to link in, such as the constants'.
        shared: the folder of what builds share.
        scratch: an empty folder of this build's own, where the result comes to lie.

    Raises:
        ExportError: the compiler's first complaints.
    """
    if not sources.interface:
        (scratch / "model.cpp").write_text(sources.model)
        return _link([_compile(flags, _WHOLE_LEVEL, "model.cpp", scratch), *objects], flags, scratch)
    parts = _Shared(shared / flags.key, flags, sources.header)
    (scratch / "model.cpp").write_text(sources.model)
    (scratch / "kernels.cpp").write_text(sources.kernels)
    with ThreadPoolExecutor(3) as pool:
        interface = pool.submit(parts.interface, sources.interface)
        model = pool.submit(lambda: _compile(flags, _MODEL_LEVEL, "model.cpp", scratch, parts.header("model")))
        kernels = (
            pool.submit(lambda: _compile(flags, _KERNEL_LEVEL, "kernels.cpp", scratch, parts.header("kernels")))
            if sources.kernels
            else None
        )
        compiled = [interface.result(), model.result(), *([kernels.result()] if kernels else [])]
    return _link([*compiled, *objects], flags, scratch)


def requirements(library: Path) -> dict[str, str]:
    """Returns the newest versions of C and C++ runtime symbols that a shared object needs, from its string table.

    A stripped engine's own symbols have no version, so every version in it is needed.
    """
    data = library.read_bytes()
    found = {}
    for name in ("GLIBC", "GLIBCXX", "CXXABI"):
        versions = re.findall(rb"(?<=\0)%s_([0-9.]+)(?=\0)" % name.encode(), data)
        if versions:
            found[name.lower()] = max((v.decode() for v in versions), key=lambda v: [int(n) for n in v.split(".")])
    return found


class _Shared:
    """The files that engines with the same flags share. The first build makes them; others wait for it."""

    def __init__(self, folder: Path, flags: Flags, model_header: str) -> None:
        self.folder = folder
        self.flags = flags
        self._headers = {"model": (model_header, _MODEL_LEVEL), "kernels": (_KERNEL_HEADER, _KERNEL_LEVEL)}
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)

    def header(self, name: str) -> Path | None:
        """Returns the header to include first, precompiled beside it; None for a compiler other than GCC."""
        if "clang" in self.flags.compiler.version:
            return None
        text, level = self._headers[name]
        header = self.folder / f"{name}.h"
        precompiled = header.with_suffix(".h.gch")
        with self._lock(name):
            if not precompiled.exists():
                header.write_text(text)
                made = self._made(f"{name}.h", level, "-x", "c++-header", into=precompiled.name)
                os.replace(made, precompiled)
        return header

    def interface(self, source: str) -> Path:
        """Returns the object file of the interface."""
        digest = hashlib.sha256(source.encode()).hexdigest()[:16]
        ready, stamp = self.folder / f"interface-{digest}.o", self.folder / f"interface-{digest}.sha256"
        with self._lock("interface"):
            if not (ready.exists() and stamp.exists() and stamp.read_text() == sha256_file(ready)):
                (self.folder / "interface.cpp").write_text(source)
                made = self._made("interface.cpp", _INTERFACE_LEVEL, "-c", into=ready.name)
                stamp.write_text(sha256_file(made))
                os.replace(made, ready)
        return ready

    def _made(self, source: str, *how: str, into: str) -> Path:
        made = f"{into}.{os.getpid()}"
        _run(self.flags, [*how, source, "-o", made], self.folder)
        return self.folder / made

    def _lock(self, name: str):
        from filelock import FileLock

        return FileLock(self.folder / f"{name}.lock", timeout=_MINUTES * 60)


def _compile(flags: Flags, level: str, source: str, folder: Path, header: Path | None = None) -> Path:
    target = source.replace(".cpp", ".o")
    arguments = [level, "-c", source, "-o", target]
    if header is not None:
        try:
            _run(flags, ["-include", str(header), *arguments], folder)
            return folder / target
        except ExportError:
            # A damaged precompiled header, most likely; otherwise the plain run says what is wrong.
            _run(flags, arguments, folder)
            header.with_suffix(".h.gch").unlink(missing_ok=True)
            return folder / target
    _run(flags, arguments, folder)
    return folder / target


def _link(objects: Sequence[Path], flags: Flags, folder: Path) -> Path:
    # Everything that is not defined must come from torch or the C++ runtime: a gap shows here, not when it is loaded.
    how = ["-shared", "-fPIC", "-fopenmp", "-s", "-Wl,--build-id=none", "-Wl,-z,defs"]
    command = [flags.compiler.path, *how, *map(str, objects), "-o", "engine.so", *flags.link]
    _call(command, folder)
    return folder / "engine.so"


def _run(flags: Flags, arguments: Sequence[str], folder: Path) -> None:
    _call([flags.compiler.path, *flags.compile, *arguments], folder)


def _call(command: Sequence[str], folder: Path) -> None:
    with _SLOTS:
        call(command, folder, plain_environment(), _MINUTES * 60)


def plain_environment() -> dict[str, str]:
    """Returns an environment for compilers: untranslated messages, and no include paths of the caller."""
    environment = {key: value for key, value in os.environ.items() if key not in ("CPATH", "CPLUS_INCLUDE_PATH")}
    return environment | {"LC_ALL": "C"}
