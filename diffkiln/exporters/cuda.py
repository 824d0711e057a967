"""What building for an NVIDIA GPU needs of this machine: an assembler, headers and CUDA's runtime; not the GPU.

All of it comes with pip. Torch's build with CUDA brings CUDA's runtime, and Triton brings ptxas and the headers. Where
torch is built for CPUs, engines are for the build with CUDA of the same release, if that build is known here.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

import torch

from diffkiln.bundle.versions import numbers
from diffkiln.errors import Problem
from diffkiln.spec.targets import Target

#: The lowest driver that runs code of a CUDA major version, whatever its minor. Source: CUDA Compatibility, "Minor
#: Version Compatibility".
DRIVERS = {12: "525.60.13", 13: "580.65.06"}


@dataclass(frozen=True)
class Build:
    """A release of torch as it is built with CUDA: the CUDA, and the version of Triton that it asks for."""

    cuda: str
    triton: str


#: Release of torch: its build with CUDA that package registries have. Source: METADATA of the release's wheel. What its
#: libraries export has been compared with what engines call (tests/exporters/aot_inductor/exports.txt, tests/cross).
BUILDS: Mapping[str, Build] = {"2.13": Build("13.0", "3.7.1")}

#: What an engine's C++ includes, and what that includes in turn; the last is of another part of CUDA, its C++ library.
_HEADERS = ("cuda.h", "cuda_runtime_api.h", "cuda_fp16.h", "crt/host_defines.h")
_LIBRARY_HEADER = "nv/target"
_VERSION = re.compile(r"^#define CUDA_VERSION (\d+)", re.MULTILINE)


def gpu_is_here(target: Target) -> bool:
    """Returns True if this machine has a GPU of the target's compute capability that torch can use."""
    return torch.cuda.is_available() and torch.cuda.get_device_capability() == target.capability


def cuda_version() -> str | None:
    """Returns the CUDA that engines are built for, such as "13.0": that of this torch, or of its release's build with
    CUDA. None if that is not known.
    """
    return torch.version.cuda or (build.cuda if (build := _other_build()) else None)


def cuda_problems() -> Iterator[Problem]:
    """Yields what this machine lacks to build for an NVIDIA GPU, each with the package that brings it."""
    if cuda_version() is None:
        known = ", ".join(BUILDS)
        yield Problem(
            "torch",
            f"found {torch.__version__}, which is built without CUDA, and engines for a GPU need one built with it",
            f"No GPU is needed. Install a torch of release {known}, whose builds for CPUs suffice, or several GB: "
            f"pip install --force-reinstall 'torch==={_release()}'",
        )
        return
    yield from _triton_problems()
    yield from _missing_headers()
    if find_cudart() is None:
        yield Problem(
            f"libcudart.so.{_major()}",
            "not found, and engines are linked with it",
            f"pip install 'nvidia-cuda-runtime=={_major()}.*', or set CUDA_HOME to a CUDA toolkit of that version",
        )


def _triton_problems() -> Iterator[Problem]:
    build = _other_build()
    wanted = f"triton=={build.triton}" if build else "triton"
    if find_spec("triton") is None:
        yield Problem("triton", "not installed, and it compiles the engines' GPU code", f"pip install {wanted}")
    elif build and (found := _installed("triton")) != build.triton:
        reason = f"found {found}, required {build.triton}: torch {_release()} generates code for that version"
        yield Problem("triton", reason, f"pip install {wanted}")
    elif find_ptxas() is None:
        yield Problem(
            "ptxas",
            "not found: neither in the package triton nor where TRITON_PTXAS_PATH says, and it assembles GPU code",
            "pip install --force-reinstall triton",
        )


def _missing_headers() -> Iterator[Problem]:
    if find_headers() is None:
        yield Problem(
            "cuda.h",
            f"no headers of CUDA {_major()} found: neither in the packages triton and nvidia-cuda-runtime nor in "
            "CUDA_HOME, and the engines' C++ includes them",
            "pip install --force-reinstall triton, or set CUDA_HOME to a CUDA toolkit of that version",
        )
    if find_library_headers() is None:
        package = f"nvidia-cuda-cccl=={_major()}.*" if _major() > 12 else f"nvidia-cuda-cccl-cu{_major()}"
        yield Problem(
            _LIBRARY_HEADER,
            "not found: neither in that package nor in CUDA_HOME, and CUDA's headers include it",
            f"pip install '{package}'",
        )


