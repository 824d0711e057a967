"""prune: named blocks go, the later ones move up, and the model computes as if they had never been there."""

from typing import ClassVar

import pytest
import torch

from diffkiln.errors import IllegalPlan
from diffkiln.passes import manager
from diffkiln.passes.base import State
from diffkiln.passes.model.prune import Prune
from tests.passes.calls import call_of, result_of
from tests.passes.plans import CPU, both, checked, ghost, real, types

PRUNE = {"name": "prune", "component": "transformer"}


@pytest.mark.parametrize(
    ("family", "component", "home", "index"),
    [
        ("flux", "transformer", "transformer_blocks", 0),
        ("flux", "transformer", "single_transformer_blocks", 1),
        ("wan", "transformer", "blocks", 0),
        ("sdxl", "unet", "down_blocks.1.attentions.0.transformer_blocks", 0),
    ],
)
def test_the_model_computes_without_the_block(family, component, home, index):
    shadow, found = both(family, component, PRUNE | {"component": component, "blocks": [f"{home}.{index}"]})
    wanted = real(family, component)
    del wanted.get_submodule(home)[index]
    assert types(shadow) == types(found) == types(wanted)
    leaves, structure = call_of(family, component)
    assert torch.equal(result_of(found, leaves, structure), result_of(wanted, leaves, structure))


def test_notes_say_how_much_is_gone():
    plan = ghost("flux")
    _, report = manager.run(plan, checked(plan, PRUNE | {"blocks": ["single_transformer_blocks.0"]}))
    module = real("flux", "transformer")
    block = module.single_transformer_blocks[0]
    count = sum(tensor.numel() for tensor in block.parameters())
    total = len(module.single_transformer_blocks) + len(module.transformer_blocks)
    assert report[0].notes == (f"1 of {total} blocks dropped, {count} weights",)


def test_a_pattern_that_matches_no_block_is_refused_by_its_place():
    plan = ghost("flux")
    with pytest.raises(
        IllegalPlan, match=r"blocks\[0\]: the pattern 'transformer_blocks\.99' matches no block"
    ) as caught:
        checked(plan, PRUNE | {"blocks": ["transformer_blocks.99"]})
    assert "transformer_blocks.0 to " in caught.value.problems[0].hint


def test_a_list_is_not_emptied():
    plan = ghost("flux")
    with pytest.raises(IllegalPlan, match="nothing would be left of single_transformer_blocks"):
        checked(plan, PRUNE | {"blocks": ["single_transformer_blocks.*"]})


def test_blocks_that_take_skipped_values_are_no_chain():
    class Block(torch.nn.Linear):
        def forward(self, x, skip=None):
            return super().forward(x if skip is None else x + skip)

    class Model(torch.nn.Module):
        _repeated_blocks: ClassVar = ["Block"]

        def __init__(self):
            super().__init__()
            self.blocks = torch.nn.ModuleList([Block(2, 2), Block(2, 2)])

    plan = State("Pipeline", {"transformer": Model()})
    step = Prune(component="transformer", blocks=("blocks.0",))
    (problem,) = step.check(plan, CPU, "$.passes[0]")
    assert "blocks is not a chain" in problem.reason


def test_a_model_without_blocks_is_refused():
    plan = ghost("flux")
    with pytest.raises(IllegalPlan, match="declares no repeated blocks"):
        checked(plan, PRUNE | {"component": "vae", "blocks": ["*"]})


def test_later_passes_see_the_names_that_are_left():
    plan = ghost("flux")
    last = len(real("flux", "transformer").single_transformer_blocks) - 1
    int8 = {"name": "quantize", "component": "transformer", "type": "int8_weight_only"}
    with pytest.raises(IllegalPlan, match="matches no layer"):
        checked(
            plan,
            PRUNE | {"blocks": ["single_transformer_blocks.0"]},
            int8 | {"include": [f"single_transformer_blocks.{last}.*"]},
        )
