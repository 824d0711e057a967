"""The closed list of attention kernels that a program may ask for, and what each of them can take.

Attention is one operation of a program, `SDPA`, and torch chooses a kernel for it at every call. One of torch's own
that is chosen when the bundle is made stands in the operation's `attrs`. What a package computes is an ATTENTION
instead. Both name a row of `KERNELS`.

Sources: torch 2.13, aten/src/ATen/native/transformers/cuda/sdp_utils.cpp; diffusers 0.42, models/attention_dispatch.py
(packages, versions, masks); what else a row says is beside it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from diffkiln.program.ir import ATTENTION, Op, Ref, TensorType

#: The operation that attention is where no package computes it.
SDPA = "aten.scaled_dot_product_attention.default"

_HALF = ("float16", "bfloat16")


@dataclass(frozen=True, slots=True)
class Kernel:
    """An attention kernel. Its dtypes, masks and widths are those on GPUs; torch's kernels for CPUs take all.

    Attributes:
        package: the distribution that has it; empty for torch's own.
        versions: of the package.
        install: the line that installs the package.
        cpu: whether torch has it for CPUs as well.
        capabilities: the lowest compute capability, or with `only` all of them.
        dtypes: of query, key and value; empty for any.
        masks: whether it takes one.
        grouped: whether fewer heads of keys than of queries will do.
        square: whether a causal mask must have as many keys as queries: others line it up with the last ones.
        width: most channels of a head, which query, key and value share; 0 for any.
        multiple: the channels of a head must be a multiple of this.
        uniform: whether query, key and value must have four dimensions and one batch.
    """

    package: str = ""
    versions: str = ""
    install: str = ""
    cpu: bool = False
    capabilities: tuple[tuple[int, int], ...] = ((0, 0),)
    only: bool = False
    dtypes: tuple[str, ...] = _HALF
    masks: bool = False
    grouped: bool = True
    square: bool = True
    width: int = 0
    multiple: int = 1
    uniform: bool = True


_SAGE = "pip install git+https://github.com/thu-ml/SageAttention"
_FLASH_3 = "pip install --no-build-isolation 'git+https://github.com/Dao-AILab/flash-attention.git#subdirectory=hopper'"

KERNELS: Mapping[str, Kernel] = {
    "native_math": Kernel(cpu=True, dtypes=(), masks=True, square=False, uniform=False),
    "native_flash": Kernel(cpu=True, capabilities=((8, 0),), width=256),
    "native_efficient": Kernel(
        capabilities=((5, 0),), dtypes=("float32", *_HALF), masks=True, grouped=False, square=False
    ),
    # Widths: check_cudnn_tensor_shapes. Some GPUs take wider heads with a later cuDNN than torch's own.
    "native_cudnn": Kernel(capabilities=((8, 0),), masks=True, square=False, width=128, multiple=8),
    # "Ampere, Ada, or Hopper GPUs", "All head dimensions up to 256": flash-attn 2.8, README.md.
    "flash_2": Kernel(
        "flash-attn", ">=2.6.3,<3", "pip install flash-attn --no-build-isolation", capabilities=((8, 0),), width=256
    ),
    # "Requirements: H100 / H800 GPU": the same README.md. It is built from the folder `hopper`.
    "flash_3": Kernel("flash-attn-3", ">=3,<4", _FLASH_3, capabilities=((9, 0),), only=True, width=256),
    # "for Hopper and Blackwell GPUs": flash-attn-4 4.0.0b36, METADATA; widths: cute/interface.py, _validate_head_dims.
    "flash_4": Kernel("flash-attn-4", ">=4,<5", "pip install --pre flash-attn-4", capabilities=((9, 0),), width=128),
    # sageattention 2.2, core.py: `sageattn` has a branch for each of these and raises for others and for wider heads.
    "sage": Kernel(
        "sageattention",
        ">=2.1.1,<3",
        _SAGE,
        capabilities=((8, 0), (8, 6), (8, 9), (9, 0), (12, 0)),
        only=True,
        width=128,
    ),
    # xformers 0.0.35, ops/fmha/cutlass.py and flash.py. A tensor as a mask must be padded in memory, so none is given.
    "xformers": Kernel(
        "xformers",
        ">=0.0.29",
        "pip install xformers",
        capabilities=((5, 0),),
        dtypes=("float32", *_HALF),
        grouped=False,
        square=False,
    ),
}

#: Torch's own, whose operation stays an ATen operator, and those of packages.
NATIVE = tuple(name for name, kernel in KERNELS.items() if not kernel.package)
PACKAGED = tuple(name for name, kernel in KERNELS.items() if kernel.package)


def install_line(package: str) -> str:
    """Returns the command that installs a package."""
    return next((row.install for row in KERNELS.values() if row.package == package), f"pip install {package}")


@dataclass(frozen=True, slots=True)
class Attention:
    """The arguments of one attention, in whichever form its operation writes them."""

    query: Ref
    key: Ref
    value: Ref
    mask: Ref | None
    causal: bool
    scale: float | None


def read_attention(op: Op) -> Attention:
    """Returns the arguments of an `SDPA` or ATTENTION operation."""
    if op.name == ATTENTION:
        query, key, value = op.args
        return Attention(query, key, value, None, op.attrs["causal"], op.attrs["scale"])  # type: ignore[arg-type]
    names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
    given: dict[str, Any] = {**dict(zip(names, op.args, strict=False)), **op.kwargs}
    return Attention(
        given["query"],
        given["key"],
        given["value"],
        given.get("attn_mask"),
        bool(given.get("is_causal", False)),
        given.get("scale"),
    )


def kernel_of(op: Op) -> str | None:
    """Returns the kernel that an attention operation asks for; `None` if it asks for none or is not attention."""
    return op.attrs.get("kernel") if op.name in (SDPA, ATTENTION) else None


def device_problem(name: str, device: str, capability: tuple[int, int]) -> str:
    """Returns why a device cannot run a kernel: `device` is "cpu" or "cuda", `capability` a GPU's. Empty if it can."""
    kernel = KERNELS[name]
    if device == "cpu":
        return "" if kernel.cpu else f"{name} is for CUDA GPUs"
    listed = ", ".join(f"{major}.{minor}" for major, minor in kernel.capabilities)
    found = f"{capability[0]}.{capability[1]}"
    if kernel.only and capability not in kernel.capabilities:
        return f"{name} is for SM {listed}, not {found}"
    if capability < kernel.capabilities[0]:
        return f"{name} needs SM {listed} or later, not {found}"
    return ""


