"""Compute some steps of the denoising run, and let the others reuse what those kept."""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Discriminator, Field, Tag

from diffkiln.errors import Incompatible, Problem
from diffkiln.passes.base import Fact, Outcome, ProgramPass, State
from diffkiln.passes.caching import (
    Kept,
    Mask,
    Split,
    deep_features,
    every,
    lanes_of,
    magnitude,
    outputs_of,
    residuals,
    split,
    symbols,
    weave,
)
from diffkiln.program import Module, Program
from diffkiln.record.components import repeated_blocks
from diffkiln.record.pipeline import Recording
from diffkiln.spec import Conflict, Target, refuse

Method = Literal[
    "mask", "fora", "first_block", "dbcache", "taylorseer", "magcache", "deepcache", "seacache", "pab", "fastercache"
]

_Steps = Annotated[
    Annotated[tuple[Literal[0, 1], ...], Tag("list")] | Annotated[Literal["calibrated"], Tag("word")],
    Discriminator(lambda value: "word" if isinstance(value, str) else "list"),
]

_BY_INTERVAL = ("interval", "start", "end")
#: method → the options that say something about it.
OPTIONS: dict[str, tuple[str, ...]] = {
    "mask": ("steps", "keep"),
    "fora": ("steps", *_BY_INTERVAL),
    "first_block": ("steps", *_BY_INTERVAL),
    "dbcache": ("steps", *_BY_INTERVAL, "front", "back"),
    "taylorseer": ("steps", *_BY_INTERVAL, "keep", "order"),
    "magcache": ("ratios", "threshold", "max_reused", "retention"),
    "deepcache": ("steps", *_BY_INTERVAL, "depth"),
}
#: The same for criteria that diffusers' hooks evaluate at each step.
DYNAMIC: dict[str, tuple[str, ...]] = {
    "first_block": ("threshold",),
    "seacache": ("threshold",),
    "pab": ("interval",),
    "fastercache": ("interval",),
}
#: Those whose hooks are inside the blocks.
_INSIDE = ("pab", "fastercache")


