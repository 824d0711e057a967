"""Texts of a fixed number of tokens: their lengths and masks, and the components whose shapes follow from these."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from diffkiln.errors import DataDependent, RecordError
from diffkiln.record.counted import ByPosition, Counted, decisive, digest_of

ENTRY = {
    "tokenizer": "tokenizer",
    "rows": [{"keyword": "prompt", "index": 0, "prefix": "draw ", "suffix": " now"}],
    "padding": "longest",
    "max_length": 8,
    "truncation": True,
    "padding_side": "right",
    "pad_id": 0,
    "pad_token": "[PAD]",
    "pad_type_id": 0,
}


def words(text):
    return len(text.split())


def fixed(own, tokens=3, kwargs=None):
    return Counted({"prompt": tokens}).fixed({**ENTRY, **own}, words, kwargs or {})


def test_a_prompt_has_its_tokens_and_those_around_it():
    entry, mask = fixed({})
    assert (entry["prompt_tokens"], entry["around"], entry["cut"]) == ([5], [2], 8)
    assert (entry["padding"], entry["max_length"]) == ("max_length", 5)
    assert mask.tolist() == [[1] * 5]


def test_a_prompt_that_is_cut_has_as_many_tokens_as_are_left():
    entry, mask = fixed({}, tokens=30)
    assert entry["prompt_tokens"] == [8]
    assert mask.shape == (1, 8)


@pytest.mark.parametrize(("side", "row"), [("right", [1] * 5 + [0] * 3), ("left", [0] * 3 + [1] * 5)])
def test_padding_to_a_length_is_on_its_side(side, row):
    _, mask = fixed({"padding": "max_length", "padding_side": side})
    assert mask.tolist() == [row]


def test_shorter_texts_of_a_batch_are_padded_to_the_longest():
    rows = [*ENTRY["rows"], {"text": "a"}]
    entry, mask = fixed({"rows": rows})
    assert entry["prompt_tokens"] == [5, 1]
    assert mask.tolist() == [[1] * 5, [1, 0, 0, 0, 0]]


def test_padding_to_a_multiple_is_kept():
    _, mask = fixed({"truncation": False}, kwargs={"pad_to_multiple_of": 4})
    assert mask.shape == (1, 8)


def test_a_prompt_whose_length_is_not_said_is_refused():
    rows = [{**ENTRY["rows"][0], "keyword": "negative_prompt"}]
    with pytest.raises(DataDependent, match='Add "negative_prompt_tokens"'):
        fixed({"rows": rows})


def test_texts_of_several_lengths_without_padding_are_refused():
    with pytest.raises(DataDependent, match="without padding"):
        fixed({"rows": [*ENTRY["rows"], {"text": "a"}], "padding": "none"})


def test_a_text_without_any_tokens_is_refused():
    with pytest.raises(RecordError, match="without any tokens"):
        fixed({"rows": [{"text": ""}]})


def test_texts_of_their_own_length_are_fixed_where_their_masks_are_read():
    padded = {**ENTRY, "padding": "max_length"}
    assert [Counted({}, every).applies(padded) for every in (False, True)] == [False, True]
    assert Counted({}).applies(ENTRY)


def test_masks_decide_a_program_and_timesteps_where_nothing_else_does():
    leaves = [torch.ones(1, 4), torch.tensor([7]), torch.full((2, 2), 0.5), None, torch.ones(1, 4, dtype=torch.int64)]
    unmarked = lambda _: False  # noqa: E731
    assert decisive(leaves, unmarked, None) == {}
    assert list(decisive(leaves, unmarked, 2)) == [0, 4]
    assert list(decisive(leaves, unmarked, 1)) == [0, 1, 4]


def test_other_values_are_another_program():
    assert digest_of({}) == ""
    one, same, other = (digest_of({0: torch.tensor(row)}) for row in ([1, 0], [1, 0], [1, 1]))
    assert one == same != other


def test_masks_select_by_position():
    mask = torch.tensor([True, False, True])
    with FakeTensorMode(allow_non_fake_inputs=True):
        rows = torch.empty(3, 5)
    with ByPosition():
        assert rows[mask].shape == (2, 5)
