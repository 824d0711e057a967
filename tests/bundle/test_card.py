"""The model card: front matter for the Hub, what was done, what was measured; nothing breaks out of its place."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
import yaml

from diffkiln.bundle.card import card, read_build
from tests.bundle.making import manifest_of

BUILD: dict[str, Any] = {
    "diffkiln": "0.1.0",
    "torch": "2.13.0",
    "host": {"machine": "x86_64", "system": "Linux"},
    "seconds": {"record": 1.25, "publish": 0.5},
    "peak_rss_bytes": 123_000_000,
    "passes": [{"name": "fuse_qkv", "notes": ["19 attentions"], "seconds": 0.1}],
    "notices": ["safety_checker is left out"],
    "source": {"license": "openrail++", "base_model": ["someone/large"]},
}


def metadata(text: str) -> dict[str, Any]:
    return yaml.safe_load(text.split("---\n")[1])


def test_card_says_what_was_done_and_measured() -> None:
    text = card(manifest_of(), BUILD, "me/small", "ab" * 32)
    assert "| fuse_qkv | transformer | 19 attentions |" in text
    assert "| record, seconds | 1.2 |" in text
    assert "| peak memory of the build, MB | 123 |" in text
    assert "- safety_checker is left out" in text
    assert "diffkiln pull me/small -o bundle" in text
    assert "ab" * 32 in text


def test_licence_and_base_model_are_carried_over() -> None:
    told = metadata(card(manifest_of(), BUILD | {"source": BUILD["source"] | {"license_link": "https://x/y"}}))
    assert told["license"] == "openrail++"
    assert told["license_link"] == "https://x/y"
    assert told["library_name"] == "diffkiln"
    assert told["pipeline_tag"] == "text-to-image"
    assert told["tags"] == ["diffkiln", "compiled", "cpu"]
    assert "base_model" not in told  # the manifest names "tiny", which is not a repository


def test_model_of_the_hub_is_the_base_model_and_a_quantized_one_says_so() -> None:
    made = manifest_of()
    quantize = made.passes[0].model_copy(update={"name": "quantize"})
    source = {"model": "someone/tiny", "revision": "ab" * 20}
    told = metadata(card(made.model_copy(update={"source": source, "passes": (quantize,)}), BUILD))
    assert told["base_model"] == ["someone/tiny"]
    assert told["base_model_relation"] == "quantized"
    local = made.model_copy(update={"source": {"digest": "sha256:00"}})
    assert metadata(card(local, BUILD))["base_model"] == ["someone/large"]


def test_missing_licence_is_said() -> None:
    text = card(manifest_of(), {})
    assert "license" not in metadata(text)
    assert "states no licence" in text


def fixing(fixed: dict[str, Any]) -> Any:
    """A manifest whose only variant fixes this."""
    made = manifest_of()
    variant = made.pipeline.variants[0].model_copy(update={"fixed": fixed})
    return made.model_copy(update={"pipeline": made.pipeline.model_copy(update={"variants": (variant,)})})


SIZE = {"height": 64, "width": 64}


@pytest.mark.parametrize(
    ("fixed", "task", "call"),
    [
        ({"height": 64}, "text-to-image", 'image = pipe("a prompt").images[0]'),
        ({"num_frames": 9}, "text-to-video", 'frames = pipe("a prompt").frames[0]'),
        ({"image": SIZE, "mask_image": [SIZE]}, "image-to-image", "image=image, mask_image=mask_image).images"),
        ({"image": SIZE, "num_frames": 9}, "image-to-video", "image=image).frames"),
        ({"video": [SIZE] * 5}, "video-to-video", "video=video).frames"),
        ({"image` x": SIZE}, "text-to-image", 'image = pipe("a prompt").images[0]'),
    ],
)
def test_the_call_is_given_what_it_takes(fixed: dict[str, Any], task: str, call: str) -> None:
    text = card(fixing(fixed), {"source": {"pipeline_tag": f"text-to-{task.rpartition('-')[2]}"}})
    assert metadata(text)["pipeline_tag"] == metadata(card(fixing(fixed), {}))["pipeline_tag"] == task
    assert call in text


def test_films_are_told_from_pictures() -> None:
    films = fixing({"num_frames": 9})
    assert metadata(card(films, {}))["pipeline_tag"] == "text-to-video"
    assert metadata(card(films, {"source": {"pipeline_tag": "image-to-video"}}))["pipeline_tag"] == "image-to-video"


def test_values_cannot_break_out_of_their_place() -> None:
    hostile = "mit\n---\ntags: [other]\n| a | b |"
    build = BUILD | {"source": {"license": hostile}, "notices": [hostile], "passes": [{"notes": [hostile]}]}
    text = card(manifest_of(), build)
    assert metadata(text)["license"] == hostile
    assert metadata(text)["tags"] == ["diffkiln", "compiled", "cpu"]
    assert text.split("\n").count("---") == 2
    assert r"| fuse_qkv | transformer | mit --- tags: \[other\] \| a \| b \| |" in text


@pytest.mark.parametrize(
    "build", [{"passes": 3, "seconds": [], "host": 1, "notices": {}, "source": "x"}, {"passes": [1]}]
)
def test_build_notes_of_another_shape_are_left_out(build: dict[str, Any]) -> None:
    assert "| fuse_qkv | transformer |  |" in card(manifest_of(), build)


def test_build_notes_that_cannot_be_read_are_none() -> None:
    assert read_build(b"{") == read_build(b"[]") == read_build(b"\xff") == {}
    assert read_build(json.dumps(BUILD).encode()) == BUILD


@pytest.mark.parametrize(
    "hostile",
    ["<img src=https://evil.example/x>", "[click](https://evil.example)", "https://evil.example", "www.evil.example",
     "me@evil.example", "a\u202eb", "a\u009b31mb", "`code` ``"],
)  # fmt: skip
def test_no_string_of_a_stranger_is_html_a_link_or_a_control(hostile: str) -> None:
    build = BUILD | {
        "source": {"license": hostile, "license_link": f"javascript:{hostile}", "pipeline_tag": hostile},
        "notices": [hostile],
        "passes": [{"notes": [hostile]}],
        "host": {"machine": hostile},
        "seconds": {hostile: 1.0},
        "diffkiln": hostile,
    }
    made = fixing({"prompt": hostile})
    made = made.model_copy(
        update={
            "source": {"architecture": hostile},
            "pipeline": made.pipeline.model_copy(update={"class_name": hostile}),
        }
    )
    text = card(made, build)
    body = re.sub(r"<!-- -->", "\n", text.split("---\n", 2)[2])
    body = re.sub(r"(`+) ?.*?[^`]\1(?!`)", "", body)  # code spans show what they hold
    assert not re.search(r"<[a-z/!]|[^\\]\]\(|https?://|www\.|\w@\w", body)
    assert all(character == "\n" or character.isprintable() for character in text)
    assert "license_link" not in metadata(text)
    assert metadata(text)["pipeline_tag"] == "text-to-image"
