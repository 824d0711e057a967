"""What an engine's code for the host's CPU is told, whichever device the engine is for: the target's vectors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from diffkiln.exporters import toolchain
from diffkiln.interpreter.inductor import ISAS


def host_options(isa: str, compiler: toolchain.Compiler, folder: Path) -> dict[str, Any]:
    """Returns Inductor's configuration, for every device."""
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
