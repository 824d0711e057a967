"""Attention by packages' kernels: flash-attn, SageAttention, xformers. Each is imported when a program first runs it.

A program has query, key and value as [batch, heads, tokens, channels]; most packages want the tokens before the heads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import import_module
from typing import Any

import torch

from diffkiln.errors import Incompatible, MissingDependency, Problem
from diffkiln.program import KERNELS, Module, Op, kernel_of
from diffkiln.program.attention import device_problem
from diffkiln.runtime.accelerator import capability

#: (query, key, value, causal, scale) → the result, all as [batch, heads, tokens, channels].
Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, bool, float | None], torch.Tensor]


def packaged(op: Op) -> Callable[..., Sequence[torch.Tensor]]:
    """Runs an ATTENTION operation.

    Raises:
        MissingDependency: its package cannot be imported; names the line that installs it.
    """
    name, causal, scale = op.attrs["kernel"], op.attrs["causal"], op.attrs["scale"]
    attend = _imported(name)

    def run(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> Sequence[torch.Tensor]:
        try:
            return [attend(_dense(query), _dense(key), _dense(value), causal, scale)]
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # whatever a package raises for what it does not take
            shapes = f"{list(query.shape)}, {list(key.shape)} of {query.dtype} on {query.device}"
            raise Incompatible(
                f"the attention kernel {name} of {KERNELS[name].package} failed for {shapes}: "
                f"{type(error).__name__}: {error}"
            ) from error

    return run


def check_kernels(asked: Mapping[str, Sequence[str]], device: torch.device) -> None:
    """Compares the device with the needs of the bundle's attention kernels.

    Args:
        asked: kernels by component.
        device: where the bundle is to run.

    Raises:
        Incompatible: all components whose kernel the device cannot run.
    """
    if not any(asked.values()):
        return
    found = capability(device) if device.type == "cuda" else (0, 0)
    if found is None:
        raise Incompatible(f"{device} cannot run the bundle's attention: there is no CUDA GPU")
    problems = [
        Problem(component, reason, "Compile the bundle with another attention_backend for this machine")
        for component, names in asked.items()
        for name in names
        if (reason := device_problem(name, device.type, found))
    ]
    if problems:
        raise Incompatible(
            f"{device} cannot run the bundle's attention:\n" + "\n".join(map(str, problems)), problems=problems
        )


def kernels_of(modules: Mapping[str, Module]) -> dict[str, list[str]]:
    """Returns the kernels that the programs ask for, by component."""
    return {name: sorted(set(_asked(module))) for name, module in modules.items()}


def _asked(module: Module) -> Iterator[str]:
    for program in (*module.programs.values(), *module.regions.values()):
        for op in program.ops:
            if (kernel := kernel_of(op)) is not None:
                yield kernel


def _dense(tensor: torch.Tensor) -> torch.Tensor:
    """Returns the tensor with its channels side by side in memory, which every package requires."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _tokens_first(*tensors: torch.Tensor) -> list[torch.Tensor]:
    """Turns [batch, heads, tokens, channels] into [batch, tokens, heads, channels], and back."""
    return [tensor.transpose(1, 2) for tensor in tensors]


def _flash(library: Any) -> Attend:
    """Returns attention by `flash_attn_func`, which all three generations of FlashAttention have."""

    def attend(
        query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, causal: bool, scale: float | None
    ) -> torch.Tensor:
        q, k, v = _tokens_first(query, key, value)
        result = library.flash_attn_func(q, k, v, softmax_scale=scale, causal=causal)
        # Some releases of the later generations give the log-sum-exp beside it.
        return _tokens_first(result[0] if isinstance(result, tuple) else result)[0]

    return attend


def _sage(library: Any) -> Attend:
    def attend(
        query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, causal: bool, scale: float | None
    ) -> torch.Tensor:
        return library.sageattn(query, key, value, tensor_layout="HND", is_causal=causal, sm_scale=scale)

    return attend


def _xformers(library: Any) -> Attend:
    def attend(
        query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, causal: bool, scale: float | None
    ) -> torch.Tensor:
        bias = library.LowerTriangularMask() if causal else None
        result = library.memory_efficient_attention(*_tokens_first(query, key, value), attn_bias=bias, scale=scale)
        return _tokens_first(result)[0]

    return attend


#: Kernel: the module that has it, and how it is called.
_MODULES: dict[str, tuple[str, Callable[[Any], Attend]]] = {
    "flash_2": ("flash_attn", _flash),
    "flash_3": ("flash_attn_interface", _flash),
    "flash_4": ("flash_attn.cute", _flash),
    "sage": ("sageattention", _sage),
    "xformers": ("xformers.ops", _xformers),
}


def _imported(name: str) -> Attend:
    home, adapt = _MODULES[name]
    try:
        return adapt(import_module(home))
    except (ImportError, OSError) as error:  # OSError: built for another torch or CUDA
        kernel = KERNELS[name]
        raise MissingDependency(
            f"attention by {name} needs {kernel.package} {kernel.versions}, and {home} cannot be imported: {error}. "
            f"{kernel.install}"
        ) from error
