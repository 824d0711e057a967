"""enhance: what a bundle draws is what diffusers draws, enhanced by the model itself; and what is refused."""

from __future__ import annotations

import json

import diffusers
import pytest
import torch
from click.testing import CliRunner

import diffkiln
from diffkiln.bundle import open_bundle
from diffkiln.bundle.bom import bom
from diffkiln.bundle.evidence import costs_of
from diffkiln.cli import cli
from diffkiln.errors import IllegalPlan, Incompatible, RecordError, SourceError, SpecError
from diffkiln.evaluate.quality import evaluate
from diffkiln.evaluate.ways import Asked, ways_of
from tests.end_to_end.compared import built, spec_of
from tests.models.enhancers import autoencoder, rrdbnet, srvgg, swin2sr
from tests.passes.plans import placed
from tests.pipelines import FAMILIES, WARNING_FILTERS, build_folder

pytestmark = [pytest.mark.filterwarnings(line) for line in WARNING_FILTERS]
SWIN = {"name": "enhance", "model": "swin"}
CLEANER = {"name": "enhance", "component": "cleaner", "model": "tiny"}
#: What a last bit of bfloat16 is, of numbers up to 1.
BFLOAT16 = 2**-8
SMALL = {"height": 32, "width": 32, "num_inference_steps": 2}


@pytest.fixture(scope="module")
def folder(families, tmp_path_factory):
    """Models behind the decoder, and the tiny pipelines."""
    made = tmp_path_factory.mktemp("enhance")
    for name in ("sd", "ltx"):
        (made / name).symlink_to(build_folder(name, families))
    return made


@pytest.fixture(scope="module")
def models(folder):
    """The models by what a spec calls them."""
    return {
        "swin": swin2sr(folder / "swin"),
        "tiny": autoencoder(folder / "tiny"),
        "dense": rrdbnet(folder / "dense.safetensors"),
        "compact": srvgg(folder / "compact.safetensors"),
        "plain": srvgg(folder / "plain.safetensors", scale=1),
    }


def spec(*passes, family="sd", **more):
    made = spec_of({"model": family}, passes=list(passes), **more)
    made["inputs"] |= FAMILIES[family].call | SMALL
    return made


def drawn(pipe, family="sd", **keywords):
    given = {"prompt": "a photo of a cat", **FAMILIES[family].call, **SMALL, "output_type": "pt"}
    return pipe(**{**given, **keywords}, generator=torch.Generator().manual_seed(1))


def eager(folder, family="sd"):
    pipe = diffusers.DiffusionPipeline.from_pretrained(folder / family)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def difference(one, other):
    assert one.shape == other.shape
    return float((one.float() - other.float()).abs().max())


@pytest.fixture(scope="module")
def bundle(folder, models):
    """Behind Stable Diffusion: Swin2SR, an autoencoder, and a compact network that is cast."""
    half = {"name": "cast", "component": "last", "dtype": "bfloat16"}
    last = {"name": "enhance", "component": "last", "file": "plain.safetensors"}
    return built(spec(SWIN, CLEANER, last, half), folder, folder / "bundle")


