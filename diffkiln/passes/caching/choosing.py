"""The steps of a schedule that cost the least."""

from __future__ import annotations

import math
from collections.abc import Sequence

from diffkiln.passes.caching.steps import Mask


def cheapest(costs: Sequence[Sequence[float]], computed: int) -> Mask:
    """The mask with this many computed steps whose reused steps cost the least together, by dynamic programming.

    Args:
        costs: costs[kept][step], what it costs when `step` reuses what `kept`, an earlier step, has kept.
        computed: how many steps compute; the first always does.
    """
    count = len(costs)
    reused = [[0.0] * (count + 1) for _ in range(count)]  # reused[kept][end]: all steps after kept and before end
    for kept in range(count):
        for end in range(kept + 2, count + 1):
            reused[kept][end] = reused[kept][end - 1] + costs[kept][end - 1]
    best = {0: (0.0, (0,))}
    for _ in range(computed - 1):
        longer: dict[int, tuple[float, tuple[int, ...]]] = {}
        for last, (cost, steps) in best.items():
            for step in range(last + 1, count):
                total = cost + reused[last][step]
                if total < longer.get(step, (math.inf,))[0]:
                    longer[step] = total, (*steps, step)
        best = longer
    chosen = min(best.items(), key=lambda item: item[1][0] + reused[item[0]][count])[1][1]
    return tuple(step in chosen for step in range(count))
