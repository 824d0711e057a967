"""The steps of a schedule that cost the least."""

from __future__ import annotations

from collections.abc import Sequence

from diffkiln.passes.caching.steps import Mask


def cheapest(costs: Sequence[Sequence[float]], computed: int, wanted: int = 1) -> list[Mask]:
    """Returns the masks with this many computed steps whose reused steps cost least together, by dynamic programming.

    Args:
        costs: costs[kept][last], what it costs when all steps after `kept` up to `last` reuse what it has kept.
        computed: how many steps compute; the first always does.
        wanted: how many masks, the cheapest first.
    """
    count = len(costs)
    best: dict[int, list[tuple[float, tuple[int, ...]]]] = {0: [(0.0, (0,))]}  # by the last step that computes
    for _ in range(computed - 1):
        longer: dict[int, list[tuple[float, tuple[int, ...]]]] = {}
        for last, ways in best.items():
            for step in range(last + 1, count):
                more = [(cost + costs[last][step - 1], (*steps, step)) for cost, steps in ways]
                longer[step] = sorted([*longer.get(step, []), *more])[:wanted]
        best = longer
    ends = [(cost + costs[last][count - 1], steps) for last, ways in best.items() for cost, steps in ways]
    return [tuple(step in steps for step in range(count)) for _, steps in sorted(ends)[:wanted]]
