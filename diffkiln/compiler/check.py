"""From a spec to a plan: everything that can be known before a weight is read."""

from __future__ import annotations

import gc
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from diffkiln.compiler.choosing import choices_of, open_to_measurement, settled
from diffkiln.compiler.decoding import too_large
from diffkiln.compiler.fitting import open_to_memory
from diffkiln.compiler.gates import ready_gates
from diffkiln.compiler.plan import Plan
from diffkiln.errors import Problem, SpecError, gather_problems
from diffkiln.guards.gate import gated
from diffkiln.guards.limits import Limits, applied
from diffkiln.models.meta import meta_pipeline
from diffkiln.models.opening import open_source
from diffkiln.models.quantized import UNCOMPILED
from diffkiln.models.source import SourceModel
from diffkiln.passes import manager
from diffkiln.passes.base import Fact, State
from diffkiln.passes.registry import ListedPass, read_passes, with_implied
from diffkiln.record.call import Request
from diffkiln.record.rehearsal import rehearse
from diffkiln.record.requests import paths_of_inputs, requests_of
from diffkiln.record.steps import steps_with, wanted_steps
from diffkiln.spec import Spec, Target, as_tuple, parse_spec, resolve_targets

#: Names that files of a bundle's programs have already.
_TAKEN = ("call", "operators")
SpecLike = Spec | str | Path | Mapping[str, Any]


@gated()
def check(spec: SpecLike, *, base: str | Path | None = None, limits: Limits | None = None) -> Plan:
    """Checks a spec from configuration alone: no weight is read, nothing is built.

    Args:
        spec: a `Spec`, a path to its JSON, or the JSON as a dict.
        base: the folder that the source's relative path starts from; by default the spec file's folder.
        limits: limits for the source and its adapters; by default those of `Limits()`.

    Raises:
        SpecError: the spec or its source is wrong.
        LimitExceeded: the source asks for more than `limits`.
        IllegalPlan: the model or the target does not allow some passes; all of them are listed.
    """
    with applied(limits), collection_paused():
        return check_with(spec, base)


def check_with(spec: SpecLike, base: str | Path | None, metrics: Collection[str] = ()) -> Plan:
    """Checks as `check` does, where a gate may name metrics that the caller brings.

    What the spec leaves to measurement is the first way that is legal.
    """
    parsed, home = parsed_of(spec), base_of(spec, base)
    choices = choices_of(parsed, lambda one: checked(one, home, metrics))
    plan = checked(settled(parsed, choices), home, metrics)
    return plan.noting(open_to_measurement(choices)).noting(open_to_memory(plan))


def checked(parsed: Spec, home: Path, metrics: Collection[str]) -> Plan:
    """Checks a spec that leaves nothing to measurement; its relative paths start from `home`."""
    listed, targets, source, gates = gather_problems(
        lambda: read_passes(parsed.passes),
        lambda: resolve_targets(parsed),
        lambda: open_source(parsed.source, home),
        lambda: ready_gates(parsed, home, metrics),
    )
    listed = tuple(gather_problems(*(partial(_prepared, item, home, source.pipeline_class) for item in listed)))
    source = with_added(source, listed)
    pipe = meta_pipeline(source, parsed.source.dtype)
    pipe.set_progress_bar_config(disable=True)
    requests = tuple(requests_of(parsed, pipe))
    rehearse(pipe, requests, paths_of_inputs(parsed))
    state = _state(parsed, source, pipe, requests)
    listed = with_implied(listed, parsed, state)
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
        tuple(source.notices), gates=gates,
    )  # fmt: skip


def _ignored(spec: Spec, targets: Sequence[Target]) -> Iterator[Problem]:
    """Yields what the runtime section asks for and the targets would ignore."""
    if any(target.device != "cpu" for target in targets):
        return
    runtime = spec.runtime
    if runtime.offload is not None and runtime.offload.to == "host":
        reason = "on a CPU weights are used where they would wait: in the host's memory"
        yield Problem("$.runtime.offload.to", reason, 'Remove it, or set it to "disk".')
    if runtime.offload is not None and runtime.offload.strategy == "auto" and runtime.offload.max_memory is None:
        reason = "auto keeps within the memory of a GPU, and a CPU has none of its own"
        yield Problem("$.runtime.offload.max_memory", reason, 'Set it, such as "8GiB".')
    if runtime.tf32 is not None:
        yield Problem("$.runtime.tf32", "a CPU has no TF32", "Remove it.")
    if runtime.cuda_graphs is not None:
        reason = "a graph is of a GPU's launches, and a CPU has none"
        yield Problem("$.runtime.cuda_graphs", reason, "Remove it, or choose a GPU as the target.")


