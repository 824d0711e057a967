"""The order of the built-in passes of one component, by phase.

The passes themselves say what must stand before what, and why (`before`, `after`); a test holds this literal to that.
A pass of another distribution takes its place by what it says of these.
"""

from __future__ import annotations

PHASES: dict[str, tuple[str, ...]] = {
    "components": ("enhance",),
    "original weights": ("fuse_lora", "cast"),
    "structure": ("fuse_qkv", "prune", "merge_tokens"),
    "how weights are stored": ("sparsify", "quantize", "layerwise_cast", "recover", "add_slots"),
    "how a component computes": ("attention_backend", "channels_last", "vae"),
    "the run": ("scheduler", "guidance", "split_guidance", "calibrate", "cache_schedule"),
    "what is computed ahead": ("hoist",),
    "several processes": ("split_sequence", "split_layers", "split_tiles", "run_on_first"),
    "engines": ("compile",),
}

ORDER: tuple[str, ...] = tuple(name for phase in PHASES.values() for name in phase)
