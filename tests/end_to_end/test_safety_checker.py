"""The safety checker is a component like any other: it runs, and says what it objects to, unless a spec omits it."""

from __future__ import annotations

import json

import diffusers
import pytest
from click.testing import CliRunner

import diffkiln
from diffkiln.cli import cli
from diffkiln.errors import SourceError
from tests.end_to_end.compared import built, difference, drawn, spec_of
from tests.pipelines import WARNING_FILTERS, build_folder
from tests.pipelines.checkers import with_checker

pytestmark = [pytest.mark.filterwarnings(line) for line in WARNING_FILTERS]


@pytest.fixture(scope="module")
def model(families, tmp_path_factory):
    return with_checker(build_folder("sd", families), tmp_path_factory.mktemp("checked") / "model")


@pytest.fixture(scope="module")
def bundle(model):
    spec = spec_of({"model": "model"}, passes=[{"name": "compile", "component": "safety_checker", "scope": "whole"}])
    spec["inputs"]["num_images_per_prompt"] = 3
    return built(spec, model.parent, model.parent / "bundle")


def test_what_it_objects_to_is_black_and_told_as_in_diffusers(model, bundle):
    eager = diffusers.DiffusionPipeline.from_pretrained(model)
    objected = set()
    for as_diffusers in (False, True):
        pipe = diffkiln.load(bundle, as_diffusers=as_diffusers)
        for seed, prompt in ((0, "a photo of a cat"), (1, "two dogs"), (2, "snow")):
            given = {"prompt": prompt, "num_images_per_prompt": 3}
            wanted, found = drawn(eager, seed, **given), drawn(pipe, seed, **given)
            assert found.nsfw_content_detected == wanted.nsfw_content_detected
            assert all(type(value) is bool for value in found.nsfw_content_detected)
            assert difference(wanted.images, found.images) < 1e-5
            for image, flag in zip(found.images, found.nsfw_content_detected, strict=True):
                assert (image.max() == 0) == flag
            objected |= set(found.nsfw_content_detected)
    assert objected == {True, False}


def test_it_says_so_in_the_card_in_inspect_and_in_repr(bundle):
    assert "A safety checker looks at finished images" in (bundle / "README.md").read_text()
    assert "safety checker looks at" in CliRunner().invoke(cli, ["inspect", str(bundle)]).output.replace("\n", " ")
    assert "a safety checker looks at the images" in repr(diffkiln.load(bundle))


def test_a_tuple_has_what_it_objects_to_as_its_second_part(bundle):
    pipe = diffkiln.load(bundle)
    given = {"prompt": "a photo of a cat", "num_images_per_prompt": 3, "output_type": "np", "return_dict": False}
    images, flags = pipe(**given)
    assert len(images) == len(flags) == 3
    assert pipe(**given | {"output_type": "latent"})[1] is None


def test_a_spec_may_omit_it(model, tmp_path):
    bundle = built(spec_of({"model": str(model), "omit": ["safety_checker"]}), model.parent, tmp_path / "bundle")
    eager = diffusers.DiffusionPipeline.from_pretrained(model, safety_checker=None)
    pipe = diffkiln.load(bundle)
    assert difference(drawn(eager).images, drawn(pipe).images) < 1e-5
    assert "without its safety checker" in repr(pipe)
    card = (bundle / "README.md").read_text()
    assert "The safety checker of the source is left out" in card
    assert "safety_checker is left out: the spec omits it" in card.replace("\\_", "_")
    assert json.loads((bundle / "spec.json").read_text())["source"]["omit"] == ["safety_checker"]
    assert "is left out" in CliRunner().invoke(cli, ["inspect", str(bundle)]).output


def test_omitting_what_is_not_there_is_refused(families):
    folder = build_folder("sd", families)
    with pytest.raises(SourceError, match=r"omit\[0\].*has no safety_checker"):
        diffkiln.check(spec_of({"model": folder.name, "omit": ["safety_checker"]}), base=folder.parent)