def _prepared(item: ListedPass, home: Path, pipeline_class: type) -> ListedPass:
    """Returns a pass that has read the files it names. An error names the pass's place in the spec."""
    try:
        return replace(item, step=item.step.prepare(home, pipeline_class))
    except SpecError as error:
        found = error.problems or (Problem("", str(error)),)
        raise type(error)(problems=[replace(each, where=_path_of(each.where, item.where)) for each in found]) from error


def _path_of(where: str, entry: str) -> str:
    """Returns a place in the spec; one that begins with a dot is within the pass's entry."""
    return entry + where if not where or where.startswith(".") else where


def with_added(source: SourceModel, listed: Sequence[ListedPass]) -> SourceModel:
    """Returns the source with the components that prepared passes add.

    Raises:
        SpecError: the pipeline, or an earlier pass, has a component of the same name.
    """
    problems = []
    for item, each in [(one, each) for one in listed for each in one.step.added()]:
        if each.name in source.components or hasattr(source.pipeline_class, each.name) or each.name in _TAKEN:
            reason = (
                f"{each.name!r} is taken in {source.class_name} and its bundles, and {item.step.name} adds a component"
            )
            problems.append(Problem(f"{item.where}.component", reason, "Give the new one a name of its own."))
        else:
            source = source.adding([each])
    if problems:
        raise SpecError(problems=problems)
    return source


def _state(spec: Spec, source: SourceModel, pipe: Any, requests: Sequence[Request]) -> State:
    """Returns the pipeline as it is before the passes."""
    state = State(
        source.class_name,
        {name: pipe.components[name] for name in source.modules},
        frozenset(_facts(source)),
        variants=tuple({**request.fixed, "batch_size": request.batch_size} for request in requests),
        scheduler=getattr(pipe, "scheduler", None),
        ranged=any(entry.has_ranges for entry in as_tuple(spec.inputs)),
        added=frozenset(each.name for each in source.added),
    )
    if len(state.denoisers) != 1:
        return state
    wanted = tuple(dict.fromkeys(wanted_steps(pipe, request) for request in requests))
    counts = tuple(dict.fromkeys(steps_with(state.scheduler, count) for count in wanted)) if all(wanted) else ()
    return replace(state, wanted_steps=wanted, steps=counts)


def _facts(source: SourceModel) -> Iterator[Fact]:
    """Yields what is true of components before any pass."""
    yield from (Fact("gguf", name, "source.gguf") for name in source.gguf)
    for name, part in source.components.items():
        if part.quantized is None:
            continue
        yield Fact("quantized", name, "source")
        if part.quantized.backend == "bitsandbytes":
            yield Fact("quantized_by_bitsandbytes", name, "source", "uncompilable", UNCOMPILED)


@contextmanager
def collection_paused() -> Iterator[None]:
    """Pauses Python's cyclic garbage collection inside the `with` block.

    Meta models and tokenizers are hundreds of thousands of live objects. Python would look through all of them again
    and again while they are made: a fifth of a check.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def parsed_of(spec: SpecLike) -> Spec:
    """Returns the spec, read from wherever it is."""
    return parse_spec(spec if isinstance(spec, Spec) else _spec_source(spec))


def _spec_source(spec: Any) -> Any:
    return dict(spec) if isinstance(spec, Mapping) else Path(spec)


def base_of(spec: Any, base: str | Path | None) -> Path:
    """Returns the folder that the paths of a spec start from: `base`, or else that of the spec's file."""
    if base is not None:
        return Path(base)
    return Path(spec).expanduser().absolute().parent if isinstance(spec, (str, Path)) else Path()
