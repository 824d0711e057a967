"""Draws hostile arguments for every operator of the closed list and runs what the list accepts, in this process.

    python -m tests.interpreter.hostile [--attempts N] [--seed N] [--only NAME]

Prints one line of JSON an operator. The last line that a crash leaves behind names the operator. Tensors end at a page
that nothing may read, so that a read past the end is a crash, too. Run it twice with another MALLOC_PERTURB_ to see
whether results hold memory as it was found: `digest` must not change.
"""

from __future__ import annotations

import argparse
import ctypes
import hashlib
import json
import math
import mmap
import random
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from diffkiln.interpreter.aten import dtype_of, literal, overload, type_of
from diffkiln.interpreter.checked import checked
from diffkiln.program.ir import Device, DType, MemoryFormat, TensorType
from diffkiln.program.operators import OPERATORS, Refused, nbytes
from diffkiln.program.operators.creation import MEMORY_FORMATS
from diffkiln.program.operators.promotion import INTEGER, category

CPU = torch.device("cpu")
#: What an operator may raise for values that no type shows; the public API turns it into an error of ours.
RAISES = (RuntimeError, IndexError, ValueError, TypeError, NotImplementedError)
#: Results above this are the budget's to refuse, and are not computed here.
BYTES = 32 << 20

_SHAPES = [(), (0,), (1,), (2,), (3,), (8,), (2, 3), (3, 2), (4, 4), (1, 4), (8, 8), (2, 0), (1, 4, 8), (2, 4, 4)]
_SHAPES += [(1, 3, 8, 8), (2, 4, 3, 3), (4, 2, 3, 3), (4, 4, 1, 1), (1, 4, 2, 4, 4), (4, 4, 2, 2, 2), (3, 3, 3)]
_DTYPES = (
    ["float32"] * 6 + ["int64"] * 3 + ["int32", "bool", "float64", "bfloat16", "float16", "uint8", "int8", "int16"]
)
_DTYPES += ["complex64", "float8_e4m3fn"]
_INTEGERS = [0, 1, 2, 3, 4, 8, -1, -2, -3, 5, 7, 16, 31, 64, 2**16, 2**31 - 1, -(2**31), 2**31, 2**40]
_INTEGERS += [2**62, 2**63 - 1, -(2**63)]
_FLOATS = [0.0, 1.0, 0.5, 2.0, -1.0, 1e-5, 1e-12, 1e-300, 1e300, math.inf, -math.inf, math.nan, 3.7, 1e12]
_TEXTS = ["none", "tanh", "constant", "reflect", "replicate", "circular", "valid", "same", "trunc", "floor", "ortho"]
_TEXTS += [
    "left",
    "right",
    "ij",
    "xy",
    "add",
    "multiply",
    "reduced",
    "complete",
    "i,j->ij",
    "ij,jk->ik",
    "...i->...",
    "",
]

_ABSENT = object()


