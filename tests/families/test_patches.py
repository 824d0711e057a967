"""Methods of the libraries that are replaced while a call is recorded: made for one text of them, only for so long."""

from __future__ import annotations

import importlib
import sys
import warnings
from types import SimpleNamespace

import diffusers
import pytest
import torch
import transformers
from diffusers.models.transformers import transformer_hidream_image  # noqa: F401  (its experts are not exported)
from diffusers.pipelines.marigold import marigold_image_processing  # noqa: F401  (its processor is not exported)
from diffusers.pipelines.stable_diffusion import safety_checker  # noqa: F401  (nor is its model)
from diffusers.pipelines.wan.pipeline_wan import WanPipeline

from diffkiln.errors import DataDependent
from diffkiln.families import kandinsky, z_image
from diffkiln.interpreter.quiet import quiet_libraries
from diffkiln.record import patches
from diffkiln.record.patches import Patch, fingerprint, fixed_lengths, known_patches, outdated, paddings, resized
from tests.coverage.calls import CALLS

for blocks in ("ernie_image", "helios", "hunyuan_video1_5", "qwenimage", "wan", "wan_animate_2", "z_image"):
    for module in ("before_denoise", "encoders"):
        importlib.import_module(f"diffusers.modular_pipelines.{blocks}.{module}")

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of torch.jit, which it uses
    importlib.import_module("diffusers.pipelines.kolors.text_encoder")


def named(name):
    """The class of this name in diffusers or transformers, of which not all are exported."""
    exported = getattr(diffusers, name, None) or getattr(transformers, name, None)
    modules = [module for key, module in sys.modules.items() if key.startswith(("diffusers.", "transformers."))]
    found = [vars(module)[name] for module in modules if name in vars(module)]
    assert exported or found, name
    return exported or found[0]


@pytest.mark.parametrize("patch", known_patches(), ids=lambda patch: f"{patch.known_in.split()[0]}.{patch.method}")
def test_patches_are_made_for_the_libraries_that_are_installed(patch):
    assert patch.known_in
    for kind in map(named, patch.known_in.split()):
        assert patch.fits(kind, kind), kind


@pytest.mark.parametrize("patch", known_patches(), ids=lambda patch: f"{patch.known_in.split()[0]}.{patch.method}")
def test_every_text_that_a_patch_fits_is_one_of_the_libraries(patch):
    texts = {text for known in patch.prints.values() for text in known.split()}
    kinds = [named(name) for name in patch.known_in.split()]
    found = {fingerprint(patch._stands_for(kind, kind, name)) for kind in kinds for name in patch.prints}
    assert found == texts


@pytest.mark.parametrize("name", ["ChronoEditPipeline", "WanAnimatePipeline", "BriaFiboEditPipeline"])
def test_a_pipeline_with_the_text_of_another_family_needs_no_list(name):
    kind = named(name)
    assert [patch for patch in known_patches() if patch.method in vars(kind) and patch.fits(kind, kind)]


@pytest.mark.parametrize("seed", range(4))
def test_a_widened_mask_is_that_of_kandinskys_own_loop(seed):
    masks = (torch.rand(2, 1, 7, 9, generator=torch.Generator().manual_seed(seed)) > 0.2).float()
    (patch,) = (patch for patch in kandinsky.PLUGIN.patches if patch.function)
    own = vars(sys.modules[diffusers.KandinskyInpaintPipeline.__module__])[patch.method]
    assert own(masks.clone()).equal(patch.replacement(masks.clone()))


def test_a_function_beside_a_pipeline_is_replaced_for_so_long():
    module = sys.modules[diffusers.KandinskyV22InpaintPipeline.__module__]
    own = module.prepare_mask
    with fixed_lengths(diffusers.KandinskyV22InpaintPipeline.__new__(diffusers.KandinskyV22InpaintPipeline)):
        assert module.prepare_mask is kandinsky._prepare_mask
    assert module.prepare_mask is own


def test_control_nets_that_take_captions_of_every_length_are_refused():
    pipe = SimpleNamespace(components={"controlnet": None})
    with pytest.raises(DataDependent, match="captions as long as each prompt"):
        z_image.PLUGIN.patches[0].replacement(pipe, "a fox")


class OfAnother(WanPipeline):
    """A pipeline of another package, which no list names."""


@pytest.fixture(scope="module")
def wan():
    with quiet_libraries():
        return CALLS["wan"].build()


def test_methods_are_replaced_only_while_it_lasts(wan):
    before = WanPipeline._get_t5_prompt_embeds
    with fixed_lengths(wan):
        assert WanPipeline._get_t5_prompt_embeds is not before
    assert WanPipeline._get_t5_prompt_embeds is before


