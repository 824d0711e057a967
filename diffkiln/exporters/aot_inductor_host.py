"""What an engine's code for the host's CPU is told, whichever device the engine is for: the target's vectors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from diffkiln.errors import Problem
from diffkiln.exporters import toolchain
from diffkiln.interpreter.inductor import ISAS
from diffkiln.spec.targets import Target


def isa_problems(target: Target) -> list[Problem]:
    """What stands in the way of building for the target's CPU."""
    if target.isa not in ISAS:
        return [Problem("$.target.isa", f"no {target.isa!r} here", f"Choose one of {', '.join(ISAS)}.")]
    if target.device == "cpu" and target.isa == "x86-64-v4" and not torch.cpu._is_avx512_supported():
        return [
            Problem(
                "$.target.isa",
                "engines for x86-64-v4 are tried out as they are built, and this machine has no AVX-512",
                "Build on a machine that has it, or for x86-64-v3.",
            )
        ]
    return []


def host_options(isa: str, compiler: toolchain.Compiler, folder: Path) -> dict[str, Any]:
    """Inductor's configuration, for every device."""
    return {
        "aot_inductor.output_path": str(folder),
        "aot_inductor.model_name_for_generated_files": "engine",
        "aot_inductor.metadata": {},  # Inductor writes into its own default
        "aot_inductor.precompile_headers": False,
        "aot_inductor.enable_line_tables": False,
        "aot_inductor.enable_frame_pointer": False,
        "cpp.cxx": (None, compiler.path),
        "cpp.march": isa,
        "cpp.simdlen": ISAS[isa][0],
        "cpp.vec_isa_ok": True,
        "cpp.dynamic_threads": False,
        "cpp.threads": toolchain.MAX_THREADS,
        "size_asserts": False,
        "freezing": False,
        "max_autotune": False,
        "max_autotune_gemm": False,
        "fx_graph_cache": False,
        "fx_graph_remote_cache": False,
    }