class Draw:
    """Arguments of one operator, mostly small ones that fit each other, some that no model has."""

    def __init__(self, seed: str) -> None:
        self.random = random.Random(seed)
        self._pool: list[tuple[int, ...]] = []

    def start(self) -> None:
        """Begins another set: its tensors share a few shapes and, mostly, one dtype."""
        self._pool = self.random.sample(_SHAPES, 2)
        self._dtype = self.random.choice(_DTYPES)

    def argument(self, kind: str) -> Any:
        """Returns an argument for one of the schema's types, with `TensorType` for tensors."""
        if kind.endswith("?"):
            return None if self.random.random() < 0.5 else self.argument(kind[:-1])
        if kind == "Tensor":
            return self.tensor()
        if kind in ("List[Tensor]", "List[Optional[Tensor]]"):
            return tuple(self.tensor() for _ in range(self.random.randint(1, 3)))
        if kind == "List[int]":
            low = [self.random.choice(_INTEGERS[:9]) for _ in range(self.random.randint(0, 4))]
            return tuple(self.random.choice(_INTEGERS) if self.random.random() < 0.1 else n for n in low)
        if kind == "List[float]":
            return tuple(self.random.choice(_FLOATS) for _ in range(self.random.randint(1, 3)))
        if kind == "int":
            return self.random.choice(_INTEGERS[:9] if self.random.random() < 0.8 else _INTEGERS)
        if kind == "float":
            return self.random.choice(_FLOATS)
        if kind == "number":
            return self.random.choice([*_INTEGERS[:9], *_FLOATS])
        if kind == "bool":
            return self.random.random() < 0.5
        if kind == "format":
            return MemoryFormat(self.random.choice(MEMORY_FORMATS))
        if kind == "device":
            return Device()
        if kind == "dtype":
            return DType(self.random.choice(_DTYPES))
        if kind == "str":
            return self.random.choice(_TEXTS)
        return None

    def arguments(self, name: str, parameters: list[tuple[str, str, bool]]) -> dict[str, Any]:
        """Returns a set: all drawn, or those that fit with one or two of them drawn or changed."""
        fitting = FITTING.get(name.removeprefix("aten.").removesuffix(".default"))
        if fitting is None or self.random.random() < 0.3:
            return {key: self.argument(kind) for key, kind, _ in parameters}
        given = {key: fitting.get(key, _ABSENT) for key, _, _ in parameters}
        for key, kind, _ in self.random.sample(parameters, self.random.randint(0, min(2, len(parameters)))):
            given[key] = self.argument(kind)
        if self.random.random() < 0.3:
            self._resize(given)
        if self.random.random() < 0.3:
            dtype = self.random.choice(_DTYPES)
            changed = {k: TensorType(dtype, v.shape) for k, v in given.items() if isinstance(v, TensorType)}
            given |= {key: type_ for key, type_ in changed.items() if given[key].dtype == "float32"}
        return given

    def _resize(self, given: dict[str, Any]) -> None:
        """Changes one size of one tensor."""
        shaped = [key for key, value in given.items() if isinstance(value, TensorType) and value.shape]
        if not shaped:
            return
        key = self.random.choice(shaped)
        shape = list(given[key].shape)
        shape[self.random.randrange(len(shape))] = self.random.choice([0, 1, 2, 3, 5, 7, 16, 33])
        given[key] = TensorType(given[key].dtype, tuple(shape))

    def tensor(self) -> TensorType:
        shape = self.random.choice(self._pool if self.random.random() < 0.8 else _SHAPES)
        dtype = self._dtype if self.random.random() < 0.7 else self.random.choice(_DTYPES)
        return TensorType(dtype, shape)


#: What the schema counts as integers.
_NAMED = {"dtype": "dtype?", "out_dtype": "dtype?", "memory_format": "format?", "layout": "none", "device": "device"}


def kinds(name: str) -> Iterator[tuple[str, str, bool]]:
    """Yields name, type and whether it is a keyword alone, of each argument of an operator's schema."""
    for argument in overload(name)._schema.arguments:
        kind = str(argument.type)
        kind = kind.replace("Optional[Tensor]", "Tensor?") if kind.startswith("Optional[Tensor]") else kind
        if kind.startswith("Optional["):
            kind = kind[len("Optional[") : -1] + "?"
        yield argument.name, _NAMED.get(argument.name, kind), argument.kwarg_only


def _t(text: str) -> TensorType:
    """Returns the type that "2 3 int64" names: sizes and, unless it is float32, a dtype."""
    words = text.split()
    dtype = words.pop() if words and not words[-1].isdigit() else "float32"
    return TensorType(dtype, tuple(map(int, words)))


