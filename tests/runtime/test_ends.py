"""The ends of a call: noise, prompts and images as diffusers and transformers make them."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers

from diffkiln.errors import CallError
from diffkiln.runtime.images import convert
from diffkiln.runtime.noise import draw
from diffkiln.runtime.text import Miscount, TextEnd, counts_refusal

CPU = torch.device("cpu")


def generator(seed):
    return torch.Generator("cpu").manual_seed(seed)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("make", [lambda: generator(3), lambda: [generator(3), generator(4)], lambda: None])
def test_noise_is_that_of_diffusers(make, dtype):
    from diffusers.utils.torch_utils import randn_tensor

    torch.manual_seed(11)
    want = randn_tensor((2, 4, 8), generator=make(), device=CPU, dtype=dtype)
    torch.manual_seed(11)
    assert torch.equal(draw((2, 4, 8), dtype, make(), CPU), want)


@pytest.mark.parametrize("make", [lambda: generator(3), lambda: None])
def test_uniform_noise_and_choices_are_those_of_torch(make):
    weights = torch.rand(5, 7, generator=generator(0))
    torch.manual_seed(11)
    want = torch.zeros(2, 3).uniform_(0, 1, generator=make()), torch.multinomial(weights, 1, generator=make())
    torch.manual_seed(11)
    uniform = draw((2, 3), torch.float32, make(), CPU, "uniform")
    chosen = weights / draw((5, 7), torch.float32, make(), CPU, "exponential")
    assert torch.equal(uniform, want[0])
    assert torch.equal(chosen.argmax(-1, keepdim=True), want[1])


def test_one_generator_in_a_list_is_one_generator():
    assert torch.equal(draw((2, 3), torch.float32, [generator(1)], CPU), draw((2, 3), torch.float32, generator(1), CPU))


def test_wrong_number_of_generators_is_refused():
    with pytest.raises(CallError, match="3 generators for 2 images"):
        draw((2, 3), torch.float32, [generator(0)] * 3, CPU)


@pytest.mark.parametrize("output_type", ["pil", "np", "pt"])
def test_images_are_rounded_as_diffusers_rounds(output_type):
    from diffusers.image_processor import VaeImageProcessor

    tensor = torch.rand(2, 3, 5, 7, generator=generator(0))
    want = VaeImageProcessor(do_normalize=False).postprocess(tensor, output_type, do_denormalize=[False, False])
    got = convert(tensor, output_type)
    for a, b in zip(want, got, strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def test_videos_are_lists_of_pictures():
    tensor = torch.rand(1, 3, 3, 4, 6, generator=generator(0))
    (video,) = convert(tensor, "pil")
    assert [picture.size for picture in video] == [(6, 4)] * 3
    assert convert(tensor, "np").shape == (1, 3, 4, 6, 3)


@pytest.fixture
def end():
    vocabulary = {"[PAD]": 0, "[UNK]": 1, "a": 2, "red": 3, "fox": 4, "photo": 5, "of": 6, "<": 7}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return TextEnd({"tokenizer": tokenizer.to_str()})


def text(**changed):
    return {
        "tokenizer": "tokenizer",
        "rows": [{"keyword": "prompt", "index": 0, "prefix": "", "suffix": ""}],
        "transforms": [],
        "padding": "max_length",
        "max_length": 5,
        "truncation": True,
        "add_special_tokens": True,
        "padding_side": "right",
        "truncation_side": "right",
        "pad_id": 0,
        "pad_token": "[PAD]",
        "pad_type_id": 0,
    } | changed


def ids(end, prompt, **changed):
    return end.encode(text(**changed), {"prompt": [prompt]})["input_ids"].tolist()


def test_prompts_are_padded_and_masked(end):
    made = end.encode(text(), {"prompt": ["a red fox"]})
    assert made["input_ids"].tolist() == [[2, 3, 4, 0, 0]]
    assert made["attention_mask"].tolist() == [[1, 1, 1, 0, 0]]
    assert made["token_type_ids"].dtype == torch.int64
    assert ids(end, "a red fox", padding_side="left") == [[0, 0, 2, 3, 4]]


def test_long_prompts_are_cut_and_the_user_is_told(end, caplog):
    with caplog.at_level(logging.WARNING, "diffkiln"):
        assert ids(end, "a red fox of a photo") == [[2, 3, 4, 6, 2]]
    assert "cut to 5 tokens" in caplog.text
    assert ids(end, "a red fox of a photo", truncation_side="left") == [[3, 4, 6, 2, 5]]


def test_long_prompts_that_must_not_be_cut_are_refused(end):
    assert ids(end, "a red fox of a", truncation=False) == [[2, 3, 4, 6, 2]]
    with pytest.raises(CallError, match="prompt: 6 tokens with the pipeline's own text; this variant takes 5"):
        ids(end, "a red fox of a photo", truncation=False)


def test_what_stands_for_an_image_is_refused_in_a_prompt(end):
    assert ids(end, "a red fox", marks=["<image>"]) == [[2, 3, 4, 0, 0]]
    with pytest.raises(CallError, match="prompt: <image> stands for an image or a video"):
        ids(end, "a red <image>", marks=["<image>"])


def test_templates_and_transforms_are_applied(end):
    rows = [{"keyword": "prompt", "index": 0, "prefix": "a photo of ", "suffix": " <"}]
    assert ids(end, " RED ", rows=rows, transforms=["strip", "lower"]) == [[2, 5, 6, 3, 7]]
    assert ids(end, "&amp;lt;  fox", transforms=["html_unescape", "collapse_whitespace"]) == [[7, 4, 0, 0, 0]]


def test_rows_of_fixed_text_need_no_prompt(end):
    rows = [{"text": "a fox"}, {"keyword": "prompt", "index": 0, "prefix": "", "suffix": ""}]
    assert ids(end, "red", rows=rows) == [[2, 4, 0, 0, 0], [3, 0, 0, 0, 0]]


def test_quotations_are_tokenized_by_character(end, caplog):
    spelled = {"quotations": "characters", "max_length": 8}
    assert ids(end, "a red fox", **spelled) == [[2, 3, 4, 0, 0, 0, 0, 0]]
    assert ids(end, "red 'a<' fox", **spelled) == [[3, 1, 2, 7, 1, 4, 0, 0]]
    assert ids(end, "red 'a<' fox", **spelled, padding_side="left") == [[0, 0, 3, 1, 2, 7, 1, 4]]
    assert ids(end, "", **spelled) == [[0] * 8]
    with caplog.at_level(logging.WARNING, "diffkiln"):
        assert ids(end, "red fox 'aaaaaaaa'", **spelled, truncation_side="left") == [[3, 4, 1, 2, 2, 2, 2, 2]]
    assert "cut to 8 tokens" in caplog.text
    made = end.encode(text(**spelled), {"prompt": ["red 'a'"]})
    assert made["attention_mask"].tolist() == [[1, 1, 1, 1, 0, 0, 0, 0]]


COUNTED = {"prompt_tokens": [3], "around": [0], "cut": None, "max_length": 5, "truncation": False}


def test_a_prompt_of_the_recorded_number_of_tokens_is_padded_as_it_was(end):
    assert ids(end, "a red fox", **COUNTED) == [[2, 3, 4, 0, 0]]
    assert ids(end, "a red fox", **COUNTED, padding_side="left") == [[0, 0, 2, 3, 4]]
    assert ids(end, "a red fox of a photo", **COUNTED | {"cut": 3}) == [[2, 3, 4, 0, 0]]


def test_a_prompt_of_another_number_of_tokens_is_refused(end):
    told = "prompt: 2 tokens, this variant takes 3. Add 2 to 'prompt_tokens' of the spec's inputs"
    with pytest.raises(CallError, match=told):
        ids(end, "a fox", **COUNTED)
    counted, around = text(**COUNTED), text(**COUNTED | {"prompt_tokens": [4], "around": [1]})
    assert end.miscounted(counted, {"prompt": ["a red fox"]}) is None
    assert end.miscounted(text(), {"prompt": ["a"]}) is None
    assert end.miscounted(around, {"prompt": ["a red"]}) == Miscount("prompt", 1, 3)


def test_what_no_variant_takes_is_said_with_what_they_take():
    told = counts_refusal([Miscount("negative_prompt", 7, wanted) for wanted in (3, 5, 4)])
    assert told.startswith("negative_prompt: 7 tokens. The bundle takes 3, 4, 5. Add 7 to 'negative_prompt_tokens'")


@pytest.mark.parametrize(
    ("marks", "prompt"), [("double", 'a "red" fox'), ("double", "\u201ca\u201d"), ("all", "a 'red' fox")]
)
def test_a_prompt_that_quotes_is_refused_where_another_encoder_would_see_it(end, marks, prompt):
    with pytest.raises(CallError, match="Leave out the quotation marks"):
        ids(end, prompt, glyphs=marks)
    assert ids(end, "a red fox", glyphs=marks) == [[2, 3, 4, 0, 0]]
    assert ids(end, "a 'red' fox", glyphs="double") == [[2, 1, 4, 0, 0]]


@pytest.mark.parametrize("prompt", ["a fox", '{"instruction": "a fox"}', '{"edit_instruction": ', "[" * 3000])
def test_a_prompt_that_is_not_of_the_form_that_the_pipeline_takes_is_refused(end, prompt):
    with pytest.raises(CallError, match=r'of the form that the pipeline takes. Write {"edit_instruction": "…"}'):
        ids(end, prompt, form="edit_json")


def test_a_prompt_of_the_form_that_the_pipeline_takes_is_tokens(end):
    prompt = '{"edit_instruction": "red"}'
    assert ids(end, prompt, form="edit_json") == ids(end, prompt)


def test_too_few_prompts_are_refused(end):
    rows = [{"keyword": "prompt", "index": 1, "prefix": "", "suffix": ""}]
    with pytest.raises(CallError, match="1 prompts, this variant takes 2"):
        ids(end, "red", rows=rows)
