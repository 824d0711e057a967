"""What the process that builds twins leaves for the one that runs them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from diffkiln.exporters.toolchain import Flags
from diffkiln.program import Program


@dataclass(frozen=True)
class Kernel:
    """A Triton kernel: its file, and the form of it that the engine has.

    Attributes:
        signature: the type of each argument, such as "*bf16"; "constexpr" for those that the form settles.
        settled: the values of these.
        aligned: the positions of arguments that are taken to be divisible by 16.
    """

    file: str
    signature: dict[str, str]
    settled: dict[str, Any]
    aligned: tuple[int, ...]


@dataclass(frozen=True)
class Attention:
    """One attention that the engine must call: torch's kernel, sizes of query and key, the mask's, and the rest."""

    kernel: str
    query: tuple[int, ...]
    key: tuple[int, ...]
    causal: bool
    scale: float
    masked: bool


@dataclass(frozen=True)
class Written:
    """What a twin is run by. `attention` has the calls of each member; `seconds` are those of generating the engine."""

    members: tuple[Program, ...]
    constants: dict[str, torch.Tensor]
    kernels: dict[str, Kernel]
    attention: tuple[tuple[Attention, ...], ...]
    cubins: tuple[str, ...]
    objects: tuple[str, ...]
    flags: Flags
    seconds: float
