"""Slots of weights that stream: apart where they must be, few, and as the runtime will use them."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations, pairwise
from typing import get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diffkiln.program.moments import Key, Moment
from diffkiln.program.residency import Residencies, TooSmall
from diffkiln.program.streaming import ALIGNMENT, Ahead, Arena, arranged, brought
from tests.program.test_residency import DECODER, OWN, block, calls, moments

UNIT = ALIGNMENT
SIZES = {OWN: UNIT, DECODER: 2 * UNIT, **{block(number): 10 * UNIT for number in range(6)}}


def arena_of(*listed: list[Moment], room: int | None = None, sizes: dict[Key, int] = SIZES) -> Arena:
    found = arranged(listed, sizes, room)
    assert found is not None
    return found


def slots_of_blocks(arena: Arena, blocks: int) -> set[int]:
    return {arena.slots[block(number)].start for number in range(blocks)}


class TestSlots:
    @pytest.mark.parametrize(("blocks", "slots"), [(2, 2), (4, 2), (6, 2), (3, 3), (5, 3)])
    def test_an_even_number_of_blocks_takes_two_and_an_odd_number_three(self, blocks: int, slots: int) -> None:
        arena = arena_of(moments(steps=4, blocks=blocks))
        assert len(slots_of_blocks(arena, blocks)) == slots
        assert arena.nbytes == UNIT + slots * 10 * UNIT

    def test_neighbours_lie_apart_also_across_the_border_of_a_step(self) -> None:
        arena = arena_of(moments(steps=2, blocks=5))
        order = [block(number) for number in (0, 1, 2, 3, 4, 0)]
        assert all(after not in arena.over[before] for before, after in pairwise(order))
        assert not arena.over[OWN] & set(order), "what is used throughout a step stays through all of them"

    def test_groups_of_other_phases_share_the_slots(self) -> None:
        arena = arena_of(moments(steps=2, blocks=4))
        assert arena.slots[DECODER].end <= arena.nbytes == 21 * UNIT

    def test_a_large_group_of_another_phase_leaves_room_in_which_blocks_stay(self) -> None:
        sizes = {**SIZES, DECODER: 41 * UNIT}
        listed = moments(steps=4, blocks=6)
        arena = arena_of(listed, sizes=sizes)
        assert arena.nbytes == 52 * UNIT, "the decoder comes in beside the last block"
        # So five blocks have slots of their own, but for the decoder's use, and one takes turns with another.
        assert brought(arena, listed) < 41 * UNIT + 6 * 10 * UNIT + 4 * 2 * 10 * UNIT

    def test_room_for_all_brings_in_nothing(self) -> None:
        listed = moments(steps=4, blocks=5)
        arena = arena_of(listed, room=53 * UNIT)
        assert (arena.nbytes, brought(arena, listed)) == (53 * UNIT, 0)

    def test_more_room_brings_in_less(self) -> None:
        listed = moments(steps=4, blocks=6)
        found = [brought(arena_of(listed, room=room * UNIT), listed) for room in (21, 31, 41, 51, 63)]
        assert found == sorted(found, reverse=True)
        assert (found[0] > found[-2], found[-1]) == (True, 0)

    def test_calls_that_differ_share_the_slots(self) -> None:
        turned = {block(number): block(5 - number) for number in range(6)} | {OWN: OWN, DECODER: DECODER}
        first, second = moments(steps=2, blocks=4), moments(steps=1, blocks=6)
        second = [
            replace(moment, enters=turned[moment.enters], needs=tuple(turned[key] for key in moment.needs))
            for moment in second
            if moment.enters is not None
        ]
        arena = arena_of(first, second)
        for listed in (first, second):
            check(arena, listed, SIZES)

    def test_a_step_that_reuses_moves_nothing(self) -> None:
        full = moments(steps=1, blocks=5)[:-1]
        reuse = [Moment("denoise", "denoiser", OWN, (OWN,), 5), Moment("denoise", "", None, (), 2)]
        arena = arena_of(listed := [*full, *reuse, *reuse, *full])
        assert brought(arena, listed) == brought(arena, [*full, *full])


def check(arena: Arena, listed: list[Moment], sizes: dict[Key, int]) -> None:
    """Plays a call twice: what is in use is never displaced, and in each use the next can come in ahead."""
    order = [moment.enters for moment in listed if moment.enters is not None]
    here: set[Key] = set()
    for _ in range(2):
        total = at = 0
        for moment in listed:
            if moment.enters is None:
                continue
            at += 1
            for key in (moment.enters, arena.coming(order, at, moment.needs, here | {moment.enters})):
                if key is not None and key not in here:
                    here = (here - arena.over[key]) | {key}
                    total += arena.slots[key].nbytes
            assert set(moment.needs) <= here
            following = next((key for key in order[at:] if key not in moment.needs), None)
            assert following is None or following in here or arena.ahead != "always"
    assert total == brought(arena, listed)
    for one, other in combinations(arena.slots, 2):
        assert arena.slots[one].overlaps(arena.slots[other]) == (other in arena.over[one])
    assert all(arena.slots[key].nbytes >= sizes[key] for key in order)
    assert all(slot.start % ALIGNMENT == 0 for slot in arena.slots.values())


@settings(max_examples=150, deadline=None)
@given(st.lists(calls(), min_size=1, max_size=3), st.floats(0, 1.2), st.sampled_from(get_args(Ahead)))
def test_any_calls_in_any_room(made: list[tuple[list[Moment], dict[Key, int]]], share: float, ahead: Ahead) -> None:
    sizes: dict[Key, int] = {}
    for _, own in made:
        sizes |= {key: max(size * 100, sizes.get(key, 0)) for key, size in own.items()}
    all_calls = [listed for listed, _ in made]
    least = arranged(all_calls, sizes, None, ahead)
    assert least is not None
    room = least.nbytes + int(share * sum(sizes.values()))
    arena = arranged(all_calls, sizes, room, ahead)
    assert arena is not None
    assert arena.nbytes <= room
    for listed in all_calls:
        check(arena, listed, sizes)


class TestLimits:
    def test_a_plan_keeps_within_its_limit(self) -> None:
        listed, plans = moments(steps=2, blocks=4), Residencies(SIZES, fixed=7)
        arena = plans.arena([listed], limit=7 + 50 + 21 * UNIT)
        plan = plans.stream(listed, arena)
        assert (plan.strategy, plan.peak) == ("stream", 7 + 50 + 21 * UNIT)
        assert plan.brought == brought(arena, listed)

    def test_with_too_little_room_to_come_ahead_each_comes_when_it_is_used(self) -> None:
        arena = Residencies(SIZES).arena([moments(steps=2, blocks=4)], limit=50 + 11 * UNIT)
        assert (arena.ahead, arena.nbytes) == ("never", 11 * UNIT)

    def test_with_less_room_the_next_component_does_not_come_ahead(self) -> None:
        sizes = {**SIZES, DECODER: 15 * UNIT}
        arena = Residencies(sizes).arena([moments(steps=2, blocks=4)], limit=50 + 21 * UNIT)
        assert (arena.ahead, arena.nbytes) == ("within", 21 * UNIT)

    def test_a_limit_below_the_largest_group_says_what_it_needs(self) -> None:
        with pytest.raises(TooSmall, match=r"found 2,000 bytes, required 2,866") as caught:
            Residencies(SIZES).arena([moments(steps=2, blocks=4)], limit=2000)
        assert caught.value.where == (
            "for slots of 2,816 bytes (the largest, of denoiser 0: 2,560), in which weights stream"
        )

    def test_a_call_without_weights(self) -> None:
        listed = [Moment("encode", "", None, (), 7)]
        arena = Residencies({}).arena([listed], limit=7)
        assert Residencies({}).stream(listed, arena).peak == 7
        with pytest.raises(TooSmall, match="required 7"):
            Residencies({}).arena([listed], limit=6)