def call_problems(name: str, op: Op, types: Mapping[str, TensorType], device: str) -> Iterator[str]:
    """Yields why a kernel cannot compute one attention of a program with these types on "cpu" or "cuda"."""
    kernel, call = KERNELS[name], read_attention(op)
    query, key, value = (types[ref.name] for ref in (call.query, call.key, call.value))
    shapes = [query.shape, key.shape, value.shape]
    if kernel.uniform and (any(len(shape) != 4 for shape in shapes) or len({shape[0] for shape in shapes}) > 1):
        yield f"query, key and value of shapes {_words(shapes)}, and it takes four dimensions and one batch"
        return
    if kernel.width and len({shape[-1] for shape in shapes}) > 1:
        yield f"{_words([shape[-1] for shape in shapes])} channels in query, key and value, and it takes one width"
    if device == "cpu":
        return
    if kernel.dtypes and query.dtype not in kernel.dtypes:
        yield f"{query.dtype}, and it takes {' and '.join(kernel.dtypes)}"
    if call.mask is not None and not kernel.masks:
        yield "a mask, and it takes none"
    if kernel.width and shapes[0][-1] > kernel.width:
        yield f"{shapes[0][-1]} channels a head, and it takes up to {kernel.width}"
    if shapes[0][-1] % kernel.multiple:
        yield f"{shapes[0][-1]} channels a head, and it takes multiples of {kernel.multiple}"
    if not kernel.grouped and query.shape[1] != key.shape[1]:
        yield f"{query.shape[1]} heads of queries on {key.shape[1]} of keys, and it takes as many"
    if kernel.square and call.causal and query.shape[-2] != key.shape[-2]:
        yield f"a causal mask of {query.shape[-2]} queries on {key.shape[-2]} keys, and it takes square ones"


def _words(items: list[Any]) -> str:
    return ", ".join(map(str, items))
