"""One of torch's attention kernels and no other.

`scaled_dot_product_attention` takes whichever kernel suits its arguments, among those that are switched on. Where a
program names a kernel the others are switched off while it runs, so torch has no other to fall back to: it raises. The
switches are the process's. Whoever turns them here waits for the others that do; attention of other code, in another
thread, may meet them turned.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch

from diffkiln.errors import Incompatible, VerifyError
from diffkiln.guards import forks
from diffkiln.program import Program, kernel_of

_BACKENDS: Any = torch.backends.cuda
#: Kernel: whether it is switched on, and what switches it. The functions are in `cuda` and are for CPUs as well.
_SWITCHES: dict[str, tuple[Callable[[], bool], Callable[[bool], None]]] = {
    "native_math": (_BACKENDS.math_sdp_enabled, _BACKENDS.enable_math_sdp),
    "native_flash": (_BACKENDS.flash_sdp_enabled, _BACKENDS.enable_flash_sdp),
    "native_efficient": (_BACKENDS.mem_efficient_sdp_enabled, _BACKENDS.enable_mem_efficient_sdp),
    "native_cudnn": (_BACKENDS.cudnn_sdp_enabled, _BACKENDS.enable_cudnn_sdp),
}
_TURNING = forks.Lock(threading.RLock)

#: How torch says that no kernel that is switched on takes the arguments; the reasons go to the standard error.
_REFUSALS = ("No available kernel", "No viable backend")


@contextlib.contextmanager
def only(kernel: str) -> Iterator[None]:
    """Makes torch compute attention by this kernel of its own, or raise a RuntimeError, inside the `with` block."""
    with _TURNING:
        before = [enabled() for enabled, _ in _SWITCHES.values()]
        for name, (_, switch) in _SWITCHES.items():
            switch(name == kernel)
        try:
            yield
        finally:
            for on, (_, switch) in zip(before, _SWITCHES.values(), strict=True):
                switch(on)


def by_kernel(function: Callable[..., Any], kernel: str, who: str) -> Callable[..., Any]:
    """Returns a function whose attention runs by one of torch's kernels.

    Args:
        function: whatever computes attention, be it the operator or a whole model.
        kernel: its name in `diffkiln.program.NATIVE`.
        who: what computes it, for the message.

    Returns:
        The function, which now raises Incompatible where the kernel cannot take its arguments here.
    """

    @functools.wraps(function)
    def chosen(*args: Any, **kwargs: Any) -> Any:
        with only(kernel):
            try:
                return function(*args, **kwargs)
            except RuntimeError as error:
                if not str(error).startswith(_REFUSALS):
                    raise
                raise Incompatible(
                    f"{who}: the attention kernel {kernel} cannot take {_shapes(args)}here: {error} Compile the bundle "
                    "with another attention_backend, or without one"
                ) from error

    return chosen


@contextlib.contextmanager
def kernel_for(program: Program) -> Iterator[None]:
    """Makes torch lower attention by the kernel that the program asks for, if any, inside the `with` block.

    Raises:
        VerifyError: it asks for several.
    """
    asked = {kernel_of(op) for op in program.ops if op.is_aten} - {None}
    if len(asked) > 1:
        raise VerifyError(f"the region {program.name!r} asks for several attention kernels: {', '.join(sorted(asked))}")  # type: ignore[arg-type]
    with only(asked.pop()) if asked else contextlib.nullcontext():  # type: ignore[arg-type]
        yield


def _shapes(args: tuple[Any, ...]) -> str:
    tensors = [arg for arg in args if isinstance(arg, torch.Tensor)]
    kinds = [f"{str(t.dtype).removeprefix('torch.')}{list(t.shape)}".replace(" ", "") for t in tensors]
    return f"{', '.join(kinds)} on {tensors[0].device} " if tensors else ""
