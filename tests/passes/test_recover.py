"""recover: what factors regain on the digits pipeline, a training that is killed and goes on, and wrong specs."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import diffkiln
from diffkiln.compiler import recover as stage
from diffkiln.compiler.stages import Stages
from diffkiln.compiler.training import RECOVERED
from diffkiln.errors import BuildError, IllegalPlan, SourceError, SpecError
from diffkiln.interpreter.layers import add_factors
from diffkiln.passes.model.recover import stored_layers
from tests.conftest import DIGITS
from tests.passes.plans import both, checked, ghost, types
from tests.pipelines import WARNING_FILTERS

pytestmark = [pytest.mark.filterwarnings(text) for text in WARNING_FILTERS]
INT4 = {"name": "quantize", "component": "transformer", "type": "int4_weight_only", "group_size": 32}
NF4 = {"name": "quantize", "component": "transformer", "backend": "bitsandbytes", "type": "nf4"}
RECOVER = {"name": "recover", "component": "transformer", "prompts": "prompts.txt", "rank": 4}
SHORT = {"pictures": 6, "batch": 3, "updates": 12}
PROMPTS = "a handwritten seven\n\nthe digit 4\n"


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("DIFFKILN_CACHE_DIR", str(tmp_path / "cache"))
    (tmp_path / "prompts.txt").write_text(PROMPTS)
    return tmp_path


def spec(*passes: dict[str, Any], **more: Any) -> dict[str, Any]:
    made = json.loads((DIGITS / "spec.json").read_text())
    made["source"]["model"] = str(DIGITS / "model")
    return {**made, "passes": list(passes), "runtime": {}, **more}


def trained(folder: Path, **options: Any) -> tuple[dict[str, Any], str]:
    """The factors that the stage finds, and its note."""
    plan = diffkiln.check(spec(INT4, RECOVER | SHORT | options), base=folder)
    plan = stage.recover(plan, Stages())
    step: Any = plan.listed[-1].step
    return step._factors, plan.report[-1].notes[-1]


def same(one: dict[str, Any], two: dict[str, Any]) -> bool:
    pairs = [(one[name][part], two[name][part]) for name in one for part in (0, 1)]
    return one.keys() == two.keys() and all(torch.equal(a, b) for a, b in pairs)


def test_ghost_and_module_come_out_alike(folder):
    entry = RECOVER | {"prompts": str(folder / "prompts.txt"), "rank": 2}
    shadow, module = both("flux", "transformer", INT4 | {"group_size": 16}, entry)
    assert types(shadow) == types(module)
    assert any(name.endswith(".weight_down") for name in types(module))


@pytest.mark.parametrize("quantize", [INT4 | {"group_size": 16}, NF4], ids=["int4", "nf4"])
def test_factors_of_zeros_change_nothing_and_others_add_their_product(quantize):
    _, module = both("flux", "transformer", quantize)
    layer = next(iter(stored_layers(module).values()))
    before = layer.weight.clone()
    add_factors(layer, 2)
    assert torch.equal(layer.weight, before)
    down, up = torch.ones(2, before.shape[1]), torch.full((before.shape[0], 2), 0.25)
    layer._buffers |= {"weight_down": down.half(), "weight_up": up.half()}
    assert torch.equal(layer.weight, before + 0.5)
    assert layer not in stored_layers(module).values()


def test_the_bundle_holds_trained_factors_and_draws_nearer_to_the_original(folder):
    more = {"pictures": 24, "batch": 8, "updates": 60}
    plain = diffkiln.compile(spec(INT4), folder / "plain", base=folder)
    built = diffkiln.compile(spec(INT4, RECOVER | more), folder / "bundle", base=folder)
    original = diffkiln.compile(spec(), folder / "original", base=folder)
    wanted, lost, left = (_drawn(each.path) for each in (original, plain, built))
    assert (left - wanted).square().mean() < (lost - wanted).square().mean() / 2
    manifest = json.loads((built.path / "manifest.json").read_text())
    assert "low_rank" in manifest["features_required"]
    options = manifest["passes"][1]["options"]
    assert (options["prompts"][:7], options["count"], options["rank"]) == ("sha256:", 2, 4)
    (told,) = [row["notes"] for row in json.loads((built.path / "build.json").read_text())["passes"][1:]]
    assert "numbers in factors of rank 4" in told[0]
    assert "off before the training" in told[1]
    assert (_drawn(built.path, as_diffusers=True) - left).abs().max() < 1e-4


def _drawn(bundle: Path, as_diffusers: bool = False) -> torch.Tensor:
    call = {"height": 32, "width": 32, "num_inference_steps": 8, "guidance_scale": 1.0, "max_sequence_length": 16}
    pipe = diffkiln.load(bundle, as_diffusers=as_diffusers)
    generator = torch.Generator().manual_seed(90)
    return torch.as_tensor(pipe("a handwritten 4", generator=generator, output_type="pt", **call).images).float()


def test_the_same_seed_trains_the_same_and_what_is_trained_is_kept(folder, monkeypatch):
    first, note = trained(folder)
    with monkeypatch.context() as patch:
        patch.setattr(stage, "_calls", lambda *_: pytest.fail("it is drawn again"))
        again, told = trained(folder)
    assert same(first, again)
    assert note == told
    monkeypatch.setenv("DIFFKILN_CACHE_DIR", str(folder / "other"))
    assert same(first, trained(folder)[0])
    assert not same(first, trained(folder, seed=1)[0])


KILLED = """
import os, signal, sys
import diffkiln
from diffkiln.compiler import recover as stage
from tests.passes.test_recover import trained
from pathlib import Path