def broken_promises(target: Target, where: str = "$.target") -> Iterator[Problem]:
    """Yields the target's driver and CUDA that are too old for code of this torch's CUDA.

    Args:
        where: the target's JSON path.
    """
    if target.device != "cuda" or cuda_version() is None:
        return
    needs = {"driver": DRIVERS.get(_major()), "cuda": f"{_major()}.0"}
    for name, required in needs.items():
        promised = getattr(target, name)
        if promised and required and numbers(promised) < numbers(required):
            reason = f"found {promised}, required {required} or later: engines hold code of CUDA {cuda_version()}"
            yield Problem(f"{where}.{name}", reason, "Raise it, or build with a torch for an earlier CUDA.")


def find_ptxas() -> Path | None:
    """Returns the assembler that Triton will run, if it is there."""
    stated = os.environ.get("TRITON_PTXAS_PATH")
    path = Path(stated) if stated else _triton() / "bin" / "ptxas"
    return path if os.access(path, os.X_OK) else None


def find_headers() -> Path | None:
    """Returns a folder with CUDA's headers, of torch's own major version; Triton's first, which fit this torch."""
    folders = [_triton() / "include", *(home / "include" for home in (*_wheels(), *_homes()))]
    return next((folder for folder in folders if _complete(folder)), None)


def find_library_headers() -> Path | None:
    """Returns a folder with the headers of CUDA's C++ library, which lie apart from the others since CUDA 13."""
    roots = [home / "include" for home in (*_wheels(), *_homes())]
    folders = [folder for root in roots for folder in (root / "cccl", root)]
    return next((folder for folder in folders if (folder / _LIBRARY_HEADER).is_file()), None)


def find_cudart() -> Path | None:
    """Returns CUDA's runtime library: the one that torch has loaded, or else an installed one."""
    name = f"libcudart.so.{_major()}"
    with open("/proc/self/maps", encoding="utf-8") as maps:
        loaded = [Path(line.split()[-1]) for line in maps if line.rstrip().endswith(f"/{name}")]
    installed = [*(wheel / "lib" / name for wheel in _wheels()), *(home / "lib64" / name for home in _homes())]
    return next((path for path in [*loaded, *installed] if path.is_file()), None)


def _complete(folder: Path) -> bool:
    if not all((folder / header).is_file() for header in _HEADERS):
        return False
    found = _VERSION.search((folder / "cuda.h").read_text(errors="replace"))
    return found is not None and int(found[1]) // 1000 == _major()


def _triton() -> Path:
    spec = find_spec("triton")
    return Path(spec.origin).parent / "backends" / "nvidia" if spec and spec.origin else Path("/nonexistent")


def _wheels() -> list[Path]:
    """Returns the folders of NVIDIA's packages for this CUDA: beside torch, and elsewhere on Python's path.

    The packages share a namespace, which may be spread over several folders.
    """
    found = find_spec("nvidia")
    elsewhere = (found.submodule_search_locations if found else None) or ()
    roots = [Path(torch.__file__).parent.parent / "nvidia", *map(Path, elsewhere)]
    return [root / f"cu{_major()}" for root in dict.fromkeys(roots)]


def _homes() -> list[Path]:
    stated = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    compiler = shutil.which("nvcc")
    beside = [Path(compiler).resolve().parents[1]] if compiler else []
    return [*map(Path, stated), *beside, Path("/usr/local/cuda")]


def _major() -> int:
    return int((cuda_version() or "0").partition(".")[0])


def _other_build() -> Build | None:
    """Returns the build with CUDA of this torch's release, where this torch is none itself and that one is known."""
    return BUILDS.get(_release().rpartition(".")[0]) if torch.version.cuda is None else None


def _installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _release() -> str:
    return torch.__version__.partition("+")[0]
