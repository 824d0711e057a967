"""Faults of FAULTS.md while a bundle is built that no other test provokes through the whole compiler."""

from __future__ import annotations

import json
import os

import pytest
import torch

import diffkiln
from diffkiln.bundle import open_bundle
from diffkiln.errors import PassError, SourceError
from diffkiln.passes.model.cast import Cast
from tests.bundle.making import make
from tests.conftest import DIGITS
from tests.pipelines import WARNING_FILTERS

pytestmark = [pytest.mark.filterwarnings(text) for text in WARNING_FILTERS]


@pytest.fixture
def spec():
    """The digits example, uncompiled, with a pass that can fail."""
    data = json.loads((DIGITS / "spec.json").read_text())
    data["source"]["model"] = str(DIGITS / "model")
    data["passes"] = [{"name": "cast", "component": "vae", "dtype": "float32"}]
    return data


def test_an_exception_inside_a_pass_names_it_and_leaves_the_old_bundle_alone(spec, tmp_path, monkeypatch):
    """1. On the real weights, when half of the new bundle is in the staging."""
    output = tmp_path / "bundle"
    old = make(output)
    staged = []

    def broken(self, module: torch.nn.Module):
        if not any(tensor.is_meta for tensor in module.parameters()):
            staged.extend(name for name in os.listdir(tmp_path) if "staging" in name)
            raise ZeroDivisionError("on purpose")
        return ["would cast"]

    monkeypatch.setattr(Cast, "apply", broken)
    with pytest.raises(PassError, match=r"\$\.passes\[0\]: cast failed: ZeroDivisionError: on purpose"):
        diffkiln.compile(spec, output, force=True)
    assert len(staged) == 1
    assert os.listdir(tmp_path) == ["bundle"]
    with open_bundle(output, expect_id=old) as bundle:
        bundle.verify().close()


def test_a_source_that_names_code_is_refused_and_nothing_is_imported(spec, tmp_path):
    """36. The marker would show that the module was imported."""
    model = tmp_path / "model"
    model.mkdir()
    (model / "evil.py").write_text(f"open({str(tmp_path / 'marker')!r}, 'w')\nclass Pipe: pass\n")
    (model / "model_index.json").write_text(json.dumps({"_class_name": ["evil", "Pipe"], "vae": ["evil", "Pipe"]}))
    spec["source"]["model"] = str(model)
    with pytest.raises(SourceError, match=r"\$\.source"):
        diffkiln.compile(spec, tmp_path / "bundle")
    assert sorted(os.listdir(tmp_path)) == ["model"]