@pytest.mark.slow
class TestBundle:
    def test_it_draws_what_diffusers_draws_enlarged_by_the_models_themselves(self, bundle, folder, models):
        with diffkiln.load(bundle) as pipe:
            pictures = drawn(pipe).images
            assert pipe("a cat").images[0].size == (64, 64)
            assert drawn(pipe, output_type="latent").images.shape == (1, 4, 4, 4)
        with torch.inference_mode():
            wanted = models["swin"](drawn(eager(folder)).images).reconstruction.clamp(0, 1)
            wanted = (models["tiny"](wanted * 2 - 1).sample / 2 + 0.5).clamp(0, 1)
            wanted = srvgg(folder / "again.safetensors", scale=1).bfloat16()(wanted.bfloat16()).clamp(0, 1).float()
        assert pictures.shape == (1, 3, 64, 64)
        assert difference(pictures, wanted) <= BFLOAT16

    def test_models_are_components_like_any_other(self, bundle, models):
        with open_bundle(bundle) as opened:
            manifest = opened.manifest
            with opened.verify() as verified:
                described = bom(verified)
        row = next(row for row in manifest.passes if row.name == "enhance")
        assert row.options["class"] == "Swin2SRForImageSuperResolution"
        assert row.options["model"] == row.options["digest"]
        sizes = {name: sum(part.bytes for part in parts) for name, parts in manifest.weights.items()}
        state = models["swin"].state_dict().values()
        assert sizes["enhancer"] == sum(tensor.numel() * tensor.itemsize for tensor in state)
        assert [item.get("description") for item in described["components"]].count("component") == 3
        assert "| enhance | enhancer | Swin2SRForImageSuperResolution" in (bundle / "README.md").read_text()
        assert "enhancer" in CliRunner().invoke(cli, ["inspect", str(bundle)]).output
        assert str(bundle.parent) not in (bundle / "spec.json").read_text()

    @pytest.mark.more
    def test_evaluate_finds_the_models_again(self, bundle):
        found = evaluate(bundle, "eager", ["a cat"], metrics=["psnr"])
        assert found.rows[0].score.overall > 60

    def test_other_sizes_are_not_compared(self, bundle, folder):
        with pytest.raises(SpecError, match="pictures of one are 64 x 64 and the other's 32 x 32"):
            ways_of(bundle, (str(folder / "sd"),), Asked())

    def test_another_model_than_the_bundles_is_not_its_original(self, bundle, folder):
        config = (folder / "swin" / "config.json").read_text()
        try:
            (folder / "swin" / "config.json").write_text(json.dumps(json.loads(config) | {"layer_norm_eps": 0.01}))
            with pytest.raises(SourceError, match="the model of enhancer is not the one"):
                ways_of(bundle, ("eager",), Asked())
        finally:
            (folder / "swin" / "config.json").write_text(config)

    def test_diffusers_has_no_place_for_them(self, bundle):
        with pytest.raises(Incompatible, match="no place for enhancer"):
            diffkiln.load(bundle, as_diffusers=True)


@pytest.mark.more
@pytest.mark.slow
def test_the_ledger_compares_with_the_original_of_the_same_size(folder, models):
    (folder / "prompts.txt").write_text("a cat\n")
    int8 = {"name": "quantize", "component": "unet", "type": "int8_weight_only"}
    gates = [{"metric": "psnr", "at_least": 20, "prompts": "prompts.txt"}]
    with open_bundle(built(spec(int8, SWIN, quality=gates), folder, folder / "gated")) as opened:
        (table,) = costs_of(opened.build)
    values = dict(table.cumulative)
    assert list(values) == ["quantize unet", "enhance enhancer", "bundle"]
    assert 20 < min(values.values()) <= max(values.values()) < 80
    assert values["bundle"] == pytest.approx(values["enhance enhancer"], abs=0.1)


@pytest.mark.more
@pytest.mark.slow
def test_frames_of_a_video_are_enlarged(folder, models):
    made = spec({"name": "enhance", "file": "compact.safetensors"})
    call = FAMILIES["ltx"].call | SMALL
    extra = {"max_sequence_length": call.pop("max_sequence_length")}
    made |= {
        "source": {"model": "ltx", "dtype": "float32"},
        "inputs": {**call, "call": extra},
    }
    with diffkiln.load(built(made, folder, folder / "video")) as pipe:
        frames = drawn(pipe, "ltx").frames
    plain = drawn(eager(folder, "ltx"), "ltx").frames
    with torch.inference_mode():
        wanted = torch.stack([models["compact"](frame).clamp(0, 1) for frame in plain.unbind(1)], 1)
    assert difference(frames, wanted) <= 1e-4


@pytest.mark.more
@pytest.mark.slow
@pytest.mark.parametrize("scope", ["whole", "blocks"])
def test_it_is_compiled(scope, folder, models):
    compiled = {"name": "compile", "component": "enhancer", "scope": scope}
    name = "dense" if scope == "blocks" else "compact"
    bundle = built(spec({"name": "enhance", "file": f"{name}.safetensors"}, compiled), folder, folder / scope)
    with diffkiln.load(bundle) as pipe:
        pictures = drawn(pipe).images
    with torch.inference_mode():
        wanted = models[name](drawn(eager(folder)).images).clamp(0, 1)
    assert difference(pictures, wanted) <= 1e-5


