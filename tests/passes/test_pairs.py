"""Every pair of passes on Flux, SDXL and a Wan-like model: legal and computed rightly, or refused by both names.

"Rightly" is: the ghost and the module come out alike, the program replays bit for bit what the module computes, and
that is as far from the untouched model as the two passes are by themselves, or nearer.
"""

from __future__ import annotations

from functools import cache
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch

from diffkiln.errors import IllegalPlan
from diffkiln.exporters.cuda import cuda_problems
from diffkiln.passes import manager
from diffkiln.passes.registry import order_problems
from tests.passes.adapters import adapter
from tests.passes.calls import call_of, cast, distance, replays, result_of
from tests.passes.plans import CPU, H200, checked, ghost, placed, prepared, real, types

MODELS = {"flux": "transformer", "sdxl": "unet", "wan": "transformer"}
BLOCKS = {
    "flux": "transformer_blocks.0",
    "sdxl": "down_blocks.1.attentions.0.transformer_blocks.0",
    "wan": "blocks.0",
}
PASSES: dict[str, dict[str, Any]] = {
    "fuse_lora": {"name": "fuse_lora"},
    "cast": {"name": "cast", "dtype": "bfloat16"},
    "fuse_qkv": {"name": "fuse_qkv"},
    "prune": {"name": "prune"},
    "merge_tokens": {"name": "merge_tokens"},
    "sparsify": {"name": "sparsify"},
    "int8": {"name": "quantize", "type": "int8_weight_only"},
    "float8_dynamic": {"name": "quantize", "type": "float8_dynamic", "granularity": "per_tensor"},
    "nf4": {"name": "quantize", "backend": "bitsandbytes", "type": "nf4", "double_quant": True},
    "layerwise_cast": {"name": "layerwise_cast"},
    "channels_last": {"name": "channels_last"},
    "compile": {"name": "compile"},
}
#: What a pass may take away, as relative L2 of the model's result for one call; 0 changes the order of sums only.
LOSS = {
    "cast": 0.5, "int8": 0.05, "float8_dynamic": 0.2, "nf4": 0.4, "layerwise_cast": 0.2, "fuse_qkv": 0.0,
    "channels_last": 0.0, "compile": 0.0,
}  # fmt: skip
#: Which tokens are alike is decided anew for values that differ a little.
FLIPS = 0.5
#: These change the model itself: what they are with another pass is compared with what they are alone.
STRUCTURE = ("fuse_lora", "prune", "merge_tokens", "sparsify")
#: What no target takes here: sparse weights are for GPUs, and what engines for them are built with is not installed.
APART = {frozenset({"sparsify", "compile"})} if any(cuda_problems()) else set()


def _entry(name: str, family: str, root: Path) -> dict[str, Any]:
    entry = {**PASSES[name], "component": MODELS[family]}
    if name == "prune":
        entry["blocks"] = [BLOCKS[family]]
    if name == "fuse_lora":
        file = root / f"{family}.safetensors"
        if not file.exists():
            adapter(file, real(family, MODELS[family]), MODELS[family], ending="to_k")
        entry["adapters"] = [{"file": str(file), "scale": 0.5}]
    return entry


def _target(*names: str):
    return H200 if "sparsify" in names else CPU


@cache
def _legal_alone(name: str, family: str, root: Path) -> bool:
    plan = ghost(family)
    try:
        checked(plan, _entry(name, family, root), target=_target(name))
    except IllegalPlan:
        return False
    return True


@cache
def _after(names: tuple[str, ...], family: str, root: Path) -> tuple[torch.Tensor, torch.nn.Module, torch.nn.Module]:
    """What the model gives after these passes, the module and its ghost."""
    component = MODELS[family]
    plan = ghost(family)
    steps = prepared(plan.class_name, *(_entry(name, family, root) for name in names))
    plan, _ = manager.run(plan, steps, [_target(*names)])
    module = real(family, component)
    manager.apply(module, component, steps)
    leaves, structure = _call(family, names)
    return result_of(module, leaves, structure), module, plan.modules[component]


def _call(family: str, names: tuple[str, ...]) -> tuple[list[Any], Any]:
    leaves, structure = call_of(family, MODELS[family])
    return (cast(leaves, torch.bfloat16) if "cast" in names else leaves), structure


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("adapters")


LONG = (pytest.mark.long,)
#: What flux has no use for is tried on sdxl in every run; the other pairs of sdxl and wan are for `make test-long`.
OF_A_UNET = {"merge_tokens", "channels_last"}
CASES = [
    pytest.param(*pair, family, marks=() if family == "flux" or (family == "sdxl" and OF_A_UNET & {*pair}) else LONG)
    for pair in combinations(PASSES, 2)
    for family in MODELS
]


@pytest.mark.parametrize(("first", "second", "family"), CASES)
def test_pair(first, second, family, root):
    names = (first, second)
    if {first, second} in APART or not (_legal_alone(first, family, root) and _legal_alone(second, family, root)):
        for target in (CPU, H200) if {first, second} in APART else (_target(*names),):
            with pytest.raises(IllegalPlan):
                checked(ghost(family), *(_entry(name, family, root) for name in names), target=target)
        return
    if _refused(first, second, family):
        with pytest.raises(IllegalPlan) as caught:
            _after(names, family, root)
        assert all(PASSES[name]["name"] in str(caught.value) for name in names)
        return
    found, module, shadow = _after(names, family, root)
    assert types(shadow) == types(module)
    leaves, structure = _call(family, names)
    replays(shadow, module, leaves, structure)
    kept = tuple(name for name in names if name in STRUCTURE)
    wanted = _after(kept, family, root)[0]
    loss = sum(LOSS[name] for name in names if name not in STRUCTURE)
    assert bool(found.isfinite().all())
    assert distance(found, wanted) <= 1e-4 + loss + (FLIPS if loss and "merge_tokens" in names else 0)


def _refused(first: str, second: str, family: str) -> bool:
    """The pairs that are illegal, in the canonical order, where both are legal alone."""
    kinds = {PASSES[first]["name"], PASSES[second]["name"]}
    if kinds == {"quantize"}:
        return True  # the first leaves the second no layer
    if "sparsify" in kinds and kinds & {"quantize", "layerwise_cast"}:
        return True
    if kinds == {"quantize", "layerwise_cast"}:
        return family != "sdxl"  # only the UNet has convolutions that are left
    return {first, second} == {"nf4", "compile"}


@pytest.mark.parametrize(
    ("first", "second"),
    [pair for pair in combinations(PASSES, 2) if len({PASSES[name]["name"] for name in pair}) == 2],
    ids=lambda name: name,
)
def test_the_other_order_is_refused_by_both_names(first, second):
    kinds = (PASSES[first]["name"], PASSES[second]["name"])
    blocks, adapters = {"blocks": ["*"]}, {"adapters": [{"file": "a.safetensors"}]}
    more = {"prune": blocks, "fuse_lora": adapters}
    entries = [{**PASSES[name], "component": "unet", **more.get(name, {})} for name in (second, first)]
    (problem,) = order_problems(placed(*entries))
    assert problem.where == "$.passes[1]"
    assert problem.reason.startswith(f"{kinds[0]} must come before {kinds[1]} ($.passes[0]): ")
    assert problem.hint == "Move it before $.passes[0]."
