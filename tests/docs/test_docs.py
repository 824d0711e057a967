"""The documents mention everything that they are about, and nothing in them leads nowhere."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from diffkiln.bundle import Manifest, Requires
from diffkiln.passes.registry import option_models, pass_class, read_passes
from diffkiln.passes.variants import constant
from diffkiln.spec import PassEntry
from diffkiln.spec.model import Inputs, Offload, Runtime, Source, Spec, TargetSpec
from diffkiln.spec.quality import Gate
from tests.docs.examples import blocks, values

ROOT = Path(__file__).parents[2]
DOCUMENTS = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("examples/**/*.md")]


def _words(name: str) -> set[str]:
    return set(re.findall(r"\w+", (ROOT / "docs" / name).read_text()))


PASSES = [model for cls in option_models().values() for model in (cls, *cls.variants().values())]


@pytest.mark.parametrize("model", [Spec, Source, TargetSpec, Inputs, Runtime, Offload, Gate, *PASSES])
def test_every_field_of_a_spec_is_explained(model):
    assert set(model.model_fields) <= _words("spec.md")


def test_every_pass_is_explained():
    assert set(option_models()) <= _words("spec.md")


@pytest.mark.parametrize("model", [Manifest, Requires])
def test_every_field_of_the_manifest_is_explained(model):
    assert set(model.model_fields) <= _words("bundle.md")


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_between_documents_lead_somewhere(document):
    for link in re.findall(r"\]\(([^)#:]+)\)", document.read_text()):
        assert (document.parent / link).exists(), link


def _json_in(document: str) -> list[Any]:
    """What the JSON examples of a document show."""
    found = [block for block in blocks(ROOT / "docs" / document) if block.language == "json"]
    return [value for block in found for value in values(block)]


def test_the_examples_of_passes_are_read():
    found = _json_in("passes.md")
    entries = [item for item in found if "name" in item]
    assert len(entries) >= 3
    named = [way for item in entries for way in pass_class(item["name"]).ways(item).values() or (item,)]
    read_passes([PassEntry.model_validate(item) for item in named])
    (source,) = [item["source"] for item in found if "source" in item]
    assert Source.model_validate(source).gguf


def test_the_examples_of_schedules_are_read():
    entries = [item for item in _json_in("schedules.md") if "name" in item]
    assert {entry["name"] for entry in entries} >= {"scheduler", "vae", "cache_schedule"}
    read_passes([PassEntry.model_validate(item) for item in entries])


@pytest.mark.parametrize(("name", "document"), [("cache_schedule", "schedules.md"), ("quantize", "passes.md")])
def test_every_method_and_its_options_are_explained(name, document):
    text = (ROOT / "docs" / document).read_text()
    models = pass_class(name).variants().values()
    assert models
    for model in models:
        told = [constant(model, field) for field in model.discriminators if field in ("method", "type", "backend")]
        assert all(f"`{word}`" in text for word in (*told, *set(model.own_fields()) - {"include", "exclude"}))
