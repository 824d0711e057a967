"""The call, rewritten: a step that computes calls the keeping program, a step that reuses calls less, or nothing."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from diffkiln.passes.caching.sections import Split
from diffkiln.passes.caching.steps import Mask
from diffkiln.program import CALL, STEP, Op, Program, Ref, TensorType, drop_dead, map_refs


@dataclass(frozen=True)
class Lanes:
    """Where a call program calls a component: its steps, and the calls of each one.

    A step with two calls, with and without the prompt, has two lanes, each with what it keeps.
    """

    steps: int
    place: Mapping[int, tuple[int, int]]  # index of a CALL operation → (step, lane)


def lanes_of(call: Program, component: str, wanted: int | None = None) -> Lanes:
    """The steps that call the component, numbered from 0.

    Where the call marks no steps, each call is one; where there are a multiple of the `wanted` number of steps, that
    many calls are one.
    """
    place: dict[int, tuple[int, int]] = {}
    marked = any(op.name == STEP for op in call.ops)
    if not marked:
        sites = [i for i, op in enumerate(call.ops) if op.name == CALL and op.attrs["component"] == component]
        per = len(sites) // wanted if wanted and len(sites) % wanted == 0 else 1
        place = {site: divmod(index, max(per, 1)) for index, site in enumerate(sites)}
        return Lanes(len({step for step, _ in place.values()}), place)
    segment, numbers, counts = 0, {}, {}
    for index, op in enumerate(call.ops):
        if op.name == STEP:
            segment += 1
        elif op.name == CALL and op.attrs["component"] == component:
            step = numbers.setdefault(segment, len(numbers))
            lane = counts.get(segment, 0)
            counts[segment] = lane + 1
            place[index] = (step, lane)
    return Lanes(len(numbers), place)


def weave(
    call: Program, component: str, lanes: Lanes, mask: Mask, splits: Mapping[str, Split], order: int = 0
) -> Program:
    """Rewrite a call.

    Args:
        call: the pipeline's call.
        component: whose calls are rewritten.
        lanes: where they are.
        mask: which of its steps compute; the first does.
        splits: of the component's programs, by name.
        order: of the Taylor polynomial through what was kept; 0 reuses the last.
    """
    place = lanes.place
    history: dict[tuple[int, str], list[tuple[int, tuple[Ref, ...]]]] = {}
    types, ops = dict(call.types), []
    renamed: dict[str, Ref] = {}

    def now(arg: object) -> object:
        return map_refs(arg, lambda ref: renamed.get(ref.name, ref))

    for index, op in enumerate(call.ops):
        op = replace(op, args=now(op.args), kwargs=now(op.kwargs))  # type: ignore[arg-type]
        if index not in place:
            ops.append(op)
            continue
        step, lane = place[index]
        whole = op.attrs["program"]
        part = splits[whole]
        past = history.setdefault((lane, whole), [])
        stem = f"%{component}.{step}.{lane}"
        if mask[step] or not past:
            fresh = tuple(f"{stem}.kept.{number}" for number in range(part.kept))
            given = [ref.name for ref in part.keeping.outputs[-part.kept :]]
            types |= {name: part.keeping.types[kept] for name, kept in zip(fresh, given, strict=True)}
            attrs = {**op.attrs, "program": part.keeping.name}
            ops.append(replace(op, outputs=(*op.outputs, *fresh), attrs=attrs))
            past.insert(0, (step, tuple(map(Ref, fresh))))
            continue
        taken = [
            _foretold(step, number, past[: order + 1], f"{stem}.foretold.{number}", types, ops)
            for number in range(part.kept)
        ]
        if part.reusing is None:
            renamed |= dict(zip(op.outputs, taken, strict=True))
            continue
        args = (*(op.args[position] for position in part.takes), *taken)
        ops.append(replace(op, args=args, attrs={**op.attrs, "program": part.reusing.name}))
    outputs = tuple(now(call.outputs))  # type: ignore[arg-type]
    return _keep_only_what_is_read(replace(call, ops=tuple(ops), outputs=outputs, types=types), splits)


def coefficients(step: int, known: Sequence[int]) -> list[float]:
    """How much each of the values that were kept at these steps, the latest first, weighs at a later step.

    They are those of the Taylor polynomial whose derivatives are backward differences, one more order for each value.

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


def _foretold(
    step: int,
    number: int,
    past: Sequence[tuple[int, tuple[Ref, ...]]],
    name: str,
    types: dict[str, TensorType],
    ops: list[Op],
) -> Ref:
    """The kept value as it is at this step: the last one, or what the last ones foretell."""
    values = [kept[number] for _, kept in past]
    if len(values) == 1:
        return values[0]
    weights = coefficients(step, [at for at, _ in past])
    total = f"{name}.0"
    ops.append(Op("aten.mul.Tensor", (values[0], weights[0]), (total,)))
    types[total] = types[values[0].name]
    for index, (value, weight) in enumerate(zip(values[1:], weights[1:], strict=True), 1):
        added = f"{name}.{index}"
        ops.append(Op("aten.add.Tensor", (Ref(total), value), (added,), {"alpha": weight}))
        types[added] = types[total]
        total = added
    return Ref(total)


def _keep_only_what_is_read(call: Program, splits: Mapping[str, Split]) -> Program:
    """A step whose kept values nothing reads calls the whole program as it was."""
    whole = {part.keeping.name: (name, part.kept) for name, part in splits.items()}
    read = set(call.uses())

    def plain(op: Op) -> Op:
        if op.name != CALL or op.attrs["program"] not in whole:
            return op
        name, kept = whole[op.attrs["program"]]
        if not read.isdisjoint(op.outputs[-kept:]):
            return op
        return replace(op, outputs=op.outputs[:-kept], attrs={**op.attrs, "program": name})

    return drop_dead(replace(call, ops=tuple(map(plain, call.ops))))
