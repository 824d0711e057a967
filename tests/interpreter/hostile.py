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
import resource
import sys
import time
from collections.abc import Iterator
from typing import Any

import torch

from diffkiln.aten import dtype_of, overload, type_of
from diffkiln.interpreter.checked import checked
from diffkiln.program.ir import TensorType
from diffkiln.program.operators import OPERATORS, Refused, nbytes
from diffkiln.program.operators.promotion import INTEGER, category

CPU = torch.device("cpu")
#: What an operator may raise for values that no type shows; the public API turns it into an error of ours.
RAISES = (RuntimeError, IndexError, ValueError, TypeError, NotImplementedError)
#: Results above this are the budget's to refuse, and are not computed here.
BYTES = 32 << 20

_SHAPES = [(), (0,), (1,), (2,), (3,), (8,), (2, 3), (3, 2), (4, 4), (1, 4), (8, 8), (2, 0), (1, 4, 8), (2, 4, 4)]
_SHAPES += [(1, 3, 8, 8), (2, 4, 3, 3), (4, 2, 3, 3), (4, 4, 1, 1), (1, 4, 2, 4, 4), (4, 4, 2, 2, 2), (3, 3, 3)]
_DTYPES = ["float32"] * 6 + ["int64"] * 3 + ["int32", "bool", "float64", "bfloat16", "float16", "uint8", "int8", "int16"]
_DTYPES += ["complex64", "float8_e4m3fn"]
_INTEGERS = [0, 1, 2, 3, 4, 8, -1, -2, -3, 5, 7, 16, 31, 64, 2**16, 2**31 - 1, -(2**31), 2**31, 2**40, 2**62, 2**63 - 1]
_INTEGERS += [-(2**63)]
_FLOATS = [0.0, 1.0, 0.5, 2.0, -1.0, 1e-5, 1e-12, 1e-300, 1e300, math.inf, -math.inf, math.nan, 3.7, 1e12]
_TEXTS = ["none", "tanh", "constant", "reflect", "replicate", "circular", "valid", "same", "trunc", "floor", "ortho"]
_TEXTS += ["left", "right", "ij", "xy", "add", "multiply", "reduced", "complete", "i,j->ij", "ij,jk->ik", "...i->...", ""]
_MODES = [None, "trunc", "floor"]


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
        if kind == "str":
            return self.random.choice(_TEXTS)
        return None

    def tensor(self) -> TensorType:
        shape = self.random.choice(self._pool if self.random.random() < 0.8 else _SHAPES)
        dtype = self._dtype if self.random.random() < 0.7 else self.random.choice(_DTYPES)
        return TensorType(dtype, shape)


def kinds(name: str) -> Iterator[tuple[str, str, bool]]:
    """Yields name, type and whether it is a keyword alone, of each argument of an operator's schema."""
    for argument in overload(name)._schema.arguments:
        kind = str(argument.type)
        kind = kind.replace("Optional[Tensor]", "Tensor?") if kind.startswith("Optional[Tensor]") else kind
        if kind.startswith("Optional["):
            kind = kind[len("Optional[") : -1] + "?"
        yield argument.name, kind, argument.kwarg_only


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
        given = {key: draw.argument(kind) for key, kind, _ in parameters}
        positional = tuple(given[key] for key, _, keyword in parameters if not keyword)
        keywords = {key: given[key] for key, _, keyword in parameters if keyword and given[key] is not None}
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
            return [real(item) for item in arg] if isinstance(arg, tuple) else arg

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
        row["peak_mib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    sys.exit(main())