class CacheSchedule(ProgramPass):
    """Let steps of the denoising run reuse what earlier ones kept; which steps do is decided when it is compiled.

    `mask`: the steps that `steps` names compute, the others reuse the denoiser's last output, and call nothing; with
    `keep` "blocks", what its repeated blocks added. `fora`: every `interval`-th step computes, the others reuse what
    the blocks added. `first_block`: the same, and every step computes the first block. `dbcache`: every step computes
    the blocks in front and back, and reuses what those between added. `taylorseer`: what was kept is extrapolated by a
    polynomial of `order`. `magcache`: which steps compute follows from `ratios`, the size of what the blocks add
    against that of the step before. `deepcache`: for UNets; a step that reuses computes the last `depth` layers of the
    way up, and takes what comes from below from an earlier step.

    With `dynamic`, diffusers' own hooks decide at each step, so the bundle runs only as diffusers and what a request
    costs is not known before: `first_block` and `seacache` by a `threshold`, `pab` (pyramid attention broadcast) and
    `fastercache` every `interval` calls of an attention.
    """

    name: ClassVar[str] = "cache_schedule"
    summary: ClassVar[str] = "let some steps reuse results of earlier steps"
    after: ClassVar = {"attention_backend": "a schedule is woven from programs that have their kernels"}
    examples: ClassVar = (
        {"name": "cache_schedule", "component": "transformer", "method": "fora", "interval": 2},
        {"name": "cache_schedule", "component": "transformer", "method": "taylorseer", "interval": 3, "order": 2},
        {"name": "cache_schedule", "component": "transformer", "method": "mask", "steps": [1, 1, 0, 1, 0, 1, 0, 1]},
        {"name": "cache_schedule", "component": "unet", "method": "deepcache", "interval": 3, "depth": 2},
    )

    method: Method = Field(description="Which results are kept, and how later steps use them.")
    steps: _Steps | None = Field(
        None,
        description='One number a step, instead of an interval. 1: computes. 0: reuses. "calibrated": the pass '
        "calibrate chooses the steps.",
    )
    interval: Annotated[int, Field(ge=2)] | None = Field(
        None, description="Distance between steps that compute: 2 means every second step."
    )
    start: int = Field(1, ge=1, description="Number of first steps that always compute.")
    end: int = Field(0, ge=0, description="Number of last steps that always compute.")
    keep: Literal["output", "blocks"] = Field(
        "output", description="For mask and taylorseer: keep the denoiser's output, or the sum that its blocks add."
    )
    front: int = Field(1, ge=1, description="For dbcache: number of first blocks that every step computes.")
    back: int = Field(0, ge=0, description="For dbcache: number of last blocks that every step computes.")
    order: Literal[0, 1, 2] = Field(1, description="For taylorseer: order of the polynomial.")
    ratios: tuple[Annotated[float, Field(gt=0)], ...] | None = Field(
        None, description="For magcache: one measured ratio a step; the first is ignored."
    )
    threshold: float = Field(0.06, ge=0, description="For magcache: largest accumulated error that still allows reuse.")
    max_reused: int = Field(3, ge=1, description="For magcache: largest number of reusing steps in a row.")
    retention: float = Field(
        0.2, ge=0, lt=1, description="For magcache: share of the steps, from the first, that always compute."
    )
    depth: int = Field(1, ge=1, description="For deepcache: number of up-block layers that every step computes.")
    dynamic: bool = Field(False, description="Let diffusers' hooks decide at each step; only with as_diffusers.")

    @classmethod
    def conflicts(cls, given: Mapping[str, Any]) -> Iterator[Conflict]:
        method, dynamic = given.get("method"), given.get("dynamic") is True
        known = DYNAMIC if dynamic else OPTIONS
        if not isinstance(method, str) or method not in (*OPTIONS, *DYNAMIC):
            return
        if method not in known:
            if dynamic:
                yield ("dynamic",), refuse(f"diffusers has no hook that decides {method} at each step", "Remove it")
            else:
                yield ("method",), refuse(f"{method} decides at each step, in diffusers only", 'Add "dynamic": true')
            return
        for name in given:
            if name in cls.model_fields and name not in ("component", "method", "dynamic", *known[method]):
                yield (name,), refuse(f"says nothing about {'dynamic ' * dynamic}{method}", "Remove it")
        if dynamic:
            needed = known[method][0]
            if needed not in given:
                yield (needed,), refuse(f"is needed by dynamic {method}", "Add it")
            return
        steps = given.get("steps")
        if isinstance(steps, list | tuple) and steps and steps[0] == 0:
            yield ("steps",), refuse("its first step reuses, and nothing was kept before it", "Begin it with 1")
        needed = "ratios" if method == "magcache" else "steps" if method == "mask" else "interval"
        if needed == "interval" and "steps" in given:
            for name in _BY_INTERVAL:
                if name in given:
                    yield (name,), refuse("says nothing beside steps, which name each one", "Remove one of the two")
        elif needed not in given:
            yield (needed,), refuse(f"is needed by {method}", "Add it")

    def options(self) -> dict[str, Any]:
        """The options as JSON, without those that say nothing about the method."""
        known = DYNAMIC if self.dynamic else OPTIONS
        used = ("component", "method", "dynamic", *known[self.method])
        return {key: value for key, value in self.model_dump(mode="json").items() if key in used and value is not None}

    def provides(self) -> Iterable[Fact]:
        yield Fact("scheduled", self.component, self.name)
        if self.method in _INSIDE:
            yield Fact("hooked_inside", self.component, self.name)

    def mask(self, count: int) -> Mask:
        """Which of `count` steps compute.

        Raises:
            ValueError: the options name another number of steps.
        """
        given = self.ratios if self.method == "magcache" else None if self.is_calibrated else self.steps
        if given is not None and len(given) != count:
            raise ValueError(f"names {len(given)} steps, and {self.component} is called in {count}")
        if self.ratios is not None:
            return magnitude(self.ratios, self.threshold, self.max_reused, self.retention)
        if isinstance(self.steps, tuple):
            return tuple(bool(step) for step in self.steps)
        assert self.interval is not None, "calibrate has chosen by now"
        return every(count, self.interval, self.start, self.end)

    @property
    def is_calibrated(self) -> bool:
        """Whether a calibrate chooses the steps."""
        return self.steps == "calibrated"

    # -- from configuration --

    def check_module(self, module: torch.nn.Module, plan: State, target: Target, where: str) -> Iterable[Problem]:
        if self.component not in plan.denoisers:
            yield Problem(where, f"{self.component} is no part of the denoising run", "Choose the denoiser.")
        elif self.dynamic:
            yield from self._dynamic_problems(module, plan, where)
        else:
            yield from self._part_problems(module, where)
        calibrates = any(fact.name == "calibrated" and fact.component == self.component for fact in plan.facts)
        if calibrates or self.is_calibrated:
            yield from self._calibration_problems(calibrates, where)
        elif not self.dynamic:
            yield from self._length_problems(plan, where)

    def _part_problems(self, module: torch.nn.Module, where: str) -> Iterable[Problem]:
        """Whether the module has the part that is to be reused."""
        kind, blocks = type(module).__name__, len(repeated_blocks(module))
        if self.method == "deepcache" and not hasattr(module, "up_blocks"):
            reason = f"deepcache is for UNets, and {kind} has no skip connections"
            yield Problem(f"{where}.method", reason, "Choose dbcache, fora or taylorseer.")
        elif self.method == "deepcache" and self.depth > (layers := _layers_up(module)):
            yield Problem(f"{where}.depth", f"the way up of {kind} has {layers} layers", f"Choose 1 to {layers}.")
        elif self._of_blocks and not blocks:
            reason = f"{kind} declares no repeated blocks whose results could be kept"
            yield Problem(f"{where}.method", reason, "Choose mask or taylorseer.")
        elif self._of_blocks and self._front + self._back >= blocks:
            reason = f"{self._front} blocks in front and {self._back} in back leave none of {blocks} to reuse"
            yield Problem(where, reason, "Keep fewer.")

    def _calibration_problems(self, calibrates: bool, where: str) -> Iterable[Problem]:
        """Whether a calibrate stands before it exactly where it waits for one."""
        if not calibrates:
            yield Problem(f"{where}.steps", "no calibrate of the component stands before it", "Add one.")
        elif self.dynamic or "steps" not in OPTIONS[self.method]:
            reason = "calibrate chooses steps, and this has none to choose"
            yield Problem(f"{where}.method", reason, "Remove calibrate.")
        elif not self.is_calibrated:
            mend = 'Set them to "calibrated", and remove the interval.'
            yield Problem(f"{where}.steps", "calibrate chooses them", mend)
        elif self._order:
            reason = "costs are measured for reuse of the last value, not for an extrapolation"
            yield Problem(f"{where}.order", reason, "Set it to 0, or name the steps.")

    def _length_problems(self, plan: State, where: str) -> Iterable[Problem]:
        field = "ratios" if self.method == "magcache" else "steps"
        for count in plan.steps:
            try:
                self.mask(count)
            except ValueError as error:
                yield Problem(f"{where}.{field}", str(error), f"Give one for each of {count} steps.")

    def _dynamic_problems(self, module: torch.nn.Module, plan: State, where: str) -> Iterable[Problem]:
        source = _source_of(plan.class_name)
        if Fact("guidance_changed", self.component) in plan.facts:
            reason = "guidance rewrites the program, and with dynamic diffusers runs without one"
            yield Problem(f"{where}.dynamic", reason, "Remove guidance, or choose a fixed schedule.")
        elif not hasattr(module, "enable_cache"):
            reason = f"diffusers gives {type(module).__name__} no enable_cache"
            yield Problem(where, reason, "Choose a fixed schedule.")
        elif self.method == "seacache" and not re.search(r"cache_context\([^)]*sigma=", source):
            reason = f"{plan.class_name} does not tell seacache its steps and sigmas, so it would reuse nothing"
            yield Problem(f"{where}.method", reason, "Choose first_block.")
        elif self.method == "first_block" and "cache_context(" not in source:
            reason = f"{plan.class_name} does not tell diffusers' hooks which of its calls is which"
            yield Problem(f"{where}.method", reason, "Choose a fixed schedule.")
        elif self.method == "fastercache" and not re.search(r"\[latents\] \* 2", source):
            reason = f"fastercache splits a doubled batch, and {plan.class_name} does not guide with one"
            yield Problem(f"{where}.method", reason, "Choose first_block.")

    @property
    def _of_blocks(self) -> bool:
        by_option = self.method in ("mask", "taylorseer") and self.keep == "blocks"
        return by_option or self.method in ("fora", "first_block", "dbcache", "magcache")

    @property
    def _front(self) -> int:
        return {"first_block": 1, "dbcache": self.front}.get(self.method, 0)

    @property
    def _back(self) -> int:
        return self.back if self.method == "dbcache" else 0

    def run(self, plan: State) -> Outcome:
        if self.dynamic:
            return Outcome(plan.with_facts(self.provides()), True, ("decided at each step, by diffusers' hooks",))
        return self._foretell(plan)

    def _foretell(self, plan: State) -> Outcome:
        """Say which steps will compute; where the number of steps is known, and none reuses, nothing changes."""
        if self.is_calibrated:
            return Outcome(plan.with_facts(self.provides()), True, ("the steps are chosen when the weights are there",))
        masks = [self.mask(count) for count in plan.steps]
        notes = tuple(map(_told, masks)) or ("a schedule of the steps that call it",)
        return Outcome(plan.with_facts(self.provides()), not masks or not all(map(all, masks)), notes)

    @classmethod
    def restore_run(cls, pipe: Any, options: Mapping[str, Any]) -> None:
        _enable_cache(pipe, options)

    # -- the programs --

    @property
    def rewrites(self) -> bool:
        return not self.dynamic

    def rewrite(self, recording: Recording) -> tuple[Recording, Sequence[str]]:
        if self.dynamic:
            return replace(recording, reason=f"{self.method} decides at each step what to compute"), ()
        if self.component not in recording.modules:
            raise ValueError(f"the call never calls {self.component}")
        module = recording.modules[self.component]
        splits = self.splits(recording)
        notes: list[str] = []
        calls: list[dict[str, Program]] = []
        reuses = False
        for fixed, programs in zip(recording.fixed, recording.calls, strict=True):
            woven: dict[str, Program] = {}
            for name, call in programs.items():
                lanes = lanes_of(call, self.component, fixed.get("num_inference_steps"))
                mask = self.mask(len(lanes.sites))
                reuses = reuses or not all(mask)
                woven[name] = weave(call, self.component, lanes, mask, splits, self._order)
                if _told(mask) not in notes:
                    notes.append(_told(mask))
            calls.append(woven)
        if not reuses:
            raise ValueError(f"no step that calls {self.component} would reuse one before it")
        programs = dict(module.programs)
        for part in splits.values():
            programs |= part.programs
        module = replace(module, programs=programs)
        return replace(recording, calls=calls, modules={**recording.modules, self.component: module}), notes

    def splits(self, recording: Recording) -> dict[str, Split]:
        """The component's programs by name, each cut where this schedule keeps values."""
        module = recording.modules[self.component]
        return {name: self._split(program, module) for name, program in module.programs.items()}

    @property
    def _order(self) -> int:
        return self.order if self.method == "taylorseer" else 0

    def _split(self, program: Program, module: Module) -> Split:
        kept: tuple[Kept, ...]
        if self.method == "deepcache":
            kept = deep_features(program, self.depth)
        elif self._of_blocks:
            kept = residuals(program, module.regions, self._front, self._back)
        else:
            kept = outputs_of(program)
        if not kept:
            raise ValueError(f"{self.method} finds nothing to keep in {program.name} of {self.component}")
        return split(program, kept)