class TestChecks:
    @pytest.mark.parametrize(
        ("passes", "kind", "where", "reason"),
        [
            ([{"name": "enhance"}], SpecError, "$.passes[0]", "neither is given"),
            ([SWIN | {"file": "x.safetensors"}], SpecError, "$.passes[0]", "both are given"),
            ([{"name": "enhance", "file": "x.pth"}], SpecError, "$.passes[0].file", "can run code"),
            ([SWIN | {"component": "An enhancer"}], SpecError, "$.passes[0].component", "pattern"),
            ([{"name": "enhance", "model": "no where"}], SourceError, "$.passes[0].model", "there is no folder"),
            ([{"name": "enhance", "file": "no.safetensors"}], SourceError, "$.passes[0].file", "there is no file"),
            (
                [SWIN | {"component": "vae"}],
                SpecError,
                "$.passes[0].component",
                "'vae' is taken in StableDiffusionPipeline",
            ),
            (
                [SWIN | {"component": "to"}],
                SpecError,
                "$.passes[0].component",
                "'to' is taken in StableDiffusionPipeline",
            ),
            (
                [SWIN | {"component": "operators"}],
                SpecError,
                "$.passes[0].component",
                "'operators' is taken in StableDiffusionPipeline",
            ),
            ([SWIN, SWIN], SpecError, "$.passes[1].component", "'enhancer' is taken in StableDiffusionPipeline"),
            ([{"name": "enhance", "model": "sd/vae"}], None, "", ""),
            (
                [{"name": "enhance", "model": "sd/unet"}],
                IllegalPlan,
                "$.passes[0]",
                "takes no pictures of 1 x 3 x 32 x 32",
            ),
            (
                [{"name": "enhance", "model": "sd/text_encoder"}],
                IllegalPlan,
                "$.passes[0]",
                "enhancer (CLIPTextModel) takes no pictures",
            ),
            ([{"name": "enhance", "model": "grey"}], IllegalPlan, "$.passes[0]", "Swin2SRForImageSuperResolution"),
            (
                [{"name": "cast", "component": "enhancer", "dtype": "bfloat16"}, SWIN],
                IllegalPlan,
                "$.passes[1]",
                "enhance must come before cast",
            ),
        ],
    )
    def test_what_is_wrong_is_told_with_its_place(self, passes, kind, where, reason, folder, models):
        if not (folder / "grey").exists():
            swin2sr(folder / "grey", num_channels=1, num_channels_out=1)
        if kind is None:
            diffkiln.check(spec(*passes), base=folder)
            return
        with pytest.raises(kind) as found:
            diffkiln.check(spec(*passes), base=folder)
        assert (where, True) in [(problem.where, reason in problem.reason) for problem in found.value.problems]

    def test_a_pipeline_without_pictures_has_nothing_to_enhance(self, folder, models):
        (item,) = placed(SWIN)
        with pytest.raises(SpecError, match="StableAudioPipeline makes no pictures"):
            item.step.prepare(folder, diffusers.StableAudioPipeline)

    def test_a_size_that_windows_do_not_divide_is_legal(self, folder, models):
        made = spec(SWIN)
        made["inputs"] |= {"height": 72, "width": 40}
        notes = diffkiln.check(made, base=folder).report[0].notes
        assert notes == ("Swin2SRForImageSuperResolution is given the finished pictures and makes them 2 × as large",)

    def test_pictures_that_are_too_small_for_a_window_are_refused(self, folder, models):
        swin2sr(folder / "wide", image_size=40, window_size=40)
        made = spec(SWIN | {"model": "wide"})
        made["inputs"] |= {"height": 16, "width": 16}
        with pytest.raises(IllegalPlan, match="takes no pictures of 1 x 3 x 16 x 16"):
            diffkiln.check(made, base=folder)

    def test_a_bundle_that_runs_as_diffusers_has_no_place_for_it(self, folder, models, monkeypatch):
        def fails(*_):
            raise RecordError("told so")

        monkeypatch.setattr("diffkiln.compiler.compile.record", fails)
        made = spec(SWIN, runtime={"on_unrecordable": "diffusers"})
        with pytest.raises(diffkiln.errors.PassError, match="enhance rewrites the program, but there is none"):
            diffkiln.compile(made, folder / "none", base=folder)


@pytest.mark.more
@pytest.mark.slow
def test_it_is_quantized(folder, models):
    """To int8 weights, which cost what int8 costs: the picture stays near that of the plain model."""
    int8 = {"name": "quantize", "component": "enhancer", "type": "int8_weight_only"}
    plain, quantized = (built(spec(SWIN, *more), folder, folder / f"q{len(more)}") for more in ((), (int8,)))
    with diffkiln.load(plain) as one, diffkiln.load(quantized) as other:
        assert 0 < difference(drawn(one).images, drawn(other).images) <= 0.05
    with open_bundle(plain) as one, open_bundle(quantized) as other:
        sizes = [sum(row.bytes for row in each.manifest.weights["enhancer"]) for each in (one, other)]
    assert sizes[1] < sizes[0]
