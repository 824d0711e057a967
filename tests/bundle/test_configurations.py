"""Keys of configurations by which a library would fetch or run code."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import pytest

from diffkiln.bundle.configurations import OWN_IMPLEMENTATIONS, fetches_code, is_configuration, reaching_out

HOSTILE: list[dict[str, Any]] = [
    {"_attn_implementation": "kernels-community/x"},
    {"attn_implementation": "someone/x@main:forward"},
    {"_attn_implementation_internal": "someone/x"},
    {"attn_implementation": "paged|someone/x"},
    {"attn_implementation": "flash_attention_2"},
    {"attn_implementation": {"": "sdpa", "text_config": {"": "someone/x"}}},
    {"attn_implementation": ["someone/x"]},
    {"text_config": {"_attn_implementation": "someone/x"}},
    {"layers": [{"attn_implementation": "someone/x"}]},
    {"experts_implementation": "deepgemm"},
    {"auto_map": {"AutoModel": "code.Model"}},
    {"vision_config": {"auto_map": {"AutoModel": "someone/x--code.Model"}}},
    {"custom_pipeline": "someone/x"},
    {"custom_pipelines": {"task": {"impl": "code.Pipeline"}}},
    {"trust_remote_code": True},
    {"use_kernels": True},
    {"kernel_config": {"RMSNorm": "someone/x"}},
    {"anything": "kernels-community/x"},
    {"use_pretrained_backbone": True, "backbone": "resnet50"},
    {"_class_name": "os.system"},
    {"_class_name": ["code", "Pipeline"]},
    {"tokenizer_class": "code.Tokenizer"},
    {"processor_class": {"a": 1}},
]
HARMLESS: list[Any] = [
    {},
    [],
    "auto_map",
    {"_attn_implementation": None, "_attn_implementation_autoset": True},
    {"attn_implementation": {"": "sdpa", "vision_config": "eager"}},
    {"auto_map": None, "custom_pipelines": {}, "trust_remote_code": False, "use_pretrained_backbone": False},
    {"_class_name": "UNet2DConditionModel", "tokenizer_class": "T5Tokenizer", "processor_class": None},
    {"_name_or_path": "someone/x", "model_type": "t5"},
]


@pytest.mark.parametrize("config", HOSTILE, ids=lambda config: json.dumps(config)[:50])
def test_keys_by_which_a_library_reaches_out_are_found_and_named(config: dict[str, Any]) -> None:
    found = reaching_out(json.dumps({"deep": [config]}))
    assert found
    assert found.startswith("$.deep[0].")


@pytest.mark.parametrize("config", HARMLESS, ids=lambda config: json.dumps(config)[:50])
def test_what_the_libraries_save_themselves_is_harmless(config: Any) -> None:
    assert reaching_out(json.dumps(config)) is None


def test_only_configurations_are_looked_at_and_not_vocabularies() -> None:
    assert all(map(is_configuration, ("model_index.json", "config.json", "tokenizer_config.json")))
    assert not any(map(is_configuration, ("tokenizer.json", "vocab.json", "added_tokens.json")))


def test_deep_configurations_do_not_overflow() -> None:
    assert reaching_out('{"a":' * 500 + '{"auto_map": "x"}' + "}" * 500)
    with pytest.raises((RecursionError, ValueError)):
        reaching_out("[" * 200_000)


def test_every_implementation_that_transformers_reads_from_a_configuration_is_known() -> None:
    """A key of this kind in a later version shows here."""
    spec = importlib.util.find_spec("transformers")
    assert spec
    assert spec.origin
    source = Path(spec.origin).with_name("configuration_utils.py").read_text()
    keys = set(re.findall(r"\b_?(\w+_implementation)\b", source)) - {"sub_implementation", "current_implementation"}
    assert {"attn_implementation", "experts_implementation"} <= keys
    for key in keys:
        assert reaching_out(json.dumps({key: "someone/x"})), key
        assert not reaching_out(json.dumps({key: sorted(OWN_IMPLEMENTATIONS)[0]}))


def test_classes_whose_module_brings_code_are_found() -> None:
    from transformers import CLIPTextModel, RwkvModel, T5EncoderModel, YosoModel

    assert fetches_code(RwkvModel)
    assert fetches_code(YosoModel)
    assert not fetches_code(CLIPTextModel)
    assert not fetches_code(T5EncoderModel)
    assert not fetches_code(dict)