def _layers_up(module: Any) -> int:
    return sum(len(block.resnets) for block in module.up_blocks)


def _source_of(class_name: str) -> str:
    """The code of a pipeline's class; empty if diffusers does not have it."""
    kind = getattr(importlib.import_module("diffusers"), class_name, None)
    return inspect.getsource(kind) if kind is not None else ""


def _told(mask: Mask) -> str:
    return f"{sum(mask)} of {len(mask)} steps compute: {symbols(mask)}"


def _enable_cache(pipe: Any, options: Any) -> None:
    """diffusers' own hook for a schedule.

    Raises:
        Incompatible: diffusers has none that does what the bundle's programs do, or not for this model.
    """
    method, component = str(options["method"]), str(options["component"])
    config = _cache_config(pipe, method, options)
    if config is None:
        raise Incompatible(
            f"diffusers has no hook that does what this schedule of {component} does ({method}). Load the bundle "
            "without as_diffusers"
        )
    if method not in _WITHOUT_CONTEXT and "cache_context(" not in inspect.getsource(type(pipe)):
        raise Incompatible(
            f"{type(pipe).__name__} does not tell diffusers' hooks which of its calls is which, which {method} needs. "
            "Load the bundle without as_diffusers"
        )
    try:
        pipe.components[component].enable_cache(config)
    except Exception as error:  # whatever diffusers raises for a model that its hooks do not know
        kind = type(pipe.components[component]).__name__
        raise Incompatible(f"diffusers' hook for {method} does not fit {kind}: {error}") from error


