"""torchao: int8, int4 and float8 weights, and int8 and float8 activations."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field

from diffkiln.errors import Incompatible, MissingDependency
from diffkiln.interpreter.layers import Int4, store
from diffkiln.interpreter.layers.scaled import rows_are_scaled
from diffkiln.interpreter.layers.torchao import joined, meta_linear, quantize_linear
from diffkiln.passes.base import Fact, Restored
from diffkiln.passes.layers import Layers, has_no_data
from diffkiln.passes.model.quantize.base import BACKEND, TYPE, Quantize
from diffkiln.spec import Target

#: torch._scaled_mm multiplies matrices whose sides are multiples of this.
_FLOAT8_SIDE = 16
_FLOAT8_SM = (8, 9)


class TorchAO(Quantize):
    """torchao's types, which engines hold."""

    package: ClassVar[str] = "torchao"
    extra: ClassVar[str] = "compile"

    backend: Literal["torchao"] = Field("torchao", description=BACKEND)

    @classmethod
    def check_restore(cls, options: Mapping[str, Any], bundle: Restored) -> None:
        if bundle.to_disk:
            raise Incompatible(
                f"diffusers cannot offload torchao weights to disk, and {options['component']} has them. Load the "
                "bundle without as_diffusers, or compile it without offloading"
            )


class TorchAOTensors(TorchAO):
    """torchao's tensors stay in the layers, so that AOTInductor compiles what torchao would run."""

    @property
    def scales(self) -> str:
        """Returns what has a scale of its own: "per_row" or "per_tensor"."""
        return "per_row"

    def quantize(self, layer: torch.nn.Linear) -> None:
        change = meta_linear if has_no_data(layer.weight) else quantize_linear
        change(layer, self._kind, self.scales)

    @classmethod
    def restore_weight(
        cls, layer: str, weight: torch.Tensor, parts: Mapping[str, torch.Tensor], options: Mapping[str, Any]
    ) -> torch.Tensor | None:
        step = cls.model_construct(**options)
        if not step.chosen(layer):
            return None
        try:
            return joined(weight, parts, step._kind, step.scales)
        except ImportError:
            raise MissingDependency("this bundle's weights are torchao's in diffusers: pip install torchao") from None


class Int8WeightOnly(TorchAOTensors):
    """int8 weights with one scale a row, symmetric; activations are untouched."""

    type: Literal["int8_weight_only"] = Field(description=TYPE)


class Int8Dynamic(TorchAOTensors):
    """int8 weights with one scale a row; activations are quantized to int8 as they come, one scale a token."""

    type: Literal["int8_dynamic"] = Field(description=TYPE)


class Int4WeightOnly(TorchAO):
    """Two weights in a byte with one scale for each `group_size` columns.

    torchao's own layouts need CUDA or a package that is not on PyPI, so its group-wise numbers are packed here.
    """

    type: Literal["int4_weight_only"] = Field(description=TYPE)
    group_size: Annotated[int, Field(ge=16, le=1024, multiple_of=2)] = Field(
        64, description="Number of columns that share one scale."
    )

    def fits(self, layer: torch.nn.Linear) -> bool:
        return layer.in_features % self.group_size == 0

    def quantize(self, layer: torch.nn.Linear) -> None:
        storage = Int4(self.group_size)
        if has_no_data(layer.weight):
            return store(layer, storage)
        from torchao.quantization import IntxWeightOnlyConfig, PerGroup, quantize_

        reduced = torch.nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
        reduced.weight = layer.weight
        quantize_(
            reduced,
            IntxWeightOnlyConfig(
                weight_dtype=getattr(torch, "int4"),  # noqa: B009  (torch's stubs lack it)
                granularity=PerGroup(self.group_size),
            ),
        )
        numbers = (reduced.weight.qdata + 8).to(torch.uint8)  # type: ignore[union-attr]
        packed = numbers[:, 0::2] | (numbers[:, 1::2] << 4)
        scale = reduced.weight.scale.to(layer.weight.dtype)  # type: ignore[union-attr, operator]
        return store(layer, storage, {"weight_data": packed, "weight_scale": scale})


class Float8WeightOnly(TorchAOTensors):
    """float8 (e4m3) weights with one scale a row."""

    type: Literal["float8_weight_only"] = Field(description=TYPE)


class Float8Dynamic(TorchAOTensors):
    """float8 (e4m3) weights and activations."""

    type: Literal["float8_dynamic"] = Field(description=TYPE)
    granularity: Literal["per_row", "per_tensor"] = Field(
        "per_row", description="One scale for each row and each token, or one for the whole tensor."
    )

    @property
    def scales(self) -> str:
        return self.granularity

    def provides(self) -> Iterable[Fact]:
        yield from super().provides()
        if self.granularity == "per_tensor":
            yield Fact("scaled_together", self.component, self.name)

    def fits(self, layer: torch.nn.Linear) -> bool:
        return layer.in_features % _FLOAT8_SIDE == 0 and layer.out_features % _FLOAT8_SIDE == 0

    def objections(self, target: Target, layers: Layers) -> Iterable[tuple[str, str]]:
        if target.device == "cpu":
            if self.granularity == "per_row" and not rows_are_scaled():
                reason = f"on a CPU torch {torch.__version__} multiplies float8 with one scale for the whole only"
                hint = 'Set "granularity": "per_tensor", or take a later torch.'
                yield f"{reason}, and this type has one a row", hint
            return
        if target.capability < _FLOAT8_SM:
            yield (
                f"float8_dynamic multiplies in float8, which needs SM 8.9 or later, and {target.name} has "
                f"SM {target.compute_capability}",
                "Choose float8_weight_only or int8_dynamic.",
            )
        if self.granularity == "per_row" and any(layer.weight.dtype != torch.bfloat16 for layer in layers.values()):
            hint = 'Put {"name": "cast", "dtype": "bfloat16", …} before it, or set "granularity": "per_tensor".'
            yield "float8_dynamic per_row is for bfloat16 weights on a GPU", hint


TYPES = (Int8WeightOnly, Int8Dynamic, Int4WeightOnly, Float8WeightOnly, Float8Dynamic)
