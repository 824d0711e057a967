"""Products in float8 with a scale for each row, where torch has none for CPUs: as close as those that it has."""

import pytest
import torch

import diffkiln
from diffkiln.errors import IllegalPlan
from diffkiln.interpreter.layers import scaled
from diffkiln.interpreter.layers.torchao import quantize_linear
from diffkiln.passes.model.quantize import torchao
from tests.conftest import DIGITS


def layer():
    torch.manual_seed(0)
    made = torch.nn.Linear(64, 32, dtype=torch.bfloat16)
    quantize_linear(made, "float8_dynamic")
    return made


def test_a_layer_of_torchaos_gives_what_its_float32_gives():
    made, x = layer(), torch.randn(5, 64, dtype=torch.bfloat16)
    with torch.inference_mode(), scaled.InFloat32():
        given = made(x)
    wanted = torch.nn.functional.linear(x.float(), made.weight.dequantize().float(), made.bias.float())
    assert given.dtype == torch.bfloat16
    assert (given.float() - wanted).norm() < 0.04 * wanted.norm()
    if scaled.rows_are_scaled():
        with torch.inference_mode():
            own = made(x)
        assert (given.float() - own.float()).norm() < 0.01 * wanted.norm()


def test_a_product_by_itself_has_the_scales_the_bias_and_the_type():
    a, b = torch.eye(16).to(torch.float8_e4m3fn), torch.full((16, 16), 2.0).to(torch.float8_e4m3fn)
    rows, columns = torch.arange(1.0, 17.0).unsqueeze(1), torch.full((1, 16), 0.5)
    with scaled.InFloat32():
        given = torch._scaled_mm(a, b.t(), rows, columns, bias=torch.ones(16), out_dtype=torch.float32)
    assert torch.equal(given, rows.expand(16, 16) + 1)


def test_only_where_it_is_needed(monkeypatch):
    monkeypatch.setattr(scaled, "rows_are_scaled", lambda: True)
    with scaled.row_scales() as mode:
        assert mode is None
    monkeypatch.setattr(scaled, "rows_are_scaled", lambda: False)
    with scaled.row_scales() as mode:
        assert isinstance(mode, scaled.InFloat32)


def test_a_cpu_that_cannot_is_refused_before_anything_is_built(monkeypatch):
    monkeypatch.setattr(torchao, "rows_are_scaled", lambda: False)
    spec = {
        "spec_version": 1,
        "source": {"model": "model", "dtype": "float32"},
        "target": {"device": "cpu"},
        "inputs": {"height": 32, "width": 32, "num_inference_steps": 2},
        "passes": [{"name": "quantize", "component": "transformer", "type": "float8_dynamic"}],
    }
    with pytest.raises(IllegalPlan, match=r"one scale for the whole only.*\"granularity\": \"per_tensor\""):
        diffkiln.check(spec, base=DIGITS)
