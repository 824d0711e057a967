"""lora convert: trainers' formats, by diffusers' own converters, for the runtime, which has none."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import diffkiln
from diffkiln.cli import main
from diffkiln.compiler.adapters import convert_adapter
from diffkiln.errors import CallError, SourceError
from tests.passes.adapters import for_both
from tests.pipelines import FAMILIES, WARNING_FILTERS, build_folder
from tests.runtime.adapters.conftest import bundle, changed, eager, weights
from tests.runtime.adapters.files import adapter_of, drawn

__all__ = ["bundle", "eager"]

pytestmark = [pytest.mark.filterwarnings(text) for text in WARNING_FILTERS]
WIDTH = 32


def factors(outputs: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return drawn((4, WIDTH), generator, 0.2), drawn((outputs, 4), generator, 0.2)


def test_kohyas_flux_is_split_into_the_layers_of_diffusers(bundle, tmp_path):
    down, up = factors(3 * WIDTH, 1)
    key = "lora_unet_double_blocks_0_img_attn_qkv"
    tensors = {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up, f"{key}.alpha": torch.tensor(2.0)}
    file = tmp_path / "kohya.safetensors"
    save_file(tensors, file)
    with diffkiln.load(bundle) as pipe:
        with pytest.raises(CallError, match="lora convert FILE"):
            pipe.load_lora(file)
        made = convert_adapter(file, bundle, tmp_path / "style.safetensors")
        assert made.layers == 3
        before = weights(pipe)
        pipe.load_lora(made.path)
        name = "transformer.transformer_blocks.0.attn.to_qkv.weight"
        after = weights(pipe)
    assert changed(before, after) == {name}
    torch.testing.assert_close(after[name], before[name] + 0.5 * up @ down, rtol=1e-5, atol=1e-6)


def test_x_labs_flux(bundle, tmp_path):
    down, up = factors(WIDTH, 2)
    key = "double_blocks.1.processor.proj_lora1"
    file = tmp_path / "xlabs.safetensors"
    save_file({f"{key}.down.weight": down, f"{key}.up.weight": up}, file)
    made = convert_adapter(file, bundle, tmp_path / "style.safetensors")
    assert set(load_file(made.path)) == {
        f"transformer.transformer_blocks.1.attn.to_out.0.lora_{factor}.weight" for factor in "AB"
    }


def test_an_adapter_of_kohyas_for_both_gives_what_diffusers_fuses(families, tmp_path):
    pipe = FAMILIES["sd"].build()
    before = {name: copy.deepcopy(getattr(pipe, name).state_dict()) for name in ("unet", "text_encoder")}
    file = for_both(tmp_path / "both.safetensors", pipe.unet, pipe.text_encoder)
    call = {"num_inference_steps": 1} | {k: FAMILIES["sd"].call[k] for k in ("height", "width")}
    spec = {
        "spec_version": 1,
        "source": {"model": str(build_folder("sd", families))},
        "target": {"device": "cpu"},
        "inputs": call,
    }
    output = diffkiln.compile(spec, tmp_path / "bundle").path
    made = convert_adapter(file, output, tmp_path / "style.safetensors")
    pipe.load_lora_weights(str(file.parent), weight_name=file.name)
    pipe.fuse_lora(components=["unet", "text_encoder"])
    pipe.unload_lora_weights()
    for path in (made.path, file):
        with diffkiln.load(output) as loaded:
            loaded.load_lora(path)
            found = weights(loaded)
        for component, table in before.items():
            for name, tensor in getattr(pipe, component).state_dict().items():
                if not torch.equal(tensor, table[name]):
                    torch.testing.assert_close(found.pop(f"{component}.{name}"), tensor, rtol=1e-5, atol=1e-6)


def test_another_architecture_is_refused_and_nothing_is_written(bundle, tmp_path):
    unet = FAMILIES["sd"].build().unet
    file = adapter_of(tmp_path / "sd.safetensors", {"transformer": unet}, ("to_q",))
    with pytest.raises(CallError, match="another architecture"):
        convert_adapter(file, bundle, tmp_path / "s.safetensors")
    assert {path.name for path in tmp_path.iterdir()} == {"sd.safetensors"}


def test_what_is_not_lora_is_named(bundle, tmp_path):
    file = tmp_path / "x.safetensors"
    save_file({"lora_unet_a.hada_w1_a": torch.ones(2)}, file)
    with pytest.raises(SourceError, match="is of LoHa, as lora_unet_a"):
        convert_adapter(file, bundle, tmp_path / "y.safetensors")
    save_file({"nothing.known": torch.ones(2)}, file)
    with pytest.raises((SourceError, CallError), match=r"x\.safetensors|y\.safetensors"):
        convert_adapter(file, bundle, tmp_path / "y.safetensors")
    assert not (tmp_path / "y.safetensors").exists()


def test_a_file_that_is_not_there(bundle, tmp_path):
    with pytest.raises(SourceError, match=r"there is no file .*nothing\.safetensors"):
        convert_adapter(tmp_path / "nothing.safetensors", bundle, tmp_path / "new.safetensors")


def test_the_command_says_what_it_made_and_replaces_nothing_unasked(bundle, eager, tmp_path: Path, capsys):
    file = adapter_of(tmp_path / "a.safetensors", {"transformer": eager.transformer}, ("to_q",))
    arguments = ["lora", "convert", str(file), "--for", str(bundle), "-o", str(tmp_path / "b.safetensors")]
    assert main(arguments) == 0
    assert "b.safetensors: changes 4 layers" in capsys.readouterr().out.replace("\n", "")
    assert main(arguments) == 2
    assert "--force" in capsys.readouterr().err
    assert main([*arguments, "--force"]) == 0