def test_a_derived_pipeline_needs_no_list(wan):
    before = WanPipeline._get_t5_prompt_embeds
    with fixed_lengths(OfAnother(**wan.components)):
        assert OfAnother._get_t5_prompt_embeds is not before
    assert OfAnother._get_t5_prompt_embeds is before


def test_only_the_classes_of_the_pipeline_are_looked_at():
    before = WanPipeline._get_t5_prompt_embeds
    with fixed_lengths(torch.nn.Linear(1, 1)):
        assert WanPipeline._get_t5_prompt_embeds is before


def test_a_replacement_may_call_the_method_whose_place_it_takes(wan, monkeypatch):
    def around(original):
        return lambda self, *args: (original, args)

    before = WanPipeline.encode_prompt
    prints = {"encode_prompt": fingerprint(before)}
    monkeypatch.setattr(patches, "known_patches", lambda: (Patch(prints, around, around=True),))
    with fixed_lengths(wan):
        assert WanPipeline.encode_prompt(None, 1) == (before, (1,))
    assert WanPipeline.encode_prompt is before


class Base:
    def encode(self):
        return self.inner() + 1

    def inner(self):
        return 1


class OfBase(torch.nn.Module, Base):
    pass


class Same(Base):
    pass


class OtherInner(Base):
    def inner(self):
        return 2


class CallsBase(Base):
    def encode(self):
        return 10 * super().encode()


@pytest.fixture
def of_base(monkeypatch):
    """There is one patch, of `Base.encode`, which pads a component."""
    prints = {name: fingerprint(vars(Base)[name]) for name in ("encode", "inner")}
    padded = {"component": object()}
    patch = Patch(prints, lambda self: 7, known_in="Base", paddings=lambda pipe, fixed: padded)
    monkeypatch.setattr(patches, "known_patches", lambda: (patch,))
    return padded


def test_a_patch_that_counted_prompts_do_not_need_is_left_out(monkeypatch):
    prints, padded = {"encode": fingerprint(Base.encode)}, {"component": object()}
    for uncounted, expected in ((False, 7), (True, 2)):
        patch = Patch(prints, lambda self: 7, uncounted=uncounted, paddings=lambda pipe, fixed: padded)
        monkeypatch.setattr(patches, "known_patches", lambda patch=patch: (patch,))
        with fixed_lengths(Base(), counted=True):
            assert Base().encode() == expected
        assert paddings(Base(), {}, counted=True) == ({} if uncounted else padded)
        assert patches.is_patched(OfBase(), counted=True) != uncounted
        assert paddings(Base(), {}) == padded
        assert patches.is_patched(OfBase())


def test_the_methods_are_those_that_an_object_has(of_base):
    """A derived class may have another one of those that the patch stands for, or call its base's."""
    for kind, expected in ((Base, 7), (Same, 7), (OtherInner, 3), (CallsBase, 70)):
        with fixed_lengths(kind()):
            assert kind().encode() == expected
        assert paddings(kind(), {}) == (of_base if expected != 3 else {})
    assert [Base().encode(), Same().encode(), OtherInner().encode(), CallsBase().encode()] == [2, 2, 3, 20]


def test_another_text_is_told_by_the_names_of_the_classes(of_base):
    assert outdated(Base()) == outdated(Same()) == ""
    assert outdated(OtherInner()) == "tests' Base.encode"


def test_fingerprints_tell_code_and_not_words():
    class First:
        def method(self, a: int) -> int:
            """Words."""
            return a + 1  # more words

    class Second:
        def method(self, a):
            return a + 1

    class Third:
        def method(self, a):
            return a + 2

    prints = [fingerprint(kind.method) for kind in (First, Second, Third)]
    assert prints[0] == prints[1] != prints[2]


def test_what_has_no_text_has_no_fingerprint():
    assert {fingerprint(thing) for thing in (None, len, lambda: 1, object.__init__, property(len))} == {""}


def test_tensors_are_cut_and_filled_on_either_side():
    row = torch.tensor([[1, 2]])
    assert [resized(row, length, 9).tolist() for length in (1, 2, 3)] == [[[1]], [[1, 2]], [[1, 2, 9]]]
    assert [resized(row, length, 9, "left").tolist() for length in (1, 3)] == [[[2]], [[9, 1, 2]]]


def test_functions_beside_the_pipelines_that_a_pipeline_is_made_of_are_replaced():
    """The combined pipeline of Kandinsky runs that of inpainting, which widens masks in a loop."""
    with quiet_libraries():
        pipe = CALLS["kandinsky_inpaint_combined"].build()
    assert "prepare_mask" in {patch.method for _, patch in patches._fitting(patches._parts(pipe))}
