"""Ghosts and real modules of tiny pipelines, and passes to run on them."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from diffkiln.passes import manager
from diffkiln.passes.base import Plan
from diffkiln.passes.registry import Placed, read_passes
from diffkiln.record.components import weights_of
from diffkiln.record.ghosts import ghost_pipeline, load_module
from diffkiln.record.source import SourceModel, open_source
from diffkiln.spec import PassEntry, Source, Target, TargetSpec, resolve_target
from tests.pipelines import build_folder

CPU = resolve_target(TargetSpec(device="cpu"))
H200 = resolve_target(TargetSpec(device="cuda", gpu="nvidia-h200"))
A100 = resolve_target(TargetSpec(device="cuda", gpu="nvidia-a100-80gb-sxm"))


@cache
def _root() -> Path:
    return Path(tempfile.mkdtemp(prefix="diffkiln-passes-"))


@cache
def source(family: str) -> SourceModel:
    return open_source(Source(model=str(build_folder(family, _root()))), Path())


def ghost(family: str) -> tuple[Plan, FakeTensorMode]:
    """A fresh plan; passes change its modules."""
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    model = source(family)
    pipe = ghost_pipeline(model, fake)
    return Plan(model.class_name, {name: pipe.components[name] for name in model.modules}), fake


def real(family: str, component: str) -> torch.nn.Module:
    return load_module(source(family), component)


def placed(*passes: dict[str, Any]) -> list[Placed]:
    return read_passes([PassEntry.model_validate(item) for item in passes])


def prepared(class_name: str, *passes: dict[str, Any]) -> list[Placed]:
    """The passes with their files found, as the compiler does it."""
    kind = getattr(diffusers, class_name)
    return [replace(item, step=item.step.prepare(Path.cwd(), kind)) for item in placed(*passes)]


def checked(plan: Plan, *passes: dict[str, Any], target: Target = CPU) -> list[Placed]:
    steps = prepared(plan.class_name, *passes)
    manager.check(plan, steps, [target])
    return steps


def types(module: torch.nn.Module) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    return {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in weights_of(module)}


def both(
    family: str, component: str, *passes: dict[str, Any], target: Target = CPU
) -> tuple[torch.nn.Module, torch.nn.Module]:
    """The ghost and the real module after the passes."""
    plan, fake = ghost(family)
    steps = checked(plan, *passes, target=target)
    plan, _ = manager.run(plan, steps, fake)
    module = real(family, component)
    manager.apply(module, component, steps)
    return plan.modules[component], module
