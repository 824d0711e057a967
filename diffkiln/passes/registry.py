"""Passes by name, in the canonical order. A pass's module is imported when it is asked for.

To add a pass: write `diffkiln/passes/<verb>.py` with one subclass of `Pass`, add its line here at its place in the
order, and write `tests/passes/test_<verb>.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from pydantic import ValidationError

from diffkiln.errors import Problem, SpecError
from diffkiln.passes.base import Pass
from diffkiln.spec import PassEntry, problems_from, suggest

#: name → "module:Class". The order is the order in which a spec must list them.
PASSES: dict[str, str] = {
    "fuse_lora": "diffkiln.passes.fuse_lora:FuseLoRA",
    "cast": "diffkiln.passes.cast:Cast",
    "fuse_qkv": "diffkiln.passes.fuse_qkv:FuseQKV",
    "prune": "diffkiln.passes.prune:Prune",
    "merge_tokens": "diffkiln.passes.merge_tokens:MergeTokens",
    "sparsify": "diffkiln.passes.sparsify:Sparsify",
    "quantize": "diffkiln.passes.quantize:Quantize",
    "layerwise_cast": "diffkiln.passes.layerwise_cast:LayerwiseCast",
    "attention_backend": "diffkiln.passes.attention_backend:AttentionBackend",
    "channels_last": "diffkiln.passes.channels_last:ChannelsLast",
    "vae": "diffkiln.passes.vae:VAE",
    "scheduler": "diffkiln.passes.scheduler:Scheduler",
    "guidance": "diffkiln.passes.guidance:Guidance",
    "calibrate": "diffkiln.passes.calibrate:Calibrate",
    "cache_schedule": "diffkiln.passes.cache_schedule:CacheSchedule",
    "compile": "diffkiln.passes.compile:Compile",
}

_SHAPES_ARE_GONE = "an adapter is added to the original weights, by their names and shapes"
_ENGINES = "engines are built from what the other passes leave"
_STORED = "it is for weights that are not stored in another form yet"

#: Why one comes before the other, where a person may ask.
REASONS: dict[tuple[str, str], str] = {
    **{("fuse_lora", later): _SHAPES_ARE_GONE for later in list(PASSES)[1:]},
    **{("cast", later): _STORED for later in ("sparsify", "layerwise_cast")},
    **{(first, "compile"): _ENGINES for first in list(PASSES)[1:-1]},
    ("fuse_lora", "cast"): "an adapter is added at the precision that the weights were saved in",
    ("cast", "fuse_qkv"): "a fused projection would be cast again",
    ("cast", "quantize"): "quantized weights have the type that quantization gave them",
    ("fuse_qkv", "quantize"): "quantized projections cannot be concatenated",
    ("fuse_qkv", "sparsify"): "sparse projections cannot be concatenated",
    ("fuse_qkv", "layerwise_cast"): "diffusers concatenates weights in the type that they compute in",
    ("prune", "quantize"): "what is dropped need not be quantized, and patterns name the blocks that are left",
    **{("scheduler", later): "the scheduler decides how many steps there are" for later in ("guidance", "calibrate")},
    ("scheduler", "cache_schedule"): "the scheduler decides how many steps there are",
    ("guidance", "cache_schedule"): "a schedule counts the calls of a step",
    ("calibrate", "cache_schedule"): "it chooses the schedule's steps",
    ("attention_backend", "cache_schedule"): "a schedule is woven from programs that have their kernels",
    ("sparsify", "quantize"): "quantized weights cannot be made sparse",
    ("quantize", "layerwise_cast"): "layerwise_cast takes the layers that quantize leaves",
}


@dataclass(frozen=True)
class Placed:
    """A pass with its place in the spec; `key` is the component where the entry is a mapping of components."""

    index: int
    step: Pass
    key: str = ""

    @property
    def where(self) -> str:
        return f"$.passes[{self.index}]" + (f".mapping.{self.key}" if self.key else "")


def pass_class(name: str) -> type[Pass]:
    """The class of a pass that exists."""
    module, _, attribute = PASSES[name].partition(":")
    return getattr(import_module(module), attribute)


def option_models() -> dict[str, type[Pass]]:
    """Every pass by name, for the schema and the help."""
    return {name: pass_class(name).model_for() for name in PASSES}


def read_passes(entries: Sequence[PassEntry]) -> list[Placed]:
    """The passes that a spec lists, with their options checked; a mapping of components gives one for each.

    Raises:
        SpecError: unknown passes and wrong options, all together.
    """
    placed: list[Placed] = []
    problems: list[Problem] = []
    for index, entry in enumerate(entries):
        where = f"$.passes[{index}]"
        if entry.name not in PASSES:
            mend = suggest(entry.name, PASSES) or f"There are {', '.join(PASSES)}."
            problems.append(Problem(f"{where}.name", f"there is no pass {entry.name!r}", mend))
            continue
        cls = pass_class(entry.name)
        for key, options in _spread(cls, entry.options, where, problems):
            at = f"{where}.mapping.{key}" if key else where
            model = cls.model_for(options)
            try:
                placed.append(Placed(index, model.model_validate(options), key))
            except ValidationError as error:
                problems += problems_from(error, model, at)
    if problems:
        raise SpecError(problems=problems)
    return placed


def _spread(
    cls: type[Pass], options: dict[str, Any], where: str, problems: list[Problem]
) -> Iterator[tuple[str, dict[str, Any]]]:
    """The options of each component of a mapping, with those beside it as defaults; or the options as they are."""
    if "mapping" not in options or not cls.maps:
        yield "", options
        return
    common = {key: value for key, value in options.items() if key != "mapping"}
    mapping = options["mapping"]
    if "component" in common:
        problems.append(Problem(f"{where}.component", "names one component beside a mapping of several", "Remove it."))
    elif not isinstance(mapping, dict) or not mapping or not all(isinstance(row, dict) for row in mapping.values()):
        reason = 'must give options for each component, such as {"transformer": {"type": "int8_weight_only"}}'
        problems.append(Problem(f"{where}.mapping", reason))
    else:
        for component, row in mapping.items():
            if "component" in row:
                reason = "names a component again, which is the key of the mapping already"
                problems.append(Problem(f"{where}.mapping.{component}.component", reason, "Remove it."))
            else:
                yield component, {**common, **row, "component": component}


#: What counts the steps that the scheduler makes.
_COUNTS_STEPS = ("guidance", "calibrate", "cache_schedule")


def _of_the_run(first: Pass, second: Pass) -> bool:
    """Whether one is the scheduler and the other counts its steps, whatever the component."""
    names = {first.name, second.name}
    return "scheduler" in names and bool(names & set(_COUNTS_STEPS))


def order_problems(placed: Sequence[Placed]) -> list[Problem]:
    """Passes of one component that stand in the wrong order, or twice."""
    order = list(PASSES)
    problems: list[Problem] = []
    for later, item in enumerate(placed):
        for before in placed[:later]:
            if before.step.component != item.step.component and not _of_the_run(before.step, item.step):
                continue
            first, second = before.step.name, item.step.name
            if first == second and not item.step.repeats:
                problems.append(
                    Problem(item.where, f"{second} of {item.step.component} stands twice, also at {before.where}")
                )
            elif order.index(first) > order.index(second):
                reason = REASONS.get((second, first), "that is the canonical order")
                problems.append(
                    Problem(
                        item.where,
                        f"{second} must come before {first} ({before.where}): {reason}",
                        f"Move it before {before.where}.",
                    )
                )
    return problems
