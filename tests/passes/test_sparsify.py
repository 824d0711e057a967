"""sparsify: the two largest of four, stored in half the space, for targets with sparse tensor cores."""

import pytest
import torch

from diffkiln.errors import IllegalPlan
from diffkiln.interpreter.layers import Sparse24
from diffkiln.models.weights import weights_of
from diffkiln.passes.model.sparsify import Sparsify, compressed
from tests.passes.plans import A100, CPU, both, checked, ghost, types

SPARSE = {"name": "sparsify", "component": "transformer"}


def test_ghost_and_module_come_out_alike():
    shadow, module = both("flux", "transformer", SPARSE, target=A100)
    assert types(shadow) == types(module)
    assert any(name.endswith(".weight_where") for name in types(module))


def test_it_keeps_what_torchaos_sparsifier_keeps():
    from torchao.sparsity import apply_fake_sparsity

    layer = torch.nn.Linear(64, 48, bias=False)
    weight = layer.weight.detach().clone()
    parts = {name.removeprefix("weight_"): tensor for name, tensor in compressed(weight).items()}
    found = Sparse24().restore(parts, (48, 64), torch.float32)
    holder = torch.nn.Sequential(layer)
    apply_fake_sparsity(holder)
    assert torch.equal(found, holder[0].weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_stores_half_of_the_values_and_two_bits_for_each(dtype):
    module = torch.nn.Sequential(torch.nn.Linear(256, 512, bias=False)).to(dtype)
    before = module[0].weight.nbytes
    Sparsify(component="x").apply(module)
    after = sum(tensor.nbytes for _, tensor in weights_of(module))
    assert after == before / 2 + 512 * 256 / 8


def test_two_of_each_four_are_left():
    _, module = both("flux", "transformer", SPARSE, target=A100)
    layer = module.transformer_blocks[0].attn.to_q
    fours = layer.weight.reshape(-1, 4)
    assert int((fours != 0).sum(dim=1).max()) == 2


@pytest.mark.parametrize(("target", "has"), [(CPU, "no GPU")])
def test_a_target_without_sparse_tensor_cores_is_refused(target, has):
    plan = ghost("flux")
    with pytest.raises(IllegalPlan, match=rf"needs the sparse tensor cores of SM 8\.0.*has {has}"):
        checked(plan, SPARSE, target=target)


def test_a_pattern_that_matches_nothing_is_refused():
    plan = ghost("flux")
    with pytest.raises(IllegalPlan, match=r"exclude\[0\]: the pattern '\*nothing\*' matches no linear layer"):
        checked(plan, SPARSE | {"exclude": ["*nothing*"]}, target=A100)


def test_quantizing_what_is_sparse_is_refused_by_both_names():
    plan = ghost("flux")
    with pytest.raises(IllegalPlan, match="quantize cannot follow sparsify"):
        checked(plan, SPARSE, {"name": "quantize", "component": "transformer", "type": "int8_weight_only"}, target=A100)
