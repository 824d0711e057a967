"""quantize: torchao int8 weights, chosen by patterns."""

import pytest
import torch

from diffkiln.errors import IllegalPlan
from diffkiln.passes import manager
from tests.passes.plans import both, checked, ghost, placed, real, types

INT8 = {"name": "quantize", "component": "transformer", "type": "int8_weight_only"}


TYPES = {"int8_weight_only": torch.int8, "int8_dynamic": torch.int8, "float8_weight_only": torch.float8_e4m3fn}


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
@pytest.mark.parametrize("kind", TYPES)
def test_ghost_and_module_come_out_alike(kind, dtype):
    first = [{"name": "cast", "component": "transformer", "dtype": dtype}] if dtype else []
    shadow, module = both("flux", "transformer", *first, INT8 | {"type": kind})
    assert types(shadow) == types(module)
    assert any(dtype == TYPES[kind] for _, dtype in types(module).values())


@pytest.mark.parametrize("kind", TYPES)
def test_quantized_layers_take_at_most_27_percent_of_their_float32_bytes(kind):
    """Scales included; the layers are as wide as those of real models are at least."""
    from torch import nn

    from diffkiln.passes.quantize import Quantize
    from diffkiln.record.components import weights_of

    module = nn.Sequential(nn.Linear(256, 512, bias=False), nn.Linear(512, 256, bias=False))
    before = sum(tensor.nbytes for _, tensor in weights_of(module))
    Quantize(component="x", type=kind).apply(module)
    after = sum(tensor.numel() * tensor.itemsize for _, tensor in weights_of(module))
    assert after <= 0.27 * before


@pytest.mark.parametrize(
    ("kind", "limit"), [("int8_weight_only", 0.02), ("int8_dynamic", 0.03), ("float8_weight_only", 0.05)]
)
def test_values_are_close_to_the_originals(kind, limit):
    before = real("flux", "transformer")
    _, module = both("flux", "transformer", INT8 | {"type": kind})
    for name, layer in module.named_modules():
        if isinstance(layer, torch.nn.Linear):
            x = torch.randn(4, layer.in_features, generator=torch.Generator().manual_seed(0))
            want, got = before.get_submodule(name)(x), layer(x)
            assert (want - got).norm() <= limit * want.norm() + 1e-6, name


def test_patterns_choose_layers():
    _, module = both(
        "flux", "transformer", INT8 | {"include": ["transformer_blocks.*"], "exclude": ["*norm*", "*.ff.*"]}
    )
    quantized = {name.removesuffix(".weight.qdata") for name in types(module) if name.endswith(".qdata")}
    assert quantized
    assert all(name.startswith("transformer_blocks.") for name in quantized)
    assert not any("norm" in name or ".ff." in name for name in quantized)


def test_norms_convolutions_and_embeddings_stay():
    _, module = both("flux", "transformer", INT8)
    left = {name for name, (_, dtype) in types(module).items() if name.endswith(".weight") and dtype == torch.float32}
    assert left == {
        f"{name}.weight"
        for name, part in module.named_modules()
        if hasattr(part, "weight") and part.weight is not None and not isinstance(part, torch.nn.Linear)
    }


def test_pattern_that_matches_nothing_is_refused_by_its_place():
    plan = ghost("flux")
    with pytest.raises(IllegalPlan, match=r"\$\.passes\[0\]\.exclude\[1\].*nrom"):
        checked(plan, INT8 | {"exclude": ["*norm*", "*nrom*"]})


@pytest.mark.parametrize("field", ["include", "exclude"])
def test_pattern_that_names_what_holds_layers_is_refused_with_the_mend(field):
    """`*.attn` alone would exclude nothing: patterns are compared with the names of layers, not with their parents'."""
    plan = ghost("flux")
    with pytest.raises(IllegalPlan, match=rf'{field}\[0\]: the pattern .* Did you mean "\*\.attn\.\*"') as caught:
        checked(plan, INT8 | {field: ["*.attn"]})
    assert caught.value.problems[0].where == f"$.passes[0].{field}[0]"
    checked(plan, INT8 | {field: ["*.attn.*"]})


def test_what_is_no_linear_layer_may_be_excluded():
    plan = ghost("sdxl")
    checked(plan, INT8 | {"component": "unet", "exclude": ["*norm*"]})


def test_a_layer_that_shares_its_weight_stays():
    module = torch.nn.ModuleDict({"embed": torch.nn.Embedding(64, 32), "inner": torch.nn.Linear(32, 32)})
    module["head"] = torch.nn.Linear(32, 64, bias=False)
    module["head"].weight = module["embed"].weight
    (item,) = placed(INT8)
    assert not list(item.step.check_module(module, None, None, "$"))
    assert item.step.apply(module)[0].startswith("1 linear layers, 1024 weights")
    assert module["head"].weight is module["embed"].weight
    assert list(item.step.model_copy(update={"include": ("head",)}).check_module(module, None, None, "$"))


def test_nothing_left_to_quantize_is_refused():
    plan = ghost("flux")
    with pytest.raises(IllegalPlan, match="no linear layer"):
        checked(plan, INT8 | {"exclude": ["*"]})


def test_notes_say_how_much_was_quantized():
    plan = ghost("flux")
    _, report = manager.run(plan, checked(plan, INT8))
    layers = sum(isinstance(part, torch.nn.Linear) for part in real("flux", "transformer").modules())
    assert report[0].notes[0].startswith(f"{layers} linear layers, ")