_IMAGE, _LINE, _VOLUME, _WEIGHT = _t("1 4 8 8"), _t("1 4 8"), _t("1 4 4 4 4"), _t("4")
_STATISTICS = {"training": False, "momentum": 0.1, "eps": 1e-5, "cudnn_enabled": False}
_SIZE = {"output_size": (16, 16), "align_corners": False}
_FACTORS = {"output_size": None, "align_corners": False, "scale_factors": (2.0, 2.0)}
#: Arguments that fit, for operators that take some that chance seldom finds. Half of the sets begin with these.
FITTING: dict[str, dict[str, Any]] = {
    "_int_mm": {"self": _t("32 16 int8"), "mat2": _t("16 8 int8")},
    "_weight_int8pack_mm": {"self": _t("2 32 bfloat16"), "mat2": _t("16 32 int8"), "scales": _t("16 bfloat16")},
    "_scaled_mm": {
        "self": _t("32 16 float8_e4m3fn"),
        "mat2": _t("16 16 float8_e4m3fn"),
        "scale_a": _t("1"),
        "scale_b": _t("1"),
        "out_dtype": DType("bfloat16"),
    },
    "addmm": {"self": _t("8"), "mat1": _t("4 4"), "mat2": _t("4 8"), "beta": 1, "alpha": 1},
    "addmv": {"self": _t("4"), "mat": _t("4 8"), "vec": _t("8"), "beta": 1, "alpha": 1},
    "baddbmm": {"self": _t("2 4 8"), "batch1": _t("2 4 4"), "batch2": _t("2 4 8"), "beta": 1, "alpha": 1},
    "bmm": {"self": _t("2 4 4"), "mat2": _t("2 4 8")},
    "mv": {"self": _t("4 8"), "vec": _t("8")},
    "linear": {"input": _t("2 3 8"), "weight": _t("4 8"), "bias": _t("4")},
    "einsum": {"equation": "bij,bjk->bik", "tensors": (_t("2 4 8"), _t("2 8 4"))},
    "scaled_dot_product_attention": {
        "query": _t("1 2 8 16"),
        "key": _t("1 2 8 16"),
        "value": _t("1 2 8 16"),
        "attn_mask": _t("8 8 bool"),
        "dropout_p": 0.0,
        "is_causal": False,
        "enable_gqa": False,
    },
    "conv1d": {"input": _LINE, "weight": _t("4 4 3"), "bias": _WEIGHT, "padding": (1,)},
    "conv2d": {"input": _IMAGE, "weight": _t("4 4 3 3"), "bias": _WEIGHT, "padding": (1, 1)},
    "conv3d": {"input": _VOLUME, "weight": _t("4 4 3 3 3"), "bias": _WEIGHT, "padding": (1, 1, 1)},
    "conv1d.padding": {"input": _LINE, "weight": _t("4 4 3"), "bias": _WEIGHT, "padding": "same"},
    "conv2d.padding": {"input": _IMAGE, "weight": _t("4 4 3 3"), "bias": _WEIGHT, "padding": "same"},
    "conv3d.padding": {"input": _VOLUME, "weight": _t("4 4 3 3 3"), "bias": _WEIGHT, "padding": "same"},
    "conv_transpose1d": {"input": _LINE, "weight": _t("4 4 3"), "bias": _WEIGHT, "stride": (2,)},
    "conv_transpose2d.input": {"input": _IMAGE, "weight": _t("4 4 3 3"), "bias": _WEIGHT, "stride": (2, 2)},
    "conv_transpose3d.input": {"input": _VOLUME, "weight": _t("4 4 3 3 3"), "bias": _WEIGHT, "stride": (2, 2, 2)},
    "convolution": {
        "input": _IMAGE,
        "weight": _t("4 4 3 3"),
        "bias": None,
        "stride": (1, 1),
        "padding": (1, 1),
        "dilation": (1, 1),
        "transposed": False,
        "output_padding": (0, 0),
        "groups": 1,
    },
    "avg_pool1d": {"self": _LINE, "kernel_size": (2,)},
    "avg_pool2d": {"self": _IMAGE, "kernel_size": (2, 2)},
    "avg_pool3d": {"self": _VOLUME, "kernel_size": (2, 2, 2)},
    "max_pool1d": {"self": _LINE, "kernel_size": (2,)},
    "max_pool2d": {"self": _IMAGE, "kernel_size": (3, 3), "stride": (2, 2), "padding": (1, 1)},
    "max_pool3d": {"self": _VOLUME, "kernel_size": (2, 2, 2)},
    "adaptive_avg_pool1d": {"self": _LINE, "output_size": (3,)},
    "adaptive_avg_pool2d": {"self": _IMAGE, "output_size": (3, 3)},
    "batch_norm": {
        "input": _IMAGE,
        "weight": _WEIGHT,
        "bias": _WEIGHT,
        "running_mean": _WEIGHT,
        "running_var": _WEIGHT,
        **_STATISTICS,
    },
    "instance_norm": {
        "input": _IMAGE,
        "weight": _WEIGHT,
        "bias": _WEIGHT,
        "running_mean": None,
        "running_var": None,
        "use_input_stats": True,
        **{key: value for key, value in _STATISTICS.items() if key != "training"},
    },
    "group_norm": {"input": _IMAGE, "num_groups": 2, "weight": _WEIGHT, "bias": _WEIGHT},
    "_weight_norm": {"v": _t("4 3 2"), "g": _t("4 1 1"), "dim": 0},
    "layer_norm": {"input": _t("2 3 8"), "normalized_shape": (8,), "weight": _t("8"), "bias": _t("8")},
    "rms_norm": {"input": _t("2 3 8"), "normalized_shape": (8,), "weight": _t("8"), "eps": 1e-6},
    "reflection_pad1d": {"self": _LINE, "padding": (1, 2)},
    "reflection_pad2d": {"self": _IMAGE, "padding": (1, 2, 3, 4)},
    "reflection_pad3d": {"self": _VOLUME, "padding": (1, 2, 1, 2, 3, 3)},
    "replication_pad1d": {"self": _LINE, "padding": (1, 2)},
    "replication_pad2d": {"self": _IMAGE, "padding": (1, 2, 3, 4)},
    "replication_pad3d": {"self": _VOLUME, "padding": (1, 2, 1, 2, 3, 3)},
    "_pad_circular": {"self": _IMAGE, "pad": (1, 2, 3, 4)},
    "pad": {"self": _IMAGE, "pad": (1, 2, 3, 4), "mode": "reflect", "value": None},
    "upsample_nearest1d": {"self": _LINE, "output_size": (16,)},
    "upsample_nearest2d": {"self": _IMAGE, "output_size": (16, 16)},
    "upsample_nearest3d": {"self": _VOLUME, "output_size": (8, 8, 8)},
    "_upsample_nearest_exact1d": {"self": _LINE, "output_size": (16,)},
    "_upsample_nearest_exact2d": {"self": _IMAGE, "output_size": (16, 16)},
    "_upsample_nearest_exact3d": {"self": _VOLUME, "output_size": (8, 8, 8)},
    "upsample_linear1d": {"self": _LINE, "output_size": (16,), "align_corners": False},
    "upsample_bilinear2d": {"self": _IMAGE, **_SIZE},
    "upsample_bicubic2d": {"self": _IMAGE, **_SIZE},
    "_upsample_bilinear2d_aa": {"self": _IMAGE, **_SIZE},
    "_upsample_bicubic2d_aa": {"self": _IMAGE, **_SIZE},
    "upsample_trilinear3d": {"self": _VOLUME, "output_size": (8, 8, 8), "align_corners": False},
    "upsample_nearest1d.vec": {"input": _LINE, "output_size": None, "scale_factors": (2.0,)},
    "upsample_nearest2d.vec": {"input": _IMAGE, "output_size": None, "scale_factors": (2.0, 2.0)},
    "upsample_nearest3d.vec": {"input": _VOLUME, "output_size": None, "scale_factors": (2.0, 2.0, 2.0)},
    "_upsample_nearest_exact1d.vec": {"input": _LINE, "output_size": None, "scale_factors": (2.0,)},
    "_upsample_nearest_exact2d.vec": {"input": _IMAGE, "output_size": None, "scale_factors": (2.0, 2.0)},
    "_upsample_nearest_exact3d.vec": {"input": _VOLUME, "output_size": None, "scale_factors": (2.0, 2.0, 2.0)},
    "upsample_linear1d.vec": {
        "input": _LINE,
        "output_size": None,
        "align_corners": False,
        "scale_factors": (0.5,),
    },
    "upsample_bilinear2d.vec": {"input": _IMAGE, **_FACTORS},
    "upsample_bicubic2d.vec": {"input": _IMAGE, **_FACTORS},
    "_upsample_bilinear2d_aa.vec": {"input": _IMAGE, **_FACTORS},
    "_upsample_bicubic2d_aa.vec": {"input": _IMAGE, **_FACTORS},
    "upsample_trilinear3d.vec": {
        "input": _VOLUME,
        "output_size": None,
        "align_corners": True,
        "scale_factors": (2.0, 2.0, 2.0),
    },
    "grid_sampler": {
        "input": _IMAGE,
        "grid": _t("1 5 7 2"),
        "interpolation_mode": 0,
        "padding_mode": 2,
        "align_corners": False,
    },
    "as_strided": {"self": _t("4 8"), "size": (4, 4), "stride": (8, 2), "storage_offset": 1},
    "as_strided_scatter": {
        "self": _t("4 8"),
        "src": _t("4 4"),
        "size": (4, 4),
        "stride": (8, 2),
        "storage_offset": 1,
    },
    "slice_scatter": {"self": _t("4 8"), "src": _t("4 4"), "dim": 1, "start": 0, "end": 8, "step": 2},
    "select_scatter": {"self": _t("4 8"), "src": _t("4"), "dim": 1, "index": 2},
    "diagonal_scatter": {"self": _t("4 8"), "src": _t("4"), "offset": 0, "dim1": 0, "dim2": 1},
    "embedding": {"weight": _t("8 4"), "indices": _t("2 3 int64")},
    "index.Tensor": {"self": _t("4 8 2"), "indices": (_t("3 int64"), _t("3 int64"))},
    "index_put": {"self": _t("4 8"), "indices": (_t("3 int64"),), "values": _t("3 8"), "accumulate": False},
    "index_select": {"self": _t("4 8"), "dim": 1, "index": _t("3 int64")},
    "index_copy": {"self": _t("4 8"), "dim": 0, "index": _t("3 int64"), "source": _t("3 8")},
    "index_add": {"self": _t("4 8"), "dim": 0, "index": _t("3 int64"), "source": _t("3 8"), "alpha": 1},
    "index_fill.int_Tensor": {"self": _t("4 8"), "dim": 0, "index": _t("3 int64"), "value": _t("")},
    "index_fill.int_Scalar": {"self": _t("4 8"), "dim": 0, "index": _t("3 int64"), "value": 2},
    "gather": {"self": _t("4 8"), "dim": 1, "index": _t("4 3 int64"), "sparse_grad": False},
    "take_along_dim": {"self": _t("4 8"), "indices": _t("4 3 int64"), "dim": 1},
    "scatter.src": {"self": _t("4 8"), "dim": 1, "index": _t("4 3 int64"), "src": _t("4 8")},
    "scatter.value": {"self": _t("4 8"), "dim": 1, "index": _t("4 3 int64"), "value": 2.0},
    "scatter.reduce": {"self": _t("4 8"), "dim": 1, "index": _t("4 3 int64"), "src": _t("4 8"), "reduce": "add"},
    "scatter_add": {"self": _t("4 8"), "dim": 1, "index": _t("4 3 int64"), "src": _t("4 8")},
    "masked_scatter": {"self": _t("4 8"), "mask": _t("4 8 bool"), "source": _t("32")},
    "masked_fill.Tensor": {"self": _t("4 8"), "mask": _t("4 8 bool"), "value": _t("")},
    "searchsorted.Tensor": {"sorted_sequence": _t("8"), "self": _t("4")},
    "repeat_interleave.self_Tensor": {"self": _t("4 8"), "repeats": _t("4 int64"), "dim": 0, "output_size": 6},
    "contiguous": {"self": _IMAGE, "memory_format": MemoryFormat("channels_last")},
    "to.device": {"self": _t("4 8"), "device": Device(), "dtype": DType("int8")},
    "to.dtype": {"self": _t("4 8"), "dtype": DType("int8")},
    "view.dtype": {"self": _t("4 8"), "dtype": DType("int8")},
    "fft_irfftn": {"self": _t("4 8 complex64"), "s": (4, 14), "dim": (0, 1)},
    "quantile.scalar": {"self": _t("4 8"), "q": 0.5, "dim": 0, "keepdim": False, "interpolation": "linear"},
    "fft_irfft": {"self": _t("4 8 complex64"), "n": 14, "dim": 1},
}


