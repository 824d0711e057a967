"""Ghosts and real modules of tiny pipelines, and passes to run on them."""

from __future__ import annotations

import copy
import tempfile
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import diffusers
import torch

from diffkiln.models.meta import load_module, meta_pipeline
from diffkiln.models.opening import open_source
from diffkiln.models.source import SourceModel
from diffkiln.models.weights import weights_of
from diffkiln.passes import manager
from diffkiln.passes.base import State
from diffkiln.passes.registry import ListedPass, read_passes
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


def ghost(family: str) -> State:
    """A fresh plan; passes change its modules."""
    model = source(family)
    pipe = meta_pipeline(model)
    return State(model.class_name, {name: pipe.components[name] for name in model.modules})


def real(family: str, component: str) -> torch.nn.Module:
    return load_module(source(family), component)


def placed(*passes: dict[str, Any]) -> list[ListedPass]:
    return read_passes([PassEntry.model_validate(item) for item in passes])


def prepared(class_name: str, *passes: dict[str, Any]) -> list[ListedPass]:
    """The passes with their files found, as the compiler does it."""
    kind = getattr(diffusers, class_name, object)
    return [replace(item, step=item.step.prepare(Path.cwd(), kind)) for item in placed(*passes)]


def checked(plan: State, *passes: dict[str, Any], target: Target = CPU) -> list[ListedPass]:
    """The passes, which are legal. They are tried out on a copy of the plan."""
    steps = prepared(plan.class_name, *passes)
    tried = {name: outline(module) for name, module in plan.modules.items()}
    manager.run(replace(plan, modules=tried), steps, [target])
    return steps


def outline(module: torch.nn.Module) -> torch.nn.Module:
    """A copy of the module tree that shares its tensors."""
    tables = [table for part in module.modules() for table in (part._parameters, part._buffers)]
    tensors = [tensor for table in tables for tensor in table.values() if tensor is not None]
    return copy.deepcopy(module, {id(tensor): tensor for tensor in tensors})


def types(module: torch.nn.Module) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    return {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in weights_of(module)}


def both(
    family: str, component: str, *passes: dict[str, Any], target: Target = CPU
) -> tuple[torch.nn.Module, torch.nn.Module]:
    """The ghost and the real module after the passes."""
    plan = ghost(family)
    steps = prepared(plan.class_name, *passes)
    plan, _ = manager.run(plan, steps, [target])
    module = real(family, component)
    manager.apply(module, component, steps)
    return plan.modules[component], module
