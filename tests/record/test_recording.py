"""Recording pipelines without weights: programs, texts, regions, guidance."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from diffkiln.errors import DataDependent, RecordError, SpecError
from diffkiln.interpreter.quiet import quiet_libraries
from diffkiln.models.meta import meta_pipeline
from diffkiln.models.weights import weights_of
from diffkiln.program import CALL, REGION, verify_module
from diffkiln.record.call import Request
from diffkiln.record.components import repeated_blocks
from diffkiln.record.constants import Constants
from diffkiln.record.pipeline import record
from diffkiln.record.refusals import Refused
from diffkiln.record.text import TextRecorder, apply, refuse_unpadded, sentinel
from tests.passes.hoisting.replays import recorded
from tests.passes.plans import source
from tests.pipelines import FAMILIES, WARNING_FILTERS

pytestmark = [pytest.mark.filterwarnings(text) for text in WARNING_FILTERS]
_made = {}


def recording(family, **changed):
    key = (family, *sorted(changed.items()))
    if key not in _made:
        pipe = meta_pipeline(source(family))
        pipe.set_progress_bar_config(disable=True)
        batch = changed.pop("batch_size", 1)
        fixed = {k: v for k, v in FAMILIES[family].call.items() if k not in ("prompt", "negative_prompt")} | changed
        with quiet_libraries():
            _made[key] = record(pipe, [Request(fixed, batch)], Constants())
    return _made[key]


def test_programs_by_what_callers_may_give():
    assert set(recording("sd").calls[0]) == {"call", "call+negative", "call+latents", "call+negative+latents"}
    assert {"call", "call+latents"} <= set(recording("flux").calls[0])


def test_every_component_that_is_called_has_a_verified_program():
    for family, components in [
        ("sdxl", {"text_encoder", "text_encoder_2", "unet", "vae"}),
        ("sd3", {"text_encoder", "text_encoder_2", "text_encoder_3", "transformer", "vae"}),
    ]:
        made = recording(family)
        assert set(made.modules) == components
        for module in made.modules.values():
            verify_module(module)


def test_callees_are_found_by_component_and_program():
    made = recording("flux")
    called = {(op.attrs["component"], op.attrs["program"]) for op in made.calls[0]["call"].ops if op.name == CALL}
    assert called <= set(made.callees)


def test_one_region_serves_every_block_that_computes_the_same():
    module = recording("flux").modules["transformer"]
    uses = [op.attrs for op in module.programs["transformer"].ops if op.name == REGION]
    assert set(module.regions) == {"FluxTransformerBlock", "FluxSingleTransformerBlock"}
    assert len({use["instance"] for use in uses}) > len(module.regions)


def test_guidance_scale_is_an_input_where_only_its_value_matters():
    scalars = [item.source for item in recording("sd").calls[0]["call"].inputs if item.source.get("kind") == "scalar"]
    assert [source["keyword"] for source in scalars] == ["guidance_scale"]
    assert scalars[0]["above"] == 1.0
    assert scalars[0]["default"] == FAMILIES["sd"].call["guidance_scale"]


def test_texts_give_tokenizer_length_and_transforms():
    texts = recording("pixart_sigma").calls[0]["call"].texts
    assert {text["tokenizer"] for text in texts} == {"tokenizer"}
    assert all("lower" in text["transforms"] for text in texts)
    assert all(text["padding"] == "max_length" and text["truncation"] for text in texts)
    keywords = [row.get("keyword") for text in texts for row in text["rows"]]
    assert "prompt" in keywords


def test_a_batch_has_a_row_for_each_prompt():
    texts = recording("flux", batch_size=2).calls[0]["call"].texts
    assert all([row["index"] for row in text["rows"]] == [0, 1] for text in texts)


def test_unknown_keyword_is_a_spec_error():
    with pytest.raises(SpecError, match="no keyword 'heigth'"):
        recording("flux", heigth=8)


def test_what_the_pipeline_itself_refuses_is_told():
    with pytest.raises(Refused, match="refuses this call: `height` and `width` have to be divisible by 8 but are 33"):
        recording("sd", height=33)


def test_tied_weights_come_once():
    module = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
    module[1].weight = module[0].weight
    assert [name for name, _ in weights_of(module)] == ["0.weight"]


def test_quantized_weights_come_as_their_plain_tensors():
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    module = nn.Sequential(nn.Linear(8, 8, bias=False))
    quantize_(module, Int8WeightOnlyConfig(version=2))
    assert {name: tensor.dtype for name, tensor in weights_of(module)} == {
        "0.weight.qdata": torch.int8,
        "0.weight.scale": torch.float32,
        "0.weight.zero_point": torch.int8,
    }


def test_repeated_blocks_are_the_outermost_of_the_declared_classes():
    class Block(nn.Module):
        def __init__(self, inner=None):
            super().__init__()
            self.inner = inner

    model = nn.Module()
    model._repeated_blocks = ["Block"]
    model.blocks = nn.ModuleList([Block(Block()), Block()])
    assert [name for name, _ in repeated_blocks(model)] == ["blocks.0", "blocks.1"]


@pytest.mark.parametrize(
    "names", [(), ("lower",), ("html_unescape", "strip"), ("strip", "collapse_whitespace", "lower")]
)
def test_sentinels_show_which_transforms_were_applied(names):
    text = sentinel("prompt", 0)
    recorder = TextRecorder(SimpleNamespace(), {text: ("prompt", 0)}, {})
    transforms, row = recorder._row("<before> " + apply(names, text) + " <after>")
    assert apply(transforms, text) == apply(names, text)
    assert row == {"keyword": "prompt", "index": 0, "prefix": "<before> ", "suffix": " <after>"}


@pytest.mark.parametrize("changed", [{"padding": True}, {"max_length": None}], ids=["longest", "no-length"])
def test_tokens_without_a_fixed_length_are_refused(changed):
    text = {"tokenizer": "tokenizer", "padding": "max_length", "max_length": 8, "truncation": False}
    refuse_unpadded([text | changed], set())
    refuse_unpadded([text], {0})
    with pytest.raises(DataDependent, match="the number of tokens follows the prompt"):
        refuse_unpadded([text | changed], {0})


def test_other_changes_of_a_prompt_are_refused():
    text = sentinel("prompt", 0)
    recorder = TextRecorder(SimpleNamespace(), {text: ("prompt", 0)}, {})
    with pytest.raises(RecordError, match="closed list"):
        recorder._row(text[::2] + " kiln")


def test_torch_shows_no_traceback_of_a_way_that_was_tried(tmp_path):
    """LongCat-Image packs its latents, and takes none in the shape that the noise is drawn in."""
    shown: list[logging.LogRecord] = []

    class Ear(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            shown.append(record)

    logger, ear = logging.getLogger("torch._subclasses.fake_tensor"), Ear()
    logger.addHandler(ear)
    try:
        recorded("longcat_image", tmp_path)
    finally:
        logger.removeHandler(ear)
    assert not shown
