"""Whether this machine is one that a target stands for."""

from __future__ import annotations

import torch

from diffkiln.spec.targets import Target


def why_not_here(target: Target) -> str:
    """Returns why this machine cannot run code for the target; "" if it can."""
    if target.device == "cpu":
        checks = {"x86-64-v3": torch.cpu._is_avx2_supported, "x86-64-v4": torch.cpu._is_avx512_supported}
        able = target.isa == "x86-64-v2" or (target.isa in checks and checks[target.isa]())
        return "" if able else f"this machine cannot run {target.isa}"
    if not torch.cuda.is_available():
        return "this machine has no CUDA GPU"
    found = torch.cuda.get_device_capability()
    return "" if found == target.capability else f"this machine's GPU is of SM {found[0]}.{found[1]}"
