"""The call, rewritten: a step that computes calls the keeping program, a step that reuses calls less, or nothing."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from diffkiln.passes.caching.sections import Split
from diffkiln.passes.caching.steps import Mask
from diffkiln.program import CALL, STEP, Builder, Op, Program, Ref, prune

#: A step that computed, and what it kept.
_Past = tuple[int, tuple[Ref, ...]]


@dataclass(frozen=True)
class CallSites:
    """The places where a call program calls a component: its steps, and the calls of each.

    A step with two calls, with and without the prompt, has two branches, each with its own kept values.
    """

    sites: tuple[tuple[int, ...], ...]  # the places of each step's calls

    @property
    def step_of(self) -> Mapping[int, tuple[int, int]]:
        """Returns the step and the branch of each call, by its place."""
        return {at: (step, branch) for step, sites in enumerate(self.sites) for branch, at in enumerate(sites)}


def call_sites_of(call: Program, component: str, wanted: int | None = None) -> CallSites:
    """Returns the steps that call the component, numbered from 0.

    If the call marks no steps, each call is a step. If the number of calls is a multiple of the `wanted` number of
    steps, that many calls are one step.
    """
    steps: list[list[int]] = [[]]
    for at, op in enumerate(call.ops):
        if op.name == STEP:
            steps.append([])
        elif op.name == CALL and op.attrs["component"] == component:
            steps[-1].append(at)
    if len(steps) == 1:
        (sites,) = steps
        per = len(sites) // wanted if wanted and sites and len(sites) % wanted == 0 else 1
        steps = [sites[at : at + per] for at in range(0, len(sites), per)]
    return CallSites(tuple(tuple(sites) for sites in steps if sites))


def apply_schedule(
    call: Program, component: str, call_sites: CallSites, mask: Mask, splits: Mapping[str, Split], order: int = 0
) -> Program:
    """Rewrites a call so that the steps that the mask leaves out reuse kept values.

    Args:
        call: the pipeline's call.
        component: whose calls are rewritten.
        branches: where they are.
        mask: which of its steps compute; the first does.
        splits: of the component's programs, by name.
        order: of the Taylor polynomial through what was kept; 0 reuses the last.
    """
    edit = Builder(call)
    history: dict[tuple[int, str], list[_Past]] = {}
    for at, (step, branch) in call_sites.step_of.items():
        op = call.ops[at]
        part = splits[op.attrs["program"]]
        past = history.setdefault((branch, op.attrs["program"]), [])
        stem = f"%{component}.{step}.{branch}"
        if mask[step] or not past:
            keeping = with_kept(edit, op, part, stem)
            edit.replace(at, keeping)
            past.insert(0, (step, keeping.results[-part.kept :]))
            continue
        recent = past[: order + 1]
        taken = [_extrapolated(edit, at, step, recent, number, f"{stem}.foretold") for number in range(part.kept)]
        if part.reusing is not None:
            args = (*(op.args[position] for position in part.takes), *taken)
            edit.replace(at, replace(op, args=args, attrs={**op.attrs, "program": part.reusing.name}))
            continue
        edit.replace(at)
        for name, kept in zip(op.outputs, taken, strict=True):
            edit.replace_uses(name, kept)
    return _keep_only_what_is_read(edit.build(), splits)


def with_kept(edit: Builder, op: Op, part: Split, stem: str) -> Op:
    """Returns a call of the keeping program in the place of one of the whole: what it keeps comes after its results."""
    fresh = {f"{stem}.kept.{number}": type_ for number, type_ in enumerate(part.kept_types)}
    attrs = {**op.attrs, "program": part.keeping.name}
    kept = edit.op(op.name, op.args, fresh, attrs=attrs)
    return replace(kept, outputs=(*op.outputs, *kept.outputs))


def coefficients(step: int, known: Sequence[int]) -> list[float]:
    """Returns the weights, at a later step, of the values kept at these steps, the latest first.

    They belong to the Taylor polynomial whose derivatives are backward differences, one more order for each value.

    Source: Liu and others, "From Reusable to Forecastable: Accelerating Diffusion Models with TaylorSeers", 2025,
    https://arxiv.org/abs/2503.06923.
    """
    differences = [[1.0 if row == column else 0.0 for column in range(len(known))] for row in range(len(known))]
    weights, row = [0.0] * len(known), differences
    for order in range(len(known)):
        factor = (step - known[0]) ** order / math.factorial(order)
        weights = [weight + factor * value for weight, value in zip(weights, row[0], strict=True)]
        row = [
            [(a - b) / (known[index] - known[index + 1]) for a, b in zip(row[index], row[index + 1], strict=True)]
            for index in range(len(row) - 1)
        ]
    return weights


def _extrapolated(edit: Builder, at: int, step: int, past: Sequence[_Past], number: int, stem: str) -> Ref:
    """Returns the kept value at this step: the last one, or a prediction from the last ones."""
    values = [kept[number] for _, kept in past]
    if len(values) == 1:
        return values[0]
    type_, weights = edit.type_of(values[0]), coefficients(step, [then for then, _ in past])
    sums = [edit.op("aten.mul.Tensor", (values[0], weights[0]), {f"{stem}.{number}.0": type_})]
    for index, (value, weight) in enumerate(zip(values[1:], weights[1:], strict=True), 1):
        args = (*sums[-1].results, value)
        sums.append(edit.op("aten.add.Tensor", args, {f"{stem}.{number}.{index}": type_}, {"alpha": weight}))
    edit.insert(at, *sums)
    return sums[-1].results[0]


def _keep_only_what_is_read(call: Program, splits: Mapping[str, Split]) -> Program:
    """Replaces steps whose kept values are never read by calls of the whole program."""
    whole = {part.keeping.name: (name, part.kept) for name, part in splits.items()}
    read = set(call.uses())

    def plain(op: Op) -> Op:
        name, kept = whole.get(op.attrs["program"], ("", 0)) if op.name == CALL else ("", 0)
        if not kept or not read.isdisjoint(op.outputs[-kept:]):
            return op
        return replace(op, outputs=op.outputs[:-kept], attrs={**op.attrs, "program": name})

    return prune(Builder(call).map(plain).build())
