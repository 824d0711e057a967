"""A bundle is loaded and called once before it is published, in the way in which it will be used.

What is small is loaded whole, with its engines and weights, and draws. Of what is large everything but the weights is
loaded, and a call goes through all that prepares and names its tensors. A bundle that runs as diffusers alone is loaded
so, and where it is large its call is begun.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from diffkiln.bundle import Verified, open_bundle
from diffkiln.bundle.layout import TEXT
from diffkiln.compiler.plan import Plan
from diffkiln.compiler.verify.cases import Lengths, cases_of, example_of
from diffkiln.errors import BuildError, DiffkilnError, Incompatible
from diffkiln.interpreter.dtypes import dtype_of
from diffkiln.interpreter.quiet import quiet_libraries
from diffkiln.program import Program
from diffkiln.record.call import Request
from diffkiln.record.keywords import parameters_of
from diffkiln.record.refusals import code_of, refusal
from diffkiln.record.rehearsal import rehearse
from diffkiln.runtime.diffusers.loading import load_as_ordinary, with_modules
from diffkiln.runtime.executor import Executor
from diffkiln.runtime.loading import LoadOptions, load_verified
from diffkiln.runtime.opening import read_modules, read_text, read_variant
from diffkiln.runtime.pipeline import CompiledPipeline, text_end
from diffkiln.runtime.processes import Group, mesh_of
from diffkiln.runtime.processes.threads import in_threads
from diffkiln.runtime.text import TextEnd

#: Bundles with fewer bytes of weights are loaded whole, and draw.
SMALL = 64 * 2**20
_CPU = torch.device("cpu")


def try_bundle(root: Path, plan: Plan) -> None:
    """Loads the bundle in a directory that is complete, and calls it.

    Args:
        root: the directory, before it is published.
        plan: that the bundle was made of.

    Raises:
        BuildError: it cannot be loaded or called; says why.
    """
    try:
        with open_bundle(root) as bundle:
            verified = bundle.verify(roles={"program", "config"})
        with verified, quiet_libraries():
            _try(root, verified, plan)
    except BuildError:
        raise
    except DiffkilnError as error:
        raise BuildError(f"the bundle that was built cannot be used, so it is not published: {error}") from error


def _is_small(plan: Plan) -> bool:
    return sum(plan.bytes_after.values()) <= SMALL


def _try(root: Path, verified: Verified, plan: Plan) -> None:
    mesh = mesh_of(verified.manifest)
    if plan.recording.reason:
        _try_diffusers(verified, plan)
    elif mesh is None or not _may_draw(plan):
        _try_calls(verified, plan, None)
    else:
        in_threads(mesh, lambda group: _try_alone(root, plan, group))


def _try_alone(root: Path, plan: Plan, group: Group) -> None:
    """Loads and calls the bundle as one of several processes."""
    with open_bundle(root) as bundle:
        verified = bundle.verify(roles={"program", "config"})
    with verified:
        _try_calls(verified, plan, group)


def _try_calls(verified: Verified, plan: Plan, group: Group | None) -> None:
    with _loaded(verified, plan, group) as pipe:
        for request, variant in zip(plan.recording.requests, pipe.variants, strict=True):
            keywords, seed = next(iter(cases_of(variant.programs, request, Lengths(text_end(pipe), variant.programs))))
            pipe(
                **dict(request.fixed) | keywords,
                generator=torch.Generator().manual_seed(seed),
                output_type="pt",
                allow_nan=True,
            )


def _may_draw(plan: Plan) -> bool:
    return _is_small(plan) and any(target.device == "cpu" for target in plan.targets)


def _loaded(verified: Verified, plan: Plan, group: Group | None) -> CompiledPipeline:
    if _may_draw(plan):
        try:
            options = LoadOptions(allow_native=True, check_engines=False, group=group)
            return load_verified(verified, None, _CPU, options)
        except Incompatible:  # it is for another machine than this one
            pass
    modules = read_modules(verified)
    variants = [read_variant(verified, index, modules) for index in range(len(verified.manifest.pipeline.variants))]
    rows = [row for row in verified.manifest.files if row.path.startswith(TEXT) and row.role == "config"]
    tokenizers = {Path(row.path).stem: read_text(verified, row.path) for row in rows}
    text = TextEnd(tokenizers, [program for variant in variants for program in variant.programs.values()])
    return CompiledPipeline(verified.manifest.pipeline.class_name, variants, _Untouched(), text, verified)


class _Untouched(Executor):
    """Takes what a call gives its program, and makes tensors of the results' types without running it."""

    def __init__(self) -> None:
        super().__init__({}, _NoWeights(), {}, {}, _CPU)  # type: ignore[arg-type]

    def __call__(self, program: Program, inputs: Sequence[Any], *_: Any, **__: Any) -> list[torch.Tensor]:
        given = [(item, value) for item, value in zip(program.inputs, inputs, strict=True)]
        for item, value in given:
            if isinstance(value, torch.Tensor) and tuple(value.shape) != item.type.shape:
                raise BuildError(f"{item.name} is {tuple(value.shape)}, and its program takes {item.type}")
        types = [program.types[ref.name] for ref in program.outputs]
        return [torch.zeros(type_.shape, dtype=dtype_of(type_.dtype)) for type_ in types]


class _NoWeights:
    def close(self) -> None:
        """Holds nothing."""


def _try_diffusers(verified: Verified, plan: Plan) -> None:
    name = plan.source.class_name
    if not _is_small(plan) or all(target.device != "cpu" for target in plan.targets):
        pipe = with_modules(verified, {name: plan.pipe.components[name] for name in verified.manifest.weights})
        rehearse(pipe, plan.requests, ["$.inputs"] * len(plan.requests))
        return
    pipe = load_as_ordinary(verified, allow_native=True, device=_CPU, check_engines=False)
    pipe.set_progress_bar_config(disable=True)
    for request in plan.requests:
        reason = _drawn(pipe, request, False)
        if reason and _drawn(pipe, request, True):
            raise BuildError(f"{name} fails as diffusers, so the bundle is not published: {reason}. Change the inputs")


def _drawn(pipe: Any, request: Request, negative: bool) -> str:
    """Returns why the call of a pipeline fails; empty if it does not."""
    given = example_of(pipe, request, negative)
    reason = _failure(pipe, given)
    if reason and "output_type" in parameters_of(pipe):  # what it makes by itself may be more than Pillow takes
        return reason if _failure(pipe, given | {"output_type": "np"}) else ""
    return reason


def _failure(pipe: Any, given: dict[str, Any]) -> str:
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):  # some turn gradients on, on their way
            pipe(**given)
    except Exception as error:  # whatever the pipeline's own code raises
        return refusal(error) or f"in {code_of(error) or 'its code'}, without a reason"
    return ""