def _cache_config(pipe: Any, method: str, options: Any) -> Any:
    """diffusers' configuration that means the same, or None."""
    from diffusers import hooks as library

    hooks: Any = library  # its names are found when they are asked for
    timestep = {"current_timestep_callback": lambda: pipe.current_timestep}
    match method:
        case "first_block" if options["dynamic"]:
            return hooks.FirstBlockCacheConfig(threshold=options["threshold"])
        case "seacache":
            return hooks.SeaCacheConfig(threshold=options["threshold"])
        case "pab":
            return hooks.PyramidAttentionBroadcastConfig(
                spatial_attention_block_skip_range=options["interval"], **timestep
            )
        case "fastercache":
            return hooks.FasterCacheConfig(spatial_attention_block_skip_range=options["interval"], **timestep)
        case "magcache":
            return hooks.MagCacheConfig(
                threshold=options["threshold"],
                max_skip_steps=options["max_reused"],
                retention_ratio=options["retention"],
                num_inference_steps=len(options["ratios"]),
                mag_ratios=list(options["ratios"]),
            )
        case "taylorseer" if "interval" in options and (options["keep"], options["start"], options["end"]) == _PLAIN:
            return hooks.TaylorSeerCacheConfig(
                cache_interval=options["interval"],
                disable_cache_before_step=-1,  # so that step 0 is one of the interval's
                max_order=options["order"],
                taylor_factors_dtype=torch.float32,
                use_lite_mode=True,
            )
    return None


#: Hooks of attentions, which need not know which call of a step they are in.
_WITHOUT_CONTEXT = ("pab", "fastercache")

#: What is kept, how many steps at the beginning compute, and at the end: what diffusers' TaylorSeer can do as well.
_PLAIN = ("output", 1, 0)


PLUGIN = CacheSchedule
