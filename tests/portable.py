"""The numerical tests on CPUs that this one is made to look like: `python -m tests.portable`, or `--sample` of it."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence

from numpy._core._multiarray_umath import __cpu_dispatch__

_PATHS = """
    tests/frozen tests/snapshots/test_bundles.py tests/snapshots/test_commands.py
    tests/end_to_end/test_families.py tests/end_to_end/test_lengths.py tests/end_to_end/test_portable.py
    tests/end_to_end/test_schedules.py tests/golden tests/passes/test_attention_backend.py
    tests/passes/test_scheduler.py tests/passes/test_vae.py tests/families tests/record
    tests/runtime/diffusers/test_loading.py tests/hub/test_load.py tests/runtime/test_compatibility.py
    tests/runtime/test_image_inputs.py tests/runtime/test_pipeline.py tests/runtime/test_targets.py
    tests/compiler/verify tests/models
"""
PATHS = _PATHS.split()
#: A family of each kind, what compares bits, and what depends on the machine's instructions.
SAMPLE = [
    *(f"tests/end_to_end/test_families.py::test_bundle_equals_diffusers[{name}]" for name in ("flux", "sdxl", "wan")),
    "tests/golden/test_rewrites.py",
    "tests/interpreter/test_portable.py",
    "tests/compiler/verify/test_alignment.py",
]


def disguises() -> dict[str, dict[str, str]]:
    """Variables by the name of the CPU that they make of this one: one without AVX-512, and one without AVX.

    NumPy warns of features that it does not know, and their names change from version to version.
    """
    wide = [name for name in __cpu_dispatch__ if name.startswith(("AVX512", "X86_V4"))]
    avx2 = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"}
    none = {"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41", "MKL_ENABLE_INSTRUCTIONS": "SSE4_2"}
    return {
        "avx2": avx2 | {"NPY_DISABLE_CPU_FEATURES": " ".join(wide)},
        "default": none | {"NPY_DISABLE_CPU_FEATURES": " ".join(__cpu_dispatch__)},
    }


def run(name: str, disguise: Mapping[str, str], threads: int, paths: Sequence[str]) -> int:
    """Runs tests in a process of their own; gives its exit status."""
    print(f"== as a CPU of {name}, {threads} thread{'s' * (threads > 1)}", flush=True)
    command = [sys.executable, "-m", "pytest", "-q", "--durations", "5", *paths]
    started = time.monotonic()
    status = subprocess.run(
        command, env=os.environ | disguise | {"OMP_NUM_THREADS": str(threads)}, check=False
    ).returncode
    print(f"== {time.monotonic() - started:.0f} s", flush=True)
    return status


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sample", action="store_true", help="a few tests, as each CPU once")
    sample = parser.parse_args().sample
    ways = [("avx2", 1), ("default", 4)] if sample else [(name, n) for name in disguises() for n in (1, 4)]
    made = disguises()
    return max(run(name, made[name], threads, SAMPLE if sample else PATHS) for name, threads in ways)


if __name__ == "__main__":
    sys.exit(main())
