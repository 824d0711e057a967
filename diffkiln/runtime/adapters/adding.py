"""What adapters add to weights: patches for the weight store, which are made anew for each mix of adapters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from diffkiln.runtime.adapters.targets import FLOAT8, FOUR_BITS, INT8, Target
from diffkiln.runtime.weights import Patch

#: The largest number of a symmetric int8.
_INT8_MOST = 127


@dataclass(frozen=True)
class Change:
    """The sum that one adapter adds to one layer: weight[rows] += factor × up · down, and bias[rows] += factor × bias.

    Attributes:
        target: The layer.
        rows: Of the stored weight.
        down: [rank, inputs], of a convolution with the kernel among the inputs.
        up: [rows, rank].
        bias: [rows], or None.
        factor: alpha / rank, or 1 where the file has no alpha.
    """

    target: Target
    rows: slice
    down: torch.Tensor
    up: torch.Tensor
    bias: torch.Tensor | None
    factor: float

    @property
    def nbytes(self) -> int:
        tensors = [self.down, self.up, *([] if self.bias is None else [self.bias])]
        return sum(tensor.numel() * tensor.itemsize for tensor in tensors)


#: A change with its scale in a mix.
Scaled = tuple[float, Change]


def patches_of(mix: Sequence[Scaled]) -> list[tuple[Target, Patch]]:
    """Returns patches that add a mix, each with a layer that it changes; layers that nothing reads need none.

    The order of the mix decides the last bits of the sums.
    """
    by_weight: dict[tuple[str, str], list[Scaled]] = {}
    by_bias: dict[tuple[str, str], list[Scaled]] = {}
    for scale, change in mix:
        target = change.target
        if scale == 0 or not target.used:
            continue
        by_weight.setdefault((target.component, target.weight), []).append((scale, change))
        if change.bias is not None:
            by_bias.setdefault((target.component, target.bias), []).append((scale, change))
    found = [(rows[0][1].target, _weight_patch(rows)) for rows in by_weight.values()]
    return found + [(rows[0][1].target, _bias_patch(rows)) for rows in by_bias.values()]


def _weight_patch(mix: Sequence[Scaled]) -> Patch:
    target = mix[0][1].target
    if target.storage is not None:
        names = tuple(f"{target.layer}.weight_{part}" for part in target.storage.parts(target.shape, torch.float32))
        return Patch(names, lambda tensors: _round_again(tensors, target, mix))
    if target.form != INT8:
        return Patch((target.weight,), lambda tensors: _add(tensors[target.weight], mix))
    return Patch((target.weight, target.scale), lambda tensors: _requantize(tensors, target, mix))


def _bias_patch(mix: Sequence[Scaled]) -> Patch:
    name = mix[0][1].target.bias

    def apply(tensors: Mapping[str, torch.Tensor]) -> None:
        for scale, change in mix:
            if change.bias is not None:
                part = tensors[name][change.rows]
                part.copy_(part.float() + scale * change.factor * change.bias.to(part.device).float())

    return Patch((name,), apply)


def _add(weight: torch.Tensor, mix: Sequence[Scaled]) -> None:
    """Adds a mix in place, in float32 at least; the sum is rounded once to the weight's type."""
    for rows, changes in _by_rows(mix):
        part = weight[rows]
        down, up = _factors(changes, part)
        if part.dtype == down.dtype and part.dim() == 2 and part.is_contiguous():
            part.addmm_(up, down)
        else:
            part.copy_(part.to(down.dtype) + (up @ down).reshape(part.shape))


def _requantize(tensors: Mapping[str, torch.Tensor], target: Target, mix: Sequence[Scaled]) -> None:
    """Adds a mix to an int8 weight and rounds the changed rows again, each with a new scale."""
    numbers, scales = tensors[target.weight], tensors[target.scale]
    for rows, changes in _by_rows(mix):
        whole = numbers[rows].float() * scales[rows].float().reshape(-1, 1)
        down, up = _factors(changes, whole)
        whole.addmm_(up, down)
        new = (whole.abs().amax(1, keepdim=True) / _INT8_MOST).clamp_min(torch.finfo(torch.float32).tiny)
        new = new.to(scales.dtype)
        scales[rows].copy_(new.reshape(scales[rows].shape))
        numbers[rows].copy_((whole / new.float()).round_().clamp_(-_INT8_MOST, _INT8_MOST))


def _round_again(tensors: Mapping[str, torch.Tensor], target: Target, mix: Sequence[Scaled]) -> None:
    """Adds a mix to a weight in four bits, and rounds it again: the changed rows, or all where blocks go over rows."""
    storage, shape = target.storage, target.shape
    if storage is None:
        return
    parts = {part: tensors[f"{target.layer}.weight_{part}"] for part in storage.parts(shape, torch.float32)}
    whole = storage.restore(parts, shape, torch.float32)
    for rows, changes in _by_rows(mix):
        down, up = _factors(changes, whole)
        whole[rows].addmm_(up, down)
        if parts["data"].dim() > 1:
            own = {part: tensor[rows] for part, tensor in parts.items()}
            _write(storage.rounded(whole[rows], own), own)
    if parts["data"].dim() == 1:
        _write(storage.rounded(whole, parts), parts)


def _write(new: Mapping[str, torch.Tensor], parts: Mapping[str, torch.Tensor]) -> None:
    for part, tensor in new.items():
        parts[part].copy_(tensor)


def _by_rows(mix: Sequence[Scaled]) -> list[tuple[slice, list[Scaled]]]:
    found: dict[tuple[int, int], list[Scaled]] = {}
    for scale, change in mix:
        found.setdefault((change.rows.start, change.rows.stop), []).append((scale, change))
    return [(slice(*rows), changes) for rows, changes in found.items()]


def _factors(mix: Sequence[Scaled], weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the factors of a mix side by side: down [ranks, inputs] and up [rows, ranks] with the scales in it."""
    dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
    downs = [change.down.to(weight.device, dtype) for _, change in mix]
    ups = [change.up.to(weight.device, dtype) * (scale * change.factor) for scale, change in mix]
    if len(mix) == 1:
        return downs[0], ups[0]
    return torch.cat(downs), torch.cat(ups, 1)


def rounds(target: Target) -> bool:
    """Returns True if a sum is rounded to a quantized type."""
    return target.form in (FLOAT8, FOUR_BITS, INT8)
