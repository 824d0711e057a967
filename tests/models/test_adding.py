"""Opening models that are added to a pipeline: folders of both libraries, and what is refused."""

from __future__ import annotations

import json

import pytest

from diffkiln.errors import SourceError
from diffkiln.models.adding import open_added
from diffkiln.spec.model import ComponentSource
from tests.models.enhancers import autoencoder, srvgg, swin2sr
from tests.pipelines import WARNING_FILTERS

pytestmark = [pytest.mark.filterwarnings(line) for line in WARNING_FILTERS]


def opened(base, signed=None, **given):
    return open_added("enhancer", ComponentSource(**given), base, signed)


def test_models_of_diffusers_are_signed_unless_a_spec_says_otherwise(tmp_path):
    swin2sr(tmp_path / "swin")
    autoencoder(tmp_path / "tiny")
    assert not opened(tmp_path, model="swin").signed
    assert opened(tmp_path, model="tiny").signed
    assert not opened(tmp_path, model="tiny", signed=False).signed
    assert opened(tmp_path, model="swin", signed=True).signed


def test_the_digest_is_of_configuration_and_weights(tmp_path):
    swin2sr(tmp_path / "one")
    swin2sr(tmp_path / "two")
    first, second = opened(tmp_path, model="one"), opened(tmp_path, model="two")
    assert first.digest == second.digest
    config = json.loads((tmp_path / "two" / "config.json").read_text())
    (tmp_path / "two" / "config.json").write_text(json.dumps(config | {"layer_norm_eps": 0.01}))
    assert opened(tmp_path, model="two").digest != first.digest
    srvgg(tmp_path / "x.safetensors")
    assert opened(tmp_path, single_file="x.safetensors").digest.startswith("sha256:")


def test_a_folder_in_a_folder(tmp_path):
    swin2sr(tmp_path / "all" / "swin")
    assert opened(tmp_path, model="all", subfolder="swin").component.root.name == "swin"


@pytest.mark.parametrize(
    ("given", "where", "reason"),
    [
        ({"model": "absent folder"}, ".model", "there is no folder absent folder"),
        ({"model": "owner/name"}, ".revision", "needs a revision"),
        ({"model": "empty"}, ".model", "has no config.json"),
        ({"single_file": "absent.safetensors"}, ".file", "there is no file absent.safetensors"),
    ],
)
def test_what_is_not_there_is_told_with_its_place(given, where, reason, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(SourceError) as found:
        opened(tmp_path, **given)
    (problem,) = found.value.problems
    assert problem.where == where
    assert reason in problem.reason


def test_code_beside_a_model_is_refused(tmp_path):
    swin2sr(tmp_path / "swin")
    (tmp_path / "swin" / "modeling.py").write_text("raise SystemExit")
    with pytest.raises(SourceError, match="brings its own code"):
        opened(tmp_path, model="swin")


def test_a_model_without_its_weights_is_refused(tmp_path):
    swin2sr(tmp_path / "swin")
    (tmp_path / "swin" / "model.safetensors").unlink()
    with pytest.raises(SourceError, match="there are no weights"):
        opened(tmp_path, model="swin")
