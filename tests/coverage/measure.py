"""One class: compiled by a backend and compared with itself, fused, and recorded at another size."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import diffkiln
from diffkiln.compiler.modules import record_module
from diffkiln.errors import DiffkilnError
from diffkiln.exporters.cache import EngineCache
from diffkiln.passes.model.fuse_qkv import FuseQKV
from diffkiln.passes.outlining import whole
from diffkiln.program import Module
from diffkiln.program.sizes import families
from diffkiln.record.constants import Constants
from diffkiln.record.structure import flatten
from diffkiln.spec import TARGETS
from tests.coverage.registry import Case, Draw

RESULTS = Path(__file__).with_name("results")
BACKENDS = ("aot_inductor", "onnx", "tensorrt")
#: The GPU that TensorRT for RTX builds for. It need not be there, and where it is not, engines are built and not run.
RTX = "rtx 4090"


def measure(
    case: Case,
    backends: tuple[str, ...] = BACKENDS,
    cache: EngineCache | None = None,
    known: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """What becomes of a class with these backends; what no backend decides may be known already."""
    apart = known or {**_recorded(case), "qkv": _fused(case)}
    return {
        "group": case.group,
        "scope": case.scope,
        "fixed": list(case.fixed),
        "note": case.note,
        **{key: apart[key] for key in ("operations", "sizes", "qkv")},
        "backends": {name: _compiled(case, name, cache) for name in backends},
    }


def read(name: str) -> dict[str, Any]:
    """What became of the class when it was last measured; nothing if it never was."""
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else {}


def write(name: str, result: dict[str, Any]) -> None:
    """Keep a result; backends that were not measured now keep what is known of them."""
    engines = read(name).get("backends", {}) | result["backends"]
    result = result | {"backends": dict(sorted(engines.items()))}
    (RESULTS / f"{name}.json").write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")


def run(case: Case, backend: str, cache: EngineCache | None = None) -> tuple[float, int]:
    """Compile a case, call it on its example and on other values; gives the greatest difference and its engines.

    Raises:
        DiffkilnError: it cannot be recorded or lowered.
    """
    module, kwargs = case.built()
    compiled = diffkiln.compile_module(module, kwargs, backend=backend, scope=case.scope, fixed=case.fixed, cache=cache)
    differences = []
    for given in (kwargs, other_values(kwargs, case)):
        with torch.inference_mode():
            wanted, found = _tensors(module(**given)), _tensors(compiled(**given))
        differences += [_difference(*pair) for pair in zip(wanted, found, strict=True)]
    return max(differences), len(compiled.regions)


def build(case: Case, backend: str, target: str, cache: EngineCache | None = None) -> int:
    """Build a case for a machine that is not this one; gives the number of engines.

    Raises:
        DiffkilnError: it cannot be recorded or lowered.
    """
    module, kwargs = case.built()
    given = {"backend": backend, "scope": case.scope, "fixed": case.fixed, "cache": cache}
    return len(diffkiln.compile_module(module, kwargs, target=target, **given).regions)


def other_values(kwargs: dict[str, Any], case: Case) -> dict[str, Any]:
    """Other numbers in the tensors that are drawn from a normal distribution; masks and positions stay."""
    draw = Draw(1)

    def other(leaf: Any) -> Any:
        drawn = isinstance(leaf, torch.Tensor) and leaf.is_floating_point() and bool((leaf != leaf.round()).any())
        return draw(*leaf.shape).to(leaf.dtype) if drawn and leaf.numel() > 1 else leaf

    return {
        name: value if name in case.fixed else torch.utils._pytree.tree_map(other, value)
        for name, value in kwargs.items()
    }


def _compiled(case: Case, backend: str, cache: EngineCache | None) -> dict[str, Any]:
    def attempt() -> dict[str, Any]:
        if backend == "tensorrt":
            return {"engines": build(case, backend, RTX, cache)}
        difference, engines = run(case, backend, cache)
        if not engines:
            return {"failure": "it calls none of its repeated blocks, so there is nothing to compile"}
        if not difference <= case.tolerance:
            return {"failure": f"differs from the original by {difference:.0e}, relative to its norm"}
        return {"engines": engines, "difference": f"{difference:.0e}"}

    return told(attempt)


def _recorded(case: Case) -> dict[str, Any]:
    """How many operations the program and its regions have, and how many of these follow the sizes of their inputs."""

    def attempt() -> dict[str, Any]:
        small, large = (_module(case, size) for size in (1, 2))
        own, other = ({id(region) for region in one.regions.values()} for one in (small, large))
        found = families([*small.regions.values(), *large.regions.values()])
        members = [{id(program) for program in family.members} for family in found]
        follow = sum(len(ids & own) for ids in members if ids & other)
        (program,) = small.programs.values()
        return {
            "operations": len(program.ops) + sum(len(region.ops) for region in small.regions.values()),
            "sizes": f"{follow} of {len(small.regions)}" if small.regions else "",
        }

    found = told(attempt)
    return found if "failure" not in found else {"operations": 0, "sizes": found["failure"]}


def _module(case: Case, size: int) -> Module:
    module, kwargs = case.built(size)
    _, recorded = record_module(module, kwargs, case.fixed, Constants())
    return whole(recorded) if case.scope == "whole" else recorded


def _fused(case: Case) -> str:
    """Whether fused projections are real: "real", or why not."""
    module, kwargs = case.built()
    if not callable(getattr(module, "fuse_qkv_projections", None)):
        return ""
    fuse = FuseQKV(component="module")
    problems = list(fuse.check_module(module, None, TARGETS["cpu-x86-64-v3"], ""))  # type: ignore[arg-type]
    if problems:
        return problems[0].reason.removeprefix(f"{case.name} ")
    fused = copy.deepcopy(module)
    try:
        notes = fuse.apply(fused)
        with torch.inference_mode():
            pairs = zip(_tensors(module(**kwargs)), _tensors(fused(**kwargs)), strict=True)
            difference = max(_difference(*pair) for pair in pairs)
    except RuntimeError as error:
        return plain(f"fails: {error}")
    return "real" if notes and difference <= case.tolerance else f"differs by {difference:.0e}"


def told(attempt: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What an attempt gives, or the reason why it fails, in one line without paths of this machine."""
    try:
        return attempt()
    except DiffkilnError as error:
        return {"failure": plain(str(error))}
    except Exception as error:
        return {"failure": plain(f"{type(error).__name__}: {error}")}


def plain(text: str) -> str:
    """A message in one line, with paths inside of packages only, and not endless."""
    text = re.sub(r"/\S*/site-packages/", "", text)
    text = re.sub(r"0x[0-9a-f]{6,}", "0x…", " ".join(text.split()))
    return text if len(text) <= 400 else f"{text[:400]}…"


def _tensors(result: Any) -> list[torch.Tensor]:
    return [leaf for leaf in flatten(result)[0] if isinstance(leaf, torch.Tensor)]


def _difference(wanted: torch.Tensor, found: torch.Tensor) -> float:
    wanted, found = wanted.double(), found.double()
    return float((found - wanted).norm() / wanted.norm().clamp(min=1e-12))
