"""The command line: what it prints, and one clear error with the right exit code for whatever is wrong."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from itertools import takewhile
from pathlib import Path

import pytest

from diffkiln.cli import main
from diffkiln.passes.order import ORDER
from tests.bundle.test_writers_at_once import heeds_interrupts
from tests.conftest import DIGITS
from tests.pipelines import WARNING_FILTERS

pytestmark = [pytest.mark.filterwarnings(text) for text in WARNING_FILTERS]


@pytest.fixture
def spec(tmp_path):
    """Writes a spec: the digits example with parts replaced; gives its path."""

    def write(**changed) -> Path:
        data = json.loads((DIGITS / "spec.json").read_text()) | changed
        if data["source"] == {"model": "model", "dtype": "float32"}:
            data["source"]["model"] = str(DIGITS / "model")
        path = tmp_path / "spec.json"
        path.write_text(json.dumps(data))
        return path

    return write


@pytest.fixture
def refused(tmp_path, capsys):
    """Runs `compile` and checks that it fails with this code, in one message, leaving nothing behind."""

    def run(path: Path, code: int, *words: str) -> str:
        before = set(tmp_path.iterdir())
        assert main(["compile", str(path), "-o", str(tmp_path / "bundle")]) == code
        error = capsys.readouterr().err
        assert "Traceback" not in error
        for word in words:
            assert word in error
        assert set(tmp_path.iterdir()) == before
        return error

    return run


def test_missing_spec(refused, tmp_path):
    refused(tmp_path / "none.json", 2, "none.json")


def test_spec_that_is_not_json(refused, tmp_path):
    path = tmp_path / "spec.json"
    path.write_text('{"spec_version": 1,')
    refused(path, 2, "spec.json")


def test_unknown_field_and_unknown_pass_are_reported_with_their_path_and_the_mend(refused, spec):
    refused(spec(passes=[{"name": "fuse_qvk", "component": "transformer"}]), 2, "$.passes[0].name", "fuse_qkv")
    refused(spec(runtimes={}), 2, "$.runtimes", "runtime")


def test_wrong_option_of_a_pass(refused, spec):
    passes = [{"name": "quantize", "component": "transformer", "type": "int9_weight_only"}]
    refused(spec(passes=passes), 2, "$.passes[0].type", "int8_weight_only")


def test_quantize_before_fuse_is_illegal(refused, spec):
    passes = [
        {"name": "quantize", "component": "transformer", "type": "int8_weight_only"},
        {"name": "fuse_qkv", "component": "transformer"},
    ]
    refused(spec(passes=passes), 3, "$.passes[1]", "fuse_qkv must come before quantize", "Move it before $.passes[0]")


def test_unknown_component_is_illegal_and_the_nearest_is_named(refused, spec):
    passes = [{"name": "fuse_qkv", "component": "transfomer"}]
    refused(spec(passes=passes), 3, "$.passes[0].component", "transformer")


def test_pass_that_diffusers_would_ignore_is_illegal(refused, spec):
    refused(spec(passes=[{"name": "fuse_qkv", "component": "text_encoder"}]), 3, "$.passes[0]", "CLIPTextModel")


def test_keyword_that_the_call_does_not_have(refused, spec):
    inputs = {"height": 32, "width": 32, "num_inference_steps": 8, "call": {"max_sequence_lenght": 16}}
    refused(spec(inputs=inputs), 2, "$.inputs.call.max_sequence_lenght", "max_sequence_length")


def test_empty_and_foreign_folders_as_source(refused, spec, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    refused(spec(source={"model": str(empty)}), 2, "empty")
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "notes.txt").write_text("no model")
    refused(spec(source={"model": str(foreign)}), 2, "model_index.json")
    refused(spec(source={"model": str(tmp_path / "nowhere")}), 2, "nowhere")


def test_damaged_weights_fail_the_build_and_name_the_tensor(refused, spec, tmp_path):
    import safetensors.torch

    model = shutil.copytree(DIGITS / "model", tmp_path / "model")
    (file,) = (model / "vae").glob("*.safetensors")
    tensors = safetensors.torch.load_file(file)
    name = "decoder.conv_in.weight"
    tensors[name][0, 0, 0, 0] = float("nan")
    safetensors.torch.save_file(tensors, file)
    refused(spec(source={"model": str(model)}, passes=[]), 4, "vae", name)


def test_output_that_exists_is_kept_without_force(spec, tmp_path, capsys):
    output = tmp_path / "bundle"
    output.mkdir()
    (output / "precious.txt").write_text("mine")
    assert main(["compile", str(spec()), "-o", str(output)]) == 2
    assert "--force" in capsys.readouterr().err
    assert main(["compile", str(spec()), "-o", str(output), "--force"]) == 2
    assert "not a diffkiln bundle" in capsys.readouterr().err
    assert (output / "precious.txt").read_text() == "mine"


def test_usage_errors_have_code_two(capsys):
    assert main(["compile"]) == 2
    assert main(["melt"]) == 2
    assert "Traceback" not in capsys.readouterr().err


def test_interrupted_compile_leaves_nothing_and_says_so(spec, tmp_path):
    command = [sys.executable, "-m", "diffkiln", "compile", str(spec(passes=[])), "-o", str(tmp_path / "bundle")]
    pipe = subprocess.PIPE
    process = subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, preexec_fn=heeds_interrupts)
    assert process.stderr is not None
    told = list(takewhile(lambda line: line != "record\n", process.stderr))
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130
    assert told == ["check\n"]  # and nothing of what the libraries have to say
    assert "interrupted" in error
    assert "Traceback" not in error
    assert [path.name for path in tmp_path.iterdir()] == ["spec.json"]


def test_check_reports_bytes_and_effects_as_json(spec, capsys):
    assert main(["check", str(spec()), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["ok"]
    assert told["facts"] == ["compiled(transformer)", "qkv_fused(transformer)"]
    assert told["components"]["transformer"]["class"] == "FluxTransformer2DModel"


def test_check_reports_problems_as_json(spec, capsys):
    passes = [{"name": "fuse_qkv", "component": "vea"}, {"name": "compile", "component": "tokenizer"}]
    assert main(["check", str(spec(passes=passes)), "--json"]) == 3
    told = json.loads(capsys.readouterr().out)
    assert [problem["where"] for problem in told["problems"]] == ["$.passes[0].component", "$.passes[1].component"]


def test_inspect_shows_the_bundle_and_its_programs(digits_bundle, capsys):
    assert main(["inspect", str(digits_bundle)]) == 0
    assert "transformer/FluxTransformerBlock" in capsys.readouterr().out
    assert main(["inspect", str(digits_bundle), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["pipeline"]["class_name"] == "FluxPipeline"
    assert main(["inspect", str(digits_bundle), "--program", "transformer"]) == 0
    assert "region" in capsys.readouterr().out
    assert main(["inspect", str(digits_bundle), "--program", "32x32-8-steps"]) == 0
    assert "noise(" in capsys.readouterr().out
    assert main(["inspect", str(digits_bundle), "--program", "nothing"]) == 2


def test_verify_finds_a_flipped_bit(digits_bundle, tmp_path, capsys):
    assert main(["verify", str(digits_bundle)]) == 0
    copy = shutil.copytree(digits_bundle, tmp_path / "copy")
    file = copy / "weights" / "transformer" / "rest.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    assert main(["verify", str(copy)]) == 6
    assert "weights/transformer/rest.safetensors" in capsys.readouterr().err


def test_run_writes_the_image(digits_bundle, tmp_path, capsys):
    from PIL import Image

    output = tmp_path / "seven.png"
    assert main(["run", str(digits_bundle), "--prompt", "a handwritten seven", "--seed", "7", "-o", str(output)]) == 0
    with Image.open(output) as image:
        assert image.size == (32, 32)
    assert capsys.readouterr().out.strip() == str(output)


def test_run_as_diffusers_takes_the_sizes_of_the_first_variant(digits_bundle, tmp_path):
    from PIL import Image

    images = []
    for name in ("lean.png", "diffusers.png"):
        command = [
            "run",
            str(digits_bundle),
            "--prompt",
            "a handwritten seven",
            "--seed",
            "7",
            "-o",
            str(tmp_path / name),
        ]
        assert main(command + ["--as-diffusers"] * (name == "diffusers.png")) == 0
        with Image.open(tmp_path / name) as image:
            images.append(image.tobytes())
    assert max(abs(a - b) for a, b in zip(*images, strict=True)) <= 2


def test_run_with_another_size_lists_the_variants(digits_bundle, tmp_path, capsys):
    output = tmp_path / "seven.png"
    assert main(["run", str(digits_bundle), "--prompt", "seven", "--height", "64", "-o", str(output)]) == 2
    error = capsys.readouterr().err
    assert "height=64" in error
    assert "32x32-8-steps" in error
    assert not output.exists()


def test_run_of_a_foreign_bundle_needs_permission_for_native_code(digits_bundle, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "another user"))
    command = ["run", str(digits_bundle), "--prompt", "seven", "-o", str(tmp_path / "seven.png")]
    assert main(command) == 6
    assert "--allow-native" in capsys.readouterr().err
    assert main([*command, "--allow-native"]) == 0


def test_passes_targets_and_schema_for_programs(capsys):
    assert main(["passes", "--json"]) == 0
    assert {"cast", "fuse_qkv", "quantize", "compile"} <= set(json.loads(capsys.readouterr().out))
    assert main(["targets", "--json"]) == 0
    names = {row["name"] for row in json.loads(capsys.readouterr().out)}
    assert {"nvidia-h200", "nvidia-rtx-4090", "cpu-x86-64-v3"} <= names
    assert main(["schema"]) == 0
    assert json.loads(capsys.readouterr().out)["$schema"].startswith("https://json-schema.org/")


def test_passes_are_listed_with_their_options_and_defaults(capsys):
    assert main(["passes"]) == 0
    told = capsys.readouterr().out
    assert {f"{name}:" for name in ORDER} <= set(told.split())
    assert "default {}" in told  # of the scheduler's configuration, which a factory makes


def _seconds(*command: str) -> float:
    """Best of five, so that a busy machine does not count."""
    best = float("inf")
    for _ in range(5):
        started = time.perf_counter()
        subprocess.run([sys.executable, *command], check=True, capture_output=True)
        best = min(best, time.perf_counter() - started)
    return best


def test_import_and_help_are_quick_and_leave_torch_alone():
    bare = _seconds("-c", "pass")
    assert _seconds("-c", "import diffkiln") - bare <= 0.15
    assert _seconds("-m", "diffkiln", "--help") <= 0.5
    code = "import sys, diffkiln, diffkiln.cli; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ)