replace, left = os.replace, [2]
def killing(*names):
    replace(*names)
    left[0] -= 1
    if left[0] == 0:
        os.kill(os.getpid(), signal.SIGKILL)
os.replace, stage._EVERY = killing, 4
trained(Path(sys.argv[1]))
"""


@pytest.mark.more
def test_a_training_that_was_killed_goes_on_to_the_same_factors(folder, monkeypatch):
    whole, _ = trained(folder)
    monkeypatch.setenv("DIFFKILN_CACHE_DIR", str(folder / "killed"))
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, str(folder)], cwd=Path(__file__).parents[2], env=os.environ, capture_output=True
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    (file,) = (folder / "killed" / RECOVERED).iterdir()
    begun = []
    train = stage._train

    def seen(student: Any, calls: Any, training: Any, *rest: Any) -> Any:
        begun.append(training.done)
        return train(student, calls, training, *rest)

    monkeypatch.setattr(stage, "_train", seen)
    assert same(trained(folder)[0], whole)
    assert begun == [8]
    assert [path.name for path in file.parent.iterdir()] == [file.name]


@pytest.mark.parametrize("damage", [lambda data: data[:-8], lambda data: data[:-1] + bytes([data[-1] ^ 1])])
def test_a_damaged_state_counts_as_absent(damage, folder, caplog):
    whole, _ = trained(folder)
    (file,) = (folder / "cache" / RECOVERED).iterdir()
    file.write_bytes(damage(file.read_bytes()))
    assert same(trained(folder)[0], whole)
    assert "is damaged, so it begins anew" in caplog.text


def test_numbers_that_are_not_finite_are_told(folder, monkeypatch):
    monkeypatch.setattr(stage, "_rate", lambda *_: 1e30)
    with pytest.raises(BuildError, match=r"not finite after .* updates\. Give a smaller learning_rate"):
        trained(folder)


ILLEGAL: dict[str, tuple[dict[str, Any], str, str]] = {
    "nothing is quantized": (spec(RECOVER), "$.passes[0]", "nothing to recover"),
    "no room for factors": (
        spec({"name": "quantize", "component": "transformer", "type": "int8_weight_only"}, RECOVER),
        "$.passes[1]",
        "nothing to recover",
    ),
    "another component is quantized": (spec(INT4 | {"component": "text_encoder"}, RECOVER), "$.passes[1]", "nothing"),
    "not the denoiser": (
        spec(INT4 | {"component": "text_encoder"}, RECOVER | {"component": "text_encoder"}),
        "$.passes[1]",
        "not a part of the denoising run",
    ),
    "a rank above a layer's size": (spec(INT4, RECOVER | {"rank": 97}), "$.passes[1].rank", "is above the size of"),
    "a pattern of nothing": (
        spec(INT4, RECOVER | {"exclude": ["*nothing*"]}),
        "$.passes[1].exclude[0]",
        "matches no quantized layer",
    ),
    "nothing is left": (spec(INT4, RECOVER | {"exclude": ["*"]}), "$.passes[1]", "is left to recover"),
    "before quantize": (spec(RECOVER, INT4), "$.passes[1]", "quantize must come before recover"),
}


@pytest.mark.parametrize("name", ILLEGAL)
def test_what_cannot_be_recovered_is_refused_by_path(name, folder):
    made, where, reason = ILLEGAL[name]
    with pytest.raises(IllegalPlan) as caught:
        diffkiln.check(made, base=folder)
    problems = {problem.where: problem for problem in caught.value.problems}
    assert reason in problems[where].reason
    assert problems[where].hint


def test_a_rank_above_a_size_names_the_layer_and_the_most(folder):
    with pytest.raises(IllegalPlan, match=r"Give at most \d+, or leave such layers out: \"exclude\": \[\"") as caught:
        diffkiln.check(spec(INT4, RECOVER | {"rank": 97}), base=folder)
    hint = caught.value.problems[0].hint
    most, layer = int(hint.split()[3].rstrip(",")), hint.split('"')[3]
    left_out = RECOVER | {"rank": most + 1, "exclude": [layer]}
    with pytest.raises(IllegalPlan, match="is above the size of") as again:
        diffkiln.check(spec(INT4, left_out | {"rank": 97}), base=folder)
    assert layer not in again.value.problems[0].hint


def test_images_and_tensors_of_the_call_are_refused(folder):
    pictured = json.loads((DIGITS / "spec-image-to-image.json").read_text())
    pictured["source"]["model"] = str(DIGITS / "model")
    with pytest.raises(IllegalPlan, match="draws from prompts alone, and the call takes images"):
        diffkiln.check(pictured | {"passes": [INT4, RECOVER]}, base=folder)


@pytest.mark.parametrize(
    ("options", "where"),
    [
        ({"rank": 0}, "rank"),
        ({"rank": -1}, "rank"),
        ({"updates": 0}, "updates"),
        ({"pictures": 0}, "pictures"),
        ({"batch": 0}, "batch"),
        ({"learning_rate": 0.0}, "learning_rate"),
        ({"prompts": ""}, "prompts"),
        ({"prompts": None}, "prompts"),
    ],
)
def test_wrong_options_are_refused_by_path(options, where, folder):
    with pytest.raises(SpecError, match=rf"\$\.passes\[1\]\.{where}"):
        diffkiln.check(spec(INT4, RECOVER | options), base=folder)


@pytest.mark.parametrize(
    ("text", "told"),
    [(None, r"there is no file of prompts .*prompts\.txt"), ("\n \n", r"the file .*prompts\.txt holds no prompt")],
)
def test_a_prompts_file_that_is_none_is_told(text, told, folder):
    file = folder / "prompts.txt"
    file.unlink()
    if text is not None:
        file.write_text(text)
    with pytest.raises(SourceError, match=told):
        diffkiln.check(spec(INT4, RECOVER), base=folder)


def test_a_ghost_of_another_family_takes_it(folder):
    entry = {"name": "recover", "component": "unet", "prompts": str(folder / "prompts.txt"), "rank": 2}
    assert checked(ghost("sdxl"), NF4 | {"component": "unet"}, entry)
