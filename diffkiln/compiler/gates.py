"""The gates of quality of a spec, made ready before a weight is read: their prompts, metrics and backbones."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from diffkiln.compiler.metrics import About, Metric, Pair
from diffkiln.errors import DiffkilnError, Problem, SpecError
from diffkiln.plugins import load, plugins
from diffkiln.spec import Spec, suggest
from diffkiln.spec.prompts import digest_of, read_prompts
from diffkiln.spec.quality import Gate

#: A metric of the caller's: a number for images [pictures, …] from 0 to 1, float32, and their prompts.
Function = Callable[[torch.Tensor, Sequence[str]], float]


@dataclass(frozen=True)
class ReadyGate:
    """A gate with its prompts.

    Attributes:
        gate: as the spec has it.
        where: its JSON path.
        prompts: each as often as it has seeds.
        seeds: of the noise of each prompt.
        about: the size and number of the pictures, and the backbone's folder.
    """

    gate: Gate
    where: str
    prompts: tuple[str, ...]
    seeds: tuple[int, ...]
    about: About

    def keeps(self, value: float) -> bool:
        """Returns True if the gate accepts this value."""
        if self.gate.at_least is not None:
            return value >= self.gate.at_least
        return self.gate.at_most is None or value <= self.gate.at_most

    @property
    def words(self) -> str:
        """Returns the gate in words, such as "psnr at least 28"."""
        if self.gate.at_least is not None:
            return f"{self.gate.metric} at least {self.gate.at_least:g}"
        return f"{self.gate.metric} at most {self.gate.at_most:g}"

    def pinned(self) -> dict[str, Any]:
        """Returns the gate as JSON, with the prompts' digest instead of a local path, and without the backbone's."""
        given = self.gate.model_dump(mode="json", exclude_none=True, exclude={"backbone"})
        return {**given, "prompts": digest_of(dict.fromkeys(self.prompts))}

    def measured(
        self, pictures: Sequence[torch.Tensor], reference: Sequence[torch.Tensor], own: Mapping[str, Function]
    ) -> float:
        """Returns the metric's value.

        Args:
            pictures, reference: float32 [frames, 3, height, width] of each prompt, 0 to 1.
            own: metrics of the caller by name, which look at one side.
        """
        if self.gate.metric in own:
            stacked = torch.stack(list(pictures))
            images = stacked[:, 0] if stacked.shape[1] == 1 else stacked
            return float(own[self.gate.metric](images, self.prompts))
        metric: Metric = load("metrics", self.gate.metric)
        pairs = [Pair(*each) for each in zip(pictures, reference, self.prompts, strict=True)]
        return metric.score(pairs, self.about).overall


def ready_gates(spec: Spec, base: Path, own: Collection[str] = ()) -> tuple[ReadyGate, ...]:
    """Returns the gates of a spec.

    Args:
        base: the folder that relative paths start from.
        own: names of metrics that the caller brings.

    Raises:
        SpecError: prompts are missing or empty, or a metric cannot be computed; all that is wrong.
    """
    found: list[ReadyGate] = []
    problems: list[Problem] = []
    for index, gate in enumerate(spec.quality or ()):
        where = f"$.quality[{index}]"
        try:
            prompts = read_prompts(base / gate.prompts, f"{where}.prompts")
        except SpecError as error:
            problems += error.problems
            prompts = []
        ready = _ready(spec, gate, where, prompts, base)
        problems += _problems(spec, ready, base, own)
        found.append(ready)
    if problems:
        raise SpecError(problems=problems)
    return tuple(found)


def _ready(spec: Spec, gate: Gate, where: str, prompts: Sequence[str], base: Path) -> ReadyGate:
    first = spec.variants[0]
    backbone = getattr(_metric(gate.metric), "backbone", "")
    folders = {backbone: base / gate.backbone} if backbone and gate.backbone else {}
    count = len(prompts) * gate.seeds
    height, width = (value if isinstance(value, int) else 0 for value in (first.height, first.width))
    about = About(height, width, first.num_frames or 1, count, folders)
    seeds = [seed for _ in prompts for seed in range(gate.seeds)]
    repeated = [prompt for prompt in prompts for _ in range(gate.seeds)]
    return ReadyGate(gate, where, tuple(repeated), tuple(seeds), about)


def _problems(spec: Spec, ready: ReadyGate, base: Path, own: Collection[str]) -> Iterator[Problem]:
    name, where = ready.gate.metric, f"{ready.where}.metric"
    if spec.variants[0].fixes_the_prompt:
        reason = "the inputs fix the prompt, so there are no others to judge by"
        yield Problem(f"{ready.where}.prompts", reason, 'Remove the gate, or "prompt" of "fixed_prompts".')
    if name in own:
        return
    metric = _metric(name)
    if metric is None:
        known = [*plugins("metrics"), *own]
        yield Problem(where, f"there is no metric {name!r}", suggest(name, known) or f"There are {', '.join(known)}.")
    elif missing := [str(folder) for folder in ready.about.backbones.values() if not folder.is_dir()]:
        yield Problem(f"{ready.where}.backbone", f"there is no folder {missing[0]}", "Name the model's folder.")
    elif metric.backbone and not ready.gate.backbone:
        hint = f'Add "backbone", the folder of a model of the kind {metric.backbone}.'
        yield Problem(where, f"{name} needs a backbone, so it cannot be computed", hint)
    elif ready.prompts and (reason := metric.objection(ready.about)):
        yield Problem(where, f"{name} cannot be computed: it {reason}", "Choose another metric.")


def _metric(name: str) -> Metric | None:
    if name not in plugins("metrics"):
        return None
    try:
        found = load("metrics", name)
    except DiffkilnError:
        return None
    return found if isinstance(found, Metric) else None
