"""torchao's tensors in linear layers. Nothing else of `layers` imports a library besides torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch.utils._python_dispatch import _disable_current_modes

#: Type → torchao's configuration of it, and the options that differ from its own defaults.
_CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "int8_weight_only": ("Int8WeightOnlyConfig", {"version": 2}),
    "int8_dynamic": ("Int8DynamicActivationInt8WeightConfig", {"version": 2}),
}
TYPES = (*_CONFIGS, "float8_weight_only", "float8_dynamic")


#: torchao's configurations by name, and the types that they are.
_NAMES = {
    "Int8WeightOnlyConfig": "int8_weight_only",
    "Int8DynamicActivationInt8WeightConfig": "int8_dynamic",
    "Float8WeightOnlyConfig": "float8_weight_only",
    "Float8DynamicActivationFloat8WeightConfig": "float8_dynamic",
}


def type_in(quantization: Any) -> tuple[str, str]:
    """Returns the type and the granularity that a saved model's `quantization_config` states.

    Raises:
        ValueError: it is another type, by its name.
    """
    asked = quantization.get("quant_type") if isinstance(quantization, Mapping) else None
    asked = asked.get("default", asked) if isinstance(asked, Mapping) else asked
    name = str(asked.get("_type")) if isinstance(asked, Mapping) else str(asked)
    if name not in _NAMES or not isinstance(asked, Mapping):
        raise ValueError(name[:60])
    data = asked.get("_data")
    grain = data.get("granularity") if isinstance(data, Mapping) else None
    grains = grain if isinstance(grain, list) else [grain]
    whole = any(isinstance(each, Mapping) and each.get("_type") == "PerTensor" for each in grains)
    return _NAMES[name], "per_tensor" if whole else "per_row"


def quantize_linear(layer: torch.nn.Linear, kind: str, granularity: str = "per_row") -> None:
    """Gives a linear layer one of torchao's weights, in place; also on the meta device.

    Args:
        kind: one of `TYPES`.
        granularity: of float8_dynamic.
    """
    if kind in _CONFIGS:
        import torchao.quantization

        name, options = _CONFIGS[kind]
        torchao.quantization.quantize_(layer, getattr(torchao.quantization, name)(**options))
    else:
        grain = granularity if kind == "float8_dynamic" else "per_row"
        weight = _float8(layer.weight.detach(), grain, dynamic=kind == "float8_dynamic")
        layer.weight = torch.nn.Parameter(weight, requires_grad=False)


def _float8(weight: torch.Tensor, granularity: str, *, dynamic: bool) -> torch.Tensor:
    """Quantizes as torchao's configurations for float8 do, with PyTorch's own kernel, and two differences.

    Rows of zeros, which those turn into NaN, stay zeros. The result also does not depend on the GPU of the compiling
    machine, which may have none.
    """
    from torchao.float8.inference import Float8MMConfig
    from torchao.quantization import Float8Tensor, PerRow, PerTensor
    from torchao.quantization.quantize_.common import KernelPreference
    from torchao.quantization.quantize_.workflows import QuantizeTensorToFloat8Kwargs

    grain = PerRow() if granularity == "per_row" else PerTensor()
    # The least magnitude that a scale is made for: its 448th part must be a number of the weight's type.
    least = torch.finfo(torch.float16).tiny if weight.dtype == torch.float16 else 1e-12
    common = {"float8_dtype": torch.float8_e4m3fn, "granularity": grain, "hp_value_lb": least}
    common["kernel_preference"] = KernelPreference.TORCH
    activations = QuantizeTensorToFloat8Kwargs(**common) if dynamic else None
    config = Float8MMConfig(use_fast_accum=True) if dynamic else None
    return Float8Tensor.from_hp(weight, mm_config=config, act_quant_kwargs=activations, **common)


@dataclass(frozen=True)
class _Stored:
    """The parts in which a weight of one shape and type is stored: the class around them, tensors, and other values."""

    kind: Any
    parts: Mapping[str, tuple[tuple[int, ...], torch.dtype]]
    storage: Any


@lru_cache(maxsize=256)
def _stored(shape: tuple[int, int], dtype: torch.dtype, kind: str, granularity: str) -> _Stored:
    """Finds out how torchao stores a weight, by quantizing an empty layer of that shape."""
    with _disable_current_modes():
        layer = torch.nn.Linear(shape[1], shape[0], bias=False, device="meta", dtype=dtype)
        quantize_linear(layer, kind, granularity)
        weight: Any = layer.weight
        names, storage = weight.__tensor_flatten__()
        parts = {name: getattr(weight, name) for name in names}
    specs = {name: (tuple(part.shape), part.dtype) for name, part in parts.items()}
    return _Stored(type(weight), specs, storage)


def meta_linear(layer: torch.nn.Linear, kind: str, granularity: str) -> None:
    """Quantizes a layer of a meta model as `quantize_linear` does: the same parts, without computing anything."""
    weight = layer.weight
    stored = _stored((weight.shape[0], weight.shape[1]), weight.dtype, kind, granularity)
    parts = {name: weight.new_empty(shape, dtype=dtype) for name, (shape, dtype) in stored.parts.items()}
    made: Any = joined(weight, parts, kind, granularity)
    made._is_param = True  # as nn.Parameter makes it, without its way through the dispatcher
    layer._parameters["weight"] = made


def joined(parameter: torch.Tensor, parts: Mapping[str, torch.Tensor], kind: str, granularity: str) -> torch.Tensor:
    """Returns torchao's tensor around its stored parts.

    Args:
        parameter: the weight that it stands for, of which shape and type count.
        parts: the plain tensors inside of it, by attribute.

    Raises:
        ValueError: torchao stores the type as other parts.
    """
    rows, columns = parameter.shape
    stored = _stored((rows, columns), parameter.dtype, kind, granularity)
    given = {name: (tuple(part.shape), part.dtype) for name, part in parts.items()}
    if given != stored.parts:
        raise ValueError(f"torchao stores {kind} weights as {stored.parts}, the bundle as {given}")
    return stored.kind.__tensor_unflatten__(dict(parts), stored.storage, torch.Size((rows, columns)), (columns, 1))
