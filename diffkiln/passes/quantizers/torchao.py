"""torchao: int8, int4 and float8 weights, and int8 and float8 activations."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import ClassVar

import torch

from diffkiln.interpreter.layers import Int4, store
from diffkiln.interpreter.layers.scaled import rows_are_scaled
from diffkiln.interpreter.layers.torchao import ghost_linear, quantize_linear
from diffkiln.passes.quantizers.base import Layers, Quantizer, Settings, is_ghost
from diffkiln.spec import Target

#: torch._scaled_mm multiplies matrices whose sides are multiples of this.
_FLOAT8_SIDE = 16
_FLOAT8_SM = (8, 9)


class TorchAO(Quantizer):
    """torchao's tensors stay in the layers, so that AOTInductor compiles what torchao would run.

    Except int4: torchao's own layouts need CUDA or a package that is not on PyPI, so its group-wise numbers are packed
    here, two in a byte.
    """

    package: ClassVar[str] = "torchao"
    extra: ClassVar[str] = "compile"
    options: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "int8_weight_only": (),
        "int8_dynamic": (),
        "int4_weight_only": ("group_size",),
        "float8_weight_only": (),
        "float8_dynamic": ("granularity",),
    }

    def objections(self, settings: Settings, target: Target, layers: Layers) -> Iterable[tuple[str, str]]:
        if settings.type != "float8_dynamic":
            return
        if target.device == "cpu":
            if settings.granularity == "per_row" and not rows_are_scaled():
                reason = f"on a CPU torch {torch.__version__} multiplies float8 with one scale for the whole only"
                yield (
                    f"{reason}, and this type has one a row",
                    'Set "granularity": "per_tensor", or take a later torch.',
                )
            return
        if target.capability < _FLOAT8_SM:
            yield (
                f"float8_dynamic multiplies in float8, which needs SM 8.9 or later, and {target.name} has "
                f"SM {target.compute_capability}",
                "Choose float8_weight_only or int8_dynamic.",
            )
        if settings.granularity == "per_row" and any(layer.weight.dtype != torch.bfloat16 for layer in layers.values()):
            mend = 'Put {"name": "cast", "dtype": "bfloat16", …} before it, or set "granularity": "per_tensor".'
            yield "float8_dynamic per_row is for bfloat16 weights on a GPU", mend

    def fits(self, layer: torch.nn.Linear, settings: Settings) -> bool:
        if settings.type == "int4_weight_only":
            return layer.in_features % settings.group_size == 0
        if settings.type == "float8_dynamic":
            return layer.in_features % _FLOAT8_SIDE == 0 and layer.out_features % _FLOAT8_SIDE == 0
        return True

    def quantize(self, module: torch.nn.Module, layers: Layers, settings: Settings) -> None:
        for layer in layers.values():
            if settings.type == "int4_weight_only":
                _int4(layer, settings.group_size)
            elif is_ghost(layer.weight):
                ghost_linear(layer, settings.type, settings.granularity)
            else:
                quantize_linear(layer, settings.type, settings.granularity)


def _int4(layer: torch.nn.Linear, group_size: int) -> None:
    form = Int4(group_size)
    if is_ghost(layer.weight):
        return store(layer, form)
    from torchao.quantization import IntxWeightOnlyConfig, PerGroup, quantize_

    twin = torch.nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
    twin.weight = layer.weight
    quantize_(
        twin,
        IntxWeightOnlyConfig(
            weight_dtype=getattr(torch, "int4"),  # noqa: B009  (torch's stubs lack it)
            granularity=PerGroup(group_size),
        ),
    )
    numbers = (twin.weight.qdata + 8).to(torch.uint8)  # type: ignore[union-attr]
    packed = numbers[:, 0::2] | (numbers[:, 1::2] << 4)
    scale = twin.weight.scale.to(layer.weight.dtype)  # type: ignore[union-attr, operator]
    return store(layer, form, {"weight_data": packed, "weight_scale": scale})
