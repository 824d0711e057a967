"""Plans of weights: checked against a run that keeps the books, and against every other plan where there are few."""

from __future__ import annotations

from itertools import groupby

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diffkiln.program.moments import Key, Moment
from diffkiln.program.residency import Residencies, Residency, TooSmall

OWN, DECODER = ("denoiser", "rest"), ("vae", "rest")


def block(number: int) -> Key:
    return "denoiser", str(number)


def moments(steps: int, blocks: int) -> list[Moment]:
    """A call as pipelines make them: steps over blocks, and a decoder."""
    listed = []
    for _ in range(steps):
        listed.append(Moment("denoise", "denoiser", OWN, (OWN,), 5))
        keys = [block(number) for number in range(blocks)]
        listed += [Moment("denoise", "denoiser", key, (OWN, key), 10) for key in keys]
        listed.append(Moment("denoise", "", None, (), 2))
    return [*listed, Moment("decode", "vae", DECODER, (DECODER,), 50)]


SIZES = {OWN: 10, DECODER: 20, **{block(number): 100 for number in range(6)}}


def played(listed: list[Moment], plan: Residency, sizes: dict[Key, int], calls: int = 2) -> tuple[list[int], int]:
    """Plays calls as the weight store does: the most in memory in each moment, and what the last call brought in."""
    order = [moment.enters for moment in listed if moment.enters is not None]
    here: set[Key] = set()
    most, brought = [0] * len(listed), 0
    for _ in range(calls):
        here &= plan.stays
        brought, use = 0, -1
        needs: tuple[Key, ...] = ()
        last: dict[Key, int] = {}
        for index, moment in enumerate(listed):
            for key in set(needs) - set(moment.needs):
                coming = order[use + 1] if plan.ahead and use + 1 < len(order) else None
                if not plan.keeps[last[key]] and key != coming:
                    here.discard(key)
            needs = moment.needs
            if moment.enters is not None:
                use += 1
                last[moment.enters] = use
                wanted = {moment.enters, *(order[use + 1 : use + 2] if plan.ahead else ())}
                brought += sum(sizes[key] for key in wanted if key not in here)
                here |= wanted
            assert set(moment.needs) <= here
            most[index] = max(most[index], sum(sizes[key] for key in here) + moment.results)
        here = {key for key in here if key in plan.stays}
    return most, brought


@pytest.mark.parametrize("limit", [680, 640, 600, 500, 420, 330, 220, 150, 120])
def test_a_plan_keeps_within_its_limit_and_brings_in_what_it_says(limit: int) -> None:
    listed = moments(steps=4, blocks=6)
    plan = Residencies(SIZES).within(listed, limit)
    assert plan.peak <= limit
    if plan.strategy == "resident":
        return
    most, brought = played(listed, plan, SIZES)
    assert brought == plan.brought
    assert most == list(plan.memory)


def test_the_more_memory_the_less_is_brought_in() -> None:
    listed = moments(steps=4, blocks=6)
    brought = [Residencies(SIZES).within(listed, limit, ahead=False).brought for limit in range(120, 700, 20)]
    assert brought == sorted(brought, reverse=True)
    assert brought[-1] == 0


def test_everything_stays_where_it_fits() -> None:
    listed = moments(steps=2, blocks=3)
    plan = Residencies(SIZES).within(listed, 10_000)
    assert (plan.strategy, plan.brought, plan.stays) == ("resident", 0, frozenset(SIZES))
    assert plan.peak == sum(SIZES.values()) + 50


def test_below_the_smallest_limit_the_refusal_says_what_it_is() -> None:
    listed = moments(steps=2, blocks=3)
    with pytest.raises(TooSmall, match="found 119 bytes, required 120") as caught:
        Residencies(SIZES).within(listed, 119)
    assert (caught.value.needed, caught.value.where) == (120, "while denoiser runs (denoise)")
    assert Residencies(SIZES).within(listed, 120).peak == 120


def test_groups_come_ahead_only_where_there_is_room_for_two() -> None:
    listed = moments(steps=2, blocks=3)
    assert Residencies(SIZES).within(listed, 220).ahead
    assert not Residencies(SIZES).within(listed, 219).ahead
    assert not Residencies(SIZES).within(listed, 400, ahead=False).ahead


def test_what_is_always_in_memory_counts() -> None:
    listed = moments(steps=2, blocks=3)
    assert Residencies(SIZES, fixed=30).group(listed, True).peak == Residencies(SIZES).group(listed, True).peak + 30


def test_a_call_without_weights_takes_its_results() -> None:
    listed = [Moment("encode", "", None, (), 7)]
    plan = Residencies({}).within(listed, 7)
    assert (plan.peak, plan.keeps, plan.strategy) == (7, (), "resident")
    assert Residencies({}).within([], 1).peak == 0


def smallest(plans: Residencies, listed: list[Moment]) -> int:
    """Returns the smallest limit within which there is a plan."""
    try:
        return plans.within(listed, 0).peak
    except TooSmall as error:
        return error.needed


def test_what_is_next_again_stays_where_groups_do_not_come_ahead() -> None:
    own = Moment("denoise", "denoiser", OWN, (OWN,), 5)
    between = Moment("denoise", "", None, (), 2)
    plan = Residencies(SIZES).group([own, between, own, between], ahead=False)
    assert plan.keeps == (True, False)
    assert (plan.memory, plan.brought) == ((15, 12, 15, 2), 10)


@st.composite
def calls(draw: st.DrawFn) -> tuple[list[Moment], dict[Key, int]]:
    """Calls of a few components, each with its own weights and blocks, in any order."""
    sizes: dict[Key, int] = {}
    listed: list[Moment] = []
    for name in draw(st.lists(st.sampled_from("abc"), min_size=1, max_size=6)):
        own = (name, "rest")
        sizes.setdefault(own, draw(st.integers(1, 9)))
        listed.append(Moment("denoise", name, own, (own,), draw(st.integers(0, 20))))
        drawn = draw(st.lists(st.integers(0, 3), max_size=5))
        for number, _ in groupby(drawn):
            key = (name, str(number))
            sizes.setdefault(key, draw(st.integers(1, 30)))
            listed.append(Moment("denoise", name, key, (own, key), draw(st.integers(0, 20))))
        if draw(st.booleans()):
            listed.append(Moment("denoise", "", None, (), draw(st.integers(0, 20))))
    return listed, sizes


@settings(max_examples=200, deadline=None)
@given(calls(), st.floats(0, 1))
def test_any_plan_keeps_within_any_limit_that_it_accepts(
    call: tuple[list[Moment], dict[Key, int]], share: float
) -> None:
    listed, sizes = call
    plans = Residencies(sizes)
    least, most = smallest(plans, listed), plans.resident(listed).peak
    limit = int(least + share * (most - least))
    plan = plans.within(listed, limit)
    assert plan.peak <= limit
    if plan.strategy == "auto":
        memory, brought = played(listed, plan, sizes)
        assert brought == plan.brought
        assert memory == list(plan.memory)


@settings(max_examples=100, deadline=None)
@given(calls(), st.floats(0, 1), st.booleans())
def test_what_comes_for_each_moment_is_together_what_a_call_brings_in(
    call: tuple[list[Moment], dict[Key, int]], share: float, ahead: bool
) -> None:
    listed, sizes = call
    plans = Residencies(sizes)
    least, most = smallest(plans, listed), plans.resident(listed).peak
    for plan in (plans.within(listed, int(least + share * (most - least)), ahead), plans.group(listed, ahead=True)):
        assert sum(plans.coming(listed, plan)) == plan.brought
