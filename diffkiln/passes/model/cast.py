"""Cast a component's weights to another floating-point type."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field

from diffkiln.passes.base import Fact, ModelPass


class Cast(ModelPass):
    """Cast a component's weights to another floating-point type.

    The types are those of a checkpoint loaded in that type: weights that the library keeps in float32 stay float32,
    tied weights stay tied, and buffers that no checkpoint holds (rotary frequencies) keep their precision.
    """

    name: ClassVar[str] = "cast"
    summary: ClassVar[str] = "cast a component's weights to float32, bfloat16 or float16"
    before: ClassVar = {
        "sparsify": "it is for weights that are not stored in another form yet",
        "layerwise_cast": "it is for weights that are not stored in another form yet",
        "fuse_qkv": "a fused projection would be cast again",
        "quantize": "quantized weights have the type that quantization gave them",
    }
    repeats: ClassVar[bool] = True
    requires_not: ClassVar = {
        "quantized": "quantized weights have the type that quantization gave them",
        "gguf": "a GGUF file has quantized weights. The type that they compute in is the source's dtype",
    }
    examples: ClassVar = ({"name": "cast", "component": "vae", "dtype": "bfloat16"},)

    dtype: Literal["float32", "bfloat16", "float16"] = Field(description="Type to cast the weights to.")

    def provides(self) -> Iterable[Fact]:
        return [Fact("cast", self.component, self.name)]

    def apply(self, module: torch.nn.Module) -> Sequence[str]:
        dtype = getattr(torch, self.dtype)
        kept = _kept_in_float32(module, dtype)
        slots = list(_slots(module))
        times = Counter(id(table[key]) for _, table, key in slots)
        tied: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}  # holds the old ones too: no id is given twice
        count = 0
        for name, table, key in slots:
            tensor = table[key]
            if id(tensor) in tied:
                table[key] = tied[id(tensor)][1]
                continue
            final = torch.float32 if kept(name) else dtype
            new = tensor
            if tensor.is_floating_point() and tensor.dtype != final:
                new = tensor.detach().to(final)
                if isinstance(tensor, torch.nn.Parameter):
                    new = torch.nn.Parameter(new, requires_grad=False)
                table[key] = new
                count += 1
            if times[id(tensor)] > 1:
                tied[id(tensor)] = tensor, new
        return [f"{count} tensors to {self.dtype}"] if count else []


def _slots(module: torch.nn.Module) -> Iterator[tuple[str, dict[str, Any], str]]:
    """Yields the place of every parameter and persistent buffer: its name, the table, and the key in it."""
    for path, part in module.named_modules():
        tables: list[dict[str, Any]] = [part._parameters, part._buffers]
        for table in tables:
            for key, tensor in table.items():
                if tensor is not None and key not in part._non_persistent_buffers_set:
                    yield f"{path}.{key}" if path else key, table, key


def _kept_in_float32(module: torch.nn.Module, dtype: torch.dtype) -> Callable[[str], bool]:
    """Returns a function that tells if the library keeps a weight in float32 when it loads a checkpoint in `dtype`.

    diffusers takes names of modules, for every type. transformers takes patterns, `_keep_in_fp32_modules` for float16
    only and `_keep_in_fp32_modules_strict` for bfloat16 too.
    """
    from transformers import PreTrainedModel

    kept = set(getattr(module, "_keep_in_fp32_modules", None) or ())
    if not isinstance(module, PreTrainedModel):
        return lambda name: not kept.isdisjoint(name.split("."))
    kept = kept if dtype == torch.float16 else set()
    kept |= set(getattr(module, "_keep_in_fp32_modules_strict", None) or ())
    pattern = re.compile("|".join(glob.replace("*", ".*") for glob in sorted(kept)) or r"(?!)")
    return lambda name: pattern.search(name) is not None


PLUGIN = Cast
