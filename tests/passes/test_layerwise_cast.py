"""layerwise_cast: the values of diffusers' own enable_layerwise_casting, without its hooks."""

import pytest
import torch

from diffkiln.errors import IllegalPlan
from diffkiln.interpreter.layers import Stored
from tests.passes.calls import call_of, result_of
from tests.passes.plans import both, checked, ghost, real, types

LAYERWISE = {"name": "layerwise_cast", "component": "transformer"}


@pytest.mark.parametrize(("family", "component"), [("flux", "transformer"), ("sdxl", "unet"), ("wan", "transformer")])
@pytest.mark.parametrize("storage", ["float8_e4m3fn", "float8_e5m2"])
def test_the_result_is_that_of_diffusers_hooks(family, component, storage):
    shadow, found = both(family, component, LAYERWISE | {"component": component, "storage": storage})
    assert types(shadow) == types(found)
    wanted = real(family, component)
    wanted.enable_layerwise_casting(storage_dtype=getattr(torch, storage), compute_dtype=torch.float32)
    leaves, structure = call_of(family, component)
    assert torch.equal(result_of(found, leaves, structure), result_of(wanted, leaves, structure))


def test_what_diffusers_skips_stays():
    _, module = both("flux", "transformer", LAYERWISE)
    stored = {name for name, part in module.named_modules() if isinstance(part, Stored)}
    assert stored
    assert not any("norm" in name or name in ("proj_in", "proj_out") for name in stored)


def test_stored_weights_take_a_byte_each():
    _, module = both("flux", "transformer", LAYERWISE)
    for name, part in module.named_modules():
        if isinstance(part, Stored):
            assert module.state_dict()[f"{name}.weight_data"].dtype == torch.float8_e4m3fn


def test_text_encoders_and_embeddings_too():
    shadow, module = both("flux", "text_encoder_2", LAYERWISE | {"component": "text_encoder_2"})
    assert types(shadow) == types(module)
    assert not isinstance(module.shared, Stored), "T5 ties its embedding, which would be stored twice"


def test_an_expression_that_matches_nothing_is_refused():
    plan = ghost("flux")
    with pytest.raises(IllegalPlan, match=r"exclude\[0\]: the expression 'nothing' matches no layer"):
        checked(plan, LAYERWISE | {"exclude": ["nothing"]})


def test_what_is_no_expression_is_refused():
    plan = ghost("flux")
    with pytest.raises(IllegalPlan, match=r"exclude\[0\]: '\(' is not a regular expression"):
        checked(plan, LAYERWISE | {"exclude": ["("]})


def test_after_quantize_has_taken_all_layers_it_says_so():
    plan = ghost("flux")
    with pytest.raises(IllegalPlan, match=r"layerwise_cast finds no layer.*since quantize has taken them all"):
        checked(plan, {"name": "quantize", "component": "transformer", "type": "int8_weight_only"}, LAYERWISE)