class Guarded:
    """Memory whose end is the end of a page, before one that nothing may read."""

    def __init__(self) -> None:
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._held: list[Any] = []

    def tensor(self, type_: TensorType, values: torch.Tensor) -> torch.Tensor:
        size = nbytes(type_)
        if size == 0:
            return values
        whole = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
        region = mmap.mmap(-1, whole + mmap.PAGESIZE)
        address = ctypes.addressof(ctypes.c_char.from_buffer(region))
        if self._libc.mprotect(ctypes.c_void_p(address + whole), mmap.PAGESIZE, 0):
            raise OSError(ctypes.get_errno(), "mprotect")
        flat = torch.frombuffer(region, dtype=torch.uint8, count=size, offset=whole - size)
        guarded = flat.view(values.dtype).reshape(values.shape) if values.ndim else flat.view(values.dtype)[0]
        guarded.copy_(values)
        self._held.append(region)
        return guarded


def split(given: dict[str, Any], parameters: list[tuple[str, str, bool]]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Returns positional arguments up to the first that is left to its default, and the others by name."""
    positional, keywords, ended = [], {}, False
    for key, _, keyword in parameters:
        value = given[key]
        if value is _ABSENT:
            ended = ended or not keyword
        elif keyword or ended:
            if value is not None:
                keywords[key] = value
        else:
            positional.append(value)
    return tuple(positional), keywords


def values_of(type_: TensorType, rng: random.Random) -> torch.Tensor:
    """Returns a tensor of hostile values: zeros, ones, extremes, NaN."""
    dtype = dtype_of(type_.dtype)
    count = type_.numel
    if dtype == torch.bool:
        return torch.tensor([rng.random() < 0.5 for _ in range(count)], dtype=dtype).reshape(type_.shape)
    if category(type_.dtype) == INTEGER:
        info = torch.iinfo(dtype)
        pool = [0, 1, 2, 3, info.max, info.min, *([-1, -2] if info.min < 0 else [])]
        small = rng.random() < 0.6
        drawn = [rng.choice(pool[:3] if small else pool) for _ in range(count)]
        return torch.tensor(drawn, dtype=dtype).reshape(type_.shape)
    pool = [0.0, 1.0, -1.0, 0.5, math.nan, math.inf, -math.inf, 1e30]
    tame = rng.random() < 0.5
    drawn = [rng.choice(pool[:4] if tame else pool) for _ in range(count)]
    return torch.tensor(drawn, dtype=torch.float32).to(dtype).reshape(type_.shape)


def attempts(name: str, count: int, seed: int) -> dict[str, Any]:
    """Runs `count` drawn sets of one operator.

    Returns:
        How many the list refused, how many ran, how many raised one of `RAISES`; wrong types, foreign exceptions, and
        a digest of all results.
    """
    draw, entry = Draw(f"{name}{seed}"), OPERATORS[name]
    function = checked(name, overload(name), CPU)
    parameters = list(kinds(name))
    tally: dict[str, Any] = {"refused": 0, "ran": 0, "raised": 0, "large": 0, "wrong": [], "foreign": []}
    digest = hashlib.sha256()
    for _ in range(count):
        draw.start()
        guard = Guarded()
        given = draw.arguments(name, parameters)
        positional, keywords = split(given, parameters)
        try:
            inferred = entry.infer(*positional, **keywords)
        except (Refused, TypeError):
            tally["refused"] += 1
            continue
        wanted = [inferred] if isinstance(inferred, TensorType) else list(inferred)
        if sum(map(nbytes, wanted)) > BYTES:
            tally["large"] += 1
            continue

        def real(arg: Any, guard: Guarded = guard) -> Any:
            if isinstance(arg, TensorType):
                return guard.tensor(arg, values_of(arg, draw.random))
            return [real(item) for item in arg] if isinstance(arg, tuple) else literal(arg, CPU)

        args, kwargs = [real(arg) for arg in positional], {key: real(arg) for key, arg in keywords.items()}
        try:
            with torch.inference_mode():
                result = function(*args, **kwargs)
        except RAISES:
            tally["raised"] += 1
            continue
        except BaseException as error:
            tally["foreign"].append(f"{type(error).__name__}: {error}"[:200])
            continue
        results = [result] if isinstance(result, torch.Tensor) else list(result)
        found = [type_of(tensor) for tensor in results]
        if found != wanted:
            tally["wrong"].append(f"{list(map(str, found))} not {list(map(str, wanted))} for {positional} {keywords}")
        tally["ran"] += 1
        for tensor in results:
            digest.update(_bytes(tensor))
    tally["digest"] = digest.hexdigest()[:16]
    return tally


def _bytes(tensor: torch.Tensor) -> bytes:
    """The results' bytes; every NaN is the same."""
    dense = tensor.resolve_conj().resolve_neg().contiguous()
    if dense.is_complex():
        dense = torch.view_as_real(dense)
    if dense.is_floating_point():
        dense = dense.float().nan_to_num(nan=12345.0)
    return dense.numpy().tobytes()


def _peak_mib() -> int:
    """Returns the most memory of this process. `ru_maxrss` would count that of the process that started this one."""
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM:")) // 1024


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--attempts", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="")
    parser.add_argument("--part", default="0/1", help="I/N: every Nth operator from the Ith on")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    part, parts = map(int, asked.part.split("/"))
    for name in sorted(OPERATORS)[part::parts]:
        if asked.only and name != asked.only:
            continue
        print(json.dumps({"operator": name}), flush=True)
        started = time.monotonic()
        row = {"operator": name, **attempts(name, asked.attempts, asked.seed)}
        row["seconds"] = round(time.monotonic() - started, 3)
        row["peak_mib"] = _peak_mib()
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    sys.exit(main())
