"""The contents of a bundle add up: in their order, with the newest of what is demanded, and every notice once."""

from diffkiln.bundle import Variant
from diffkiln.compiler.packed import Packed, as_json, total


def test_the_newest_version_counts_by_its_numbers():
    packed = Packed(requires={"glibc": "2.9", "cuda": "13.0"}) + Packed(requires={"glibc": "2.34"})
    assert packed.requires == {"glibc": "2.34", "cuda": "13.0"}


def test_one_untuned_engine_makes_a_target_untuned_and_one_exact_engine_exact():
    one = {"sm": "sm_90", "autotuned": True, "packages": {"a": ">=1"}}
    other = {"sm": "sm_90a", "autotuned": False, "packages": {"b": ">=2"}, "exact": True}
    packed = Packed(gpus={"h100": one}) + Packed(gpus={"h100": other})
    assert packed.gpus["h100"] == {
        "sm": "sm_90a",
        "autotuned": False,
        "packages": {"a": ">=1", "b": ">=2"},
        "exact": True,
    }
    assert (Packed(gpus={"h100": one}) + Packed(gpus={"l4": {"sm": "sm_89"}})).gpus.keys() == {"h100", "l4"}


def test_a_target_stays_tuned_where_an_engine_has_nothing_to_tune():
    packed = Packed(gpus={"l4": {"sm": "sm_89"}}) + Packed(gpus={"l4": {"sm": "sm_89", "autotuned": True}})
    assert packed.gpus["l4"]["autotuned"] is True


def test_notices_stand_once_and_rows_in_their_order():
    first, second = (Variant(name=name, fixed={}, programs={}) for name in ("64x64", "32x32"))
    packed = total([Packed((first,), notices=("a", "b")), Packed((second,), notices=("b", "c"))])
    assert [variant.name for variant in packed.variants] == ["64x64", "32x32"]
    assert packed.notices == ("a", "b", "c")


def test_nothing_is_changed_by_adding():
    one = Packed(notices=("a",))
    assert one + Packed(notices=("b",)) != one
    assert one == Packed(notices=("a",))


def test_json_for_people_has_sorted_keys_and_ends_with_a_line():
    assert as_json({"b": 1, "a": "é"}) == '{\n  "a": "é",\n  "b": 1\n}\n'.encode()
