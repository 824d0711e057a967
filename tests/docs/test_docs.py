"""The documents mention everything that they are about, and nothing in them leads nowhere."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from diffkiln.bundle import Manifest, Requires
from diffkiln.passes.registry import option_models
from diffkiln.spec.model import Inputs, Offload, Runtime, Source, Spec, TargetSpec

ROOT = Path(__file__).parents[2]
DOCUMENTS = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("examples/**/*.md")]


def _words(name: str) -> set[str]:
    return set(re.findall(r"\w+", (ROOT / "docs" / name).read_text()))


@pytest.mark.parametrize("model", [Spec, Source, TargetSpec, Inputs, Runtime, Offload, *option_models().values()])
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
