"""cast: weights of another floating-point type."""

import pytest
import torch

from diffkiln.errors import IllegalPlan
from diffkiln.models.meta import load_module
from diffkiln.models.weights import weights_of
from diffkiln.passes import manager
from diffkiln.passes.model.cast import Cast
from tests.passes.plans import both, checked, ghost, real, source, types
from tests.pipelines import WARNING_FILTERS

pytestmark = [pytest.mark.filterwarnings(text) for text in WARNING_FILTERS]


def test_ghost_and_module_come_out_alike():
    shadow, module = both("flux", "transformer", {"name": "cast", "component": "transformer", "dtype": "bfloat16"})
    assert types(shadow) == types(module)
    assert {dtype for _, dtype in types(module).values()} == {torch.bfloat16}


def test_values_are_rounded_and_not_changed_otherwise():
    before = real("flux", "transformer").state_dict()
    _, module = both("flux", "transformer", {"name": "cast", "component": "transformer", "dtype": "float16"})
    for name, tensor in module.state_dict().items():
        assert torch.equal(tensor, before[name].to(torch.float16))


#: A component of every kind that has something to keep: T5, UMT5, rotary frequencies, tables of positions, lists.
KEEPERS = [
    ("flux", "text_encoder_2"),
    ("wan", "text_encoder"),
    ("wan", "transformer"),
    ("z_image", "text_encoder"),
    ("flux2", "text_encoder"),
    ("pixart_sigma", "transformer"),
    ("chroma", "transformer"),
]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize(("family", "component"), KEEPERS)
def test_types_are_those_of_a_checkpoint_that_is_loaded_in_this_type(family, component, dtype):
    before, module = (load_module(source(family), component) for _ in range(2))
    Cast(component=component, dtype=dtype).apply(module)
    loaded = load_module(source(family), component, dtype)
    assert types(module) == types(loaded)
    for name, tensor in weights_of(module):
        assert torch.equal(tensor, loaded.state_dict()[name]), name
    saved = module.state_dict().keys()
    for name, buffer in before.named_buffers():
        if name not in saved:
            assert torch.equal(module.get_buffer(name), buffer), name
            assert module.get_buffer(name).dtype == buffer.dtype, name


def test_modules_that_the_library_keeps_in_float32_stay():
    shadow, module = both("wan", "transformer", {"name": "cast", "component": "transformer", "dtype": "bfloat16"})
    assert types(shadow) == types(module)
    kept = set(module._keep_in_fp32_modules)
    found = {name: dtype for name, (_, dtype) in types(module).items()}
    assert torch.float32 in found.values()
    for name, dtype in found.items():
        assert dtype == (torch.float32 if kept & set(name.split(".")) else torch.bfloat16), name


def test_tied_weights_stay_tied():
    for module in both("flux", "text_encoder_2", {"name": "cast", "component": "text_encoder_2", "dtype": "bfloat16"}):
        assert module.shared.weight is module.encoder.embed_tokens.weight
        assert module.shared.weight.dtype == torch.bfloat16


def test_cast_to_what_it_is_already_has_no_effect_and_is_refused():
    plan = ghost("flux")
    with pytest.raises(IllegalPlan, match=r"\$\.passes\[0\]: cast would have no effect\. Remove it"):
        checked(plan, {"name": "cast", "component": "vae", "dtype": "float32"})


def test_back_and_forth_is_two_casts():
    plan = ghost("flux")
    there, back = ({"name": "cast", "component": "vae", "dtype": dtype} for dtype in ("float16", "float32"))
    plan, report = manager.run(plan, checked(plan, there, back))
    assert [ran.changed for ran in report] == [True, True]
    assert {dtype for _, dtype in types(plan.modules["vae"]).values()} == {torch.float32}


def test_refused_after_quantization_and_for_a_component_that_is_not_there():
    plan = ghost("flux")
    int8 = {"name": "quantize", "component": "transformer", "type": "int8_weight_only"}
    cast = {"name": "cast", "component": "transformer", "dtype": "bfloat16"}
    with pytest.raises(IllegalPlan, match=r"cast must come before quantize .*have the type that quantization gave"):
        checked(plan, int8, cast)
    with pytest.raises(IllegalPlan, match=r'\$\.passes\[0\]\.component: .*"vae"'):
        checked(plan, cast | {"component": "vea"})
