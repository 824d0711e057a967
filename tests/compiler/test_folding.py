"""Tables are evaluated as weights come, in whatever pieces, and an error says which weight never came."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from diffkiln.compiler.folding import Folding
from diffkiln.compiler.packing import uses_of
from diffkiln.errors import PassError
from diffkiln.passes.hoisting import hoisted
from diffkiln.record.constants import Constants
from tests.passes.hoisting.replays import recorded
from tests.pipelines import WARNING_FILTERS

pytestmark = [pytest.mark.filterwarnings(text) for text in WARNING_FILTERS]
NAME = "transformer"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return recorded("qwen_image", tmp_path_factory.mktemp("folding"))


def _rewritten(made):
    constants = Constants(made.recording.constants.tensors)
    found = hoisted(made.recording.calls, made.recording.modules[NAME], constants)
    modules = {**made.recording.modules, NAME: found.module}
    return replace(made.recording, calls=found.calls, modules=modules, constants=constants, folds=found.folds)


def _tables(recording):
    keys = [key for fold in recording.folds for each in fold.evaluations for key in each.gives]
    return {key: recording.constants.tensors[key] for key in keys}


def test_blocks_that_come_one_by_one_give_the_same_tables(made):
    whole, parts = _rewritten(made), _rewritten(made)
    Folding(whole, NAME).add(made.weights[NAME])
    folding = Folding(parts, NAME)
    for names in (sorted(made.weights[NAME])[at::3] for at in range(3)):
        folding.add({name: made.weights[NAME][name] for name in names})
    folding.finish()
    found, wanted = _tables(parts), _tables(whole)
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[key], wanted[key]) for key in wanted)
    assert all(table.any() for table in wanted.values())


def test_a_weight_that_never_comes_is_named(made):
    folding = Folding(_rewritten(made), NAME)
    missing = "transformer_blocks.1.img_mod.1.bias"
    folding.add({name: tensor for name, tensor in made.weights[NAME].items() if name != missing})
    with pytest.raises(PassError, match=rf"component transformer: .* weight {missing}, .* without data"):
        folding.finish()


def test_weights_of_tables_leave_and_others_stay(made):
    uses = uses_of(_rewritten(made))[NAME]
    assert "transformer_blocks.0.img_mod.1.weight" in uses.left_out
    assert "txt_in.weight" in uses.before
    assert "transformer_blocks.0.attn.to_q.weight" in uses.read - uses.before
    assert not uses.left_out & uses.read
