"""From a spec to a plan: everything that can be known before a weight is read."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from diffkiln.compiler.decoding import too_large
from diffkiln.compiler.plan import Plan
from diffkiln.errors import Problem, gather_problems
from diffkiln.guards.gate import gated
from diffkiln.guards.limits import Limits, applied
from diffkiln.models.meta import meta_pipeline
from diffkiln.models.opening import open_source
from diffkiln.models.source import SourceModel
from diffkiln.passes import manager
from diffkiln.passes.base import Fact, State
from diffkiln.passes.registry import read_passes
from diffkiln.record.call import Request
from diffkiln.record.requests import requests_of
from diffkiln.record.steps import steps_with, wanted_steps
from diffkiln.spec import Spec, Target, as_tuple, parse_spec, resolve_targets

SpecLike = Spec | str | Path | Mapping[str, Any]


@gated()
def check(spec: SpecLike, *, base: str | Path | None = None, limits: Limits | None = None) -> Plan:
    """Check a spec from configuration alone: no weight is read, nothing is built.

    Args:
        spec: a `Spec`, a path to its JSON, or the JSON as a dict.
        base: folder that the source's relative path starts from; the spec file's by default.
        limits: what the source and its adapters may ask for; the defaults of `Limits` where it is not given.

    Raises:
        SpecError: the spec or its source is wrong.
        LimitExceeded: the source asks for more than `limits`.
        IllegalPlan: passes that the model or the target does not allow, all of them.
    """
    with applied(limits), collection_paused():
        return _check(spec, base)


def _check(spec: SpecLike, base: str | Path | None) -> Plan:
    parsed = parse_spec(spec if isinstance(spec, Spec) else _spec_source(spec))
    home = _base(spec, base)
    listed, targets, source = gather_problems(
        lambda: read_passes(parsed.passes),
        lambda: resolve_targets(parsed),
        lambda: open_source(parsed.source, home),
    )
    listed = tuple(replace(item, step=item.step.prepare(home, source.pipeline_class)) for item in listed)
    pipe = meta_pipeline(source, parsed.source.dtype)
    pipe.set_progress_bar_config(disable=True)
    requests = tuple(requests_of(parsed, pipe))
    state = _state(parsed, source, pipe, requests)
    before = {name: manager.nbytes(module) for name, module in state.modules.items()}
    steps = [item.step for item in listed]
    found = [
        *_ignored(parsed, targets),
        *(problem for item in listed for problem in item.step.check_beside(parsed, steps, item.where)),
        *too_large(state, steps, targets),
    ]
    state, report = manager.run(state, listed, targets, list(dict.fromkeys(found)))
    if state.scheduler is not None:
        pipe.register_modules(scheduler=state.scheduler)
    after = before | {ran.listed.step.component: ran.nbytes for ran in report if ran.listed.step.component in before}
    return Plan(
        parsed, targets, source, requests, listed, listed, pipe, state, tuple(report), before, after,
        tuple(source.notices),
    )  # fmt: skip


def _ignored(spec: Spec, targets: Sequence[Target]) -> Iterator[Problem]:
    """Yields what the runtime section asks for and the targets would ignore."""
    if any(target.device != "cpu" for target in targets):
        return
    runtime = spec.runtime
    if runtime.offload is not None and runtime.offload.to == "host":
        reason = "on a CPU weights are used where they would wait: in the host's memory"
        yield Problem("$.runtime.offload.to", reason, 'Remove it, or set it to "disk".')
    if runtime.tf32 is not None:
        yield Problem("$.runtime.tf32", "a CPU has no TF32", "Remove it.")
    if runtime.cuda_graphs is not None:
        reason = "a graph is of a GPU's launches, and a CPU has none"
        yield Problem("$.runtime.cuda_graphs", reason, "Remove it, or choose a GPU as the target.")


def _state(spec: Spec, source: SourceModel, pipe: Any, requests: Sequence[Request]) -> State:
    """Returns the pipeline as it is before the passes."""
    state = State(
        source.class_name,
        {name: pipe.components[name] for name in source.modules},
        frozenset(Fact("gguf", name, "source.gguf") for name in source.gguf),
        variants=tuple({**request.fixed, "batch_size": request.batch_size} for request in requests),
        scheduler=getattr(pipe, "scheduler", None),
        ranged=any(entry.has_ranges for entry in as_tuple(spec.inputs)),
    )
    if len(state.denoisers) != 1:
        return state
    wanted = tuple(dict.fromkeys(wanted_steps(pipe, request) for request in requests))
    counts = tuple(dict.fromkeys(steps_with(state.scheduler, count) for count in wanted)) if all(wanted) else ()
    return replace(state, wanted_steps=wanted, steps=counts)


@contextmanager
def collection_paused() -> Iterator[None]:
    """While it lasts, cyclic garbage is left alone.

    The meta models and tokenizers are hundreds of thousands of objects that live, and Python looks through all of them
    again and again while they are made: a fifth of a check.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _spec_source(spec: Any) -> Any:
    return dict(spec) if isinstance(spec, Mapping) else Path(spec)


def _base(spec: Any, base: str | Path | None) -> Path:
    if base is not None:
        return Path(base)
    return Path(spec).expanduser().absolute().parent if isinstance(spec, (str, Path)) else Path()
