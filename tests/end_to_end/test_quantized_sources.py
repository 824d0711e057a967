"""Models that were quantized before they came here: their numbers are taken as they are."""

from __future__ import annotations

import json
import shutil

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file

import diffkiln
from diffkiln.errors import IllegalPlan, SourceError
from tests.end_to_end.compared import built, differences, spec_of
from tests.pipelines import WARNING_FILTERS, build_folder

pytestmark = [pytest.mark.filterwarnings(line) for line in WARNING_FILTERS]
CALL = {"max_sequence_length": 16}


def changed(folder, room, save):
    """A copy of a pipeline whose transformer something else saved."""
    model = shutil.copytree(folder, room / "model")
    shutil.rmtree(model / "transformer")
    save(model / "transformer")
    return model


def spec(**more):
    return spec_of({"model": "model"}, call=CALL, **more)


@pytest.mark.parametrize(
    "name", ["Int8WeightOnlyConfig", "Int8DynamicActivationInt8WeightConfig", "Float8WeightOnlyConfig"]
)
def test_torchaos_layers_stay_as_they_are(families, tmp_path, name):
    from torchao import quantization

    folder = build_folder("flux", families)
    options = {} if "Float8" in name else {"version": 2}
    config = diffusers.TorchAoConfig(getattr(quantization, name)(**options))

    def save(output):
        kind = diffusers.FluxTransformer2DModel
        module = kind.from_pretrained(folder / "transformer", quantization_config=config, dtype=torch.float32)
        module.save_pretrained(output)

    model = changed(folder, tmp_path, save)
    bundle = built(spec(), tmp_path, tmp_path / "bundle")
    eager = diffusers.DiffusionPipeline.from_pretrained(model, dtype=torch.float32)
    assert max(differences(bundle, eager, **CALL)) < 1e-4
    assert "transformer is quantized already" in (bundle / "README.md").read_text()


def four_bit(folder, output, nested):
    """The transformer as bitsandbytes saves it; and the same with its weights as they are unpacked."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    module = diffusers.FluxTransformer2DModel.from_pretrained(folder / "transformer")
    state = {}
    for name, layer in module.named_modules():
        if isinstance(layer, torch.nn.Linear) and "transformer_blocks" in name:
            packed, told = quantize_4bit(layer.weight.data, quant_type="nf4", compress_statistics=nested)
            # In one row: bitsandbytes unpacks rows that are shorter than a block to other numbers on a CPU.
            row = quantize_4bit(layer.weight.data.reshape(1, -1), quant_type="nf4", compress_statistics=nested)
            assert torch.equal(row[0], packed)
            layer.weight.data = dequantize_4bit(*row).reshape(layer.weight.shape)
            state[f"{name}.weight"] = packed
            state |= {f"{name}.weight.{key}": value for key, value in told.as_dict(packed=True).items()}
    whole = {key: tensor for key, tensor in module.state_dict().items() if key not in state} | state
    module.save_pretrained(output)
    save_file(
        {key: tensor.contiguous() for key, tensor in whole.items()}, output / "diffusion_pytorch_model.safetensors"
    )
    config = json.loads((output / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    (output / "config.json").write_text(json.dumps(config))
    return module


@pytest.mark.parametrize("nested", [False, True])
def test_bitsandbytes_four_bits_stay_as_they_are(families, tmp_path, nested):
    folder, modules = build_folder("flux", families), []
    changed(folder, tmp_path, lambda output: modules.append(four_bit(folder, output, nested)))
    bundle = built(spec(), tmp_path, tmp_path / "bundle")
    eager = diffusers.DiffusionPipeline.from_pretrained(folder, transformer=modules[0])
    assert max(differences(bundle, eager, **CALL)) < 1e-5
    written = load_file(bundle / "weights" / "transformer" / "rest.safetensors")
    assert written
    with pytest.raises(IllegalPlan, match="an engine would repeat that"):
        diffkiln.check(spec(passes=[{"name": "compile", "component": "transformer"}]), base=tmp_path)


def test_bitsandbytes_int8_keeps_its_weights(families, tmp_path):
    folder, modules = build_folder("flux", families), []

    def save(output):
        module = diffusers.FluxTransformer2DModel.from_pretrained(folder / "transformer")
        module.save_pretrained(output)
        layer = module.transformer_blocks[0].attn.to_q
        state = load_file(output / "diffusion_pytorch_model.safetensors")
        scale = layer.weight.data.abs().amax(dim=1)
        state["transformer_blocks.0.attn.to_q.weight"] = torch.round(layer.weight.data * 127 / scale[:, None]).to(
            torch.int8
        )
        state["transformer_blocks.0.attn.to_q.SCB"] = scale
        save_file(state, output / "diffusion_pytorch_model.safetensors")
        config = json.loads((output / "config.json").read_text())
        config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_8bit": True}
        (output / "config.json").write_text(json.dumps(config))
        layer.weight.data = state["transformer_blocks.0.attn.to_q.weight"].float() * (scale[:, None] / 127)
        modules.append(module)

    changed(folder, tmp_path, save)
    plan = diffkiln.check(spec(), base=tmp_path)
    assert "as they are, and not as LLM.int8() does" in plan.notices[0]
    bundle = built(spec(), tmp_path, tmp_path / "bundle")
    eager = diffusers.DiffusionPipeline.from_pretrained(folder, transformer=modules[0])
    assert max(differences(bundle, eager, **CALL)) < 1e-5


@pytest.mark.parametrize("stated", [{"quant_method": "gptq"}, {"quant_method": "torchao", "quant_type": "int4wo"}])
def test_what_has_no_layers_here_is_refused_in_one_sentence(families, tmp_path, stated):
    model = shutil.copytree(build_folder("flux", families), tmp_path / "model")
    config = json.loads((model / "transformer" / "config.json").read_text())
    (model / "transformer" / "config.json").write_text(json.dumps(config | {"quantization_config": stated}))
    with pytest.raises(SourceError, match=r"quantized already, by .* which has no layers here\. Give the model"):
        diffkiln.check(spec(), base=tmp_path)
