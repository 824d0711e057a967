"""What every pass shares: facts, plans that are never changed, options that go through JSON."""

from typing import ClassVar

import pytest
import torch
from pydantic import ValidationError

from diffkiln.passes.base import Fact, Pass, State, unknown_component
from diffkiln.passes.model.cast import Cast
from tests.passes.plans import CPU


class Halve(Pass):
    name: ClassVar[str] = "halve"
    summary: ClassVar[str] = "halve the weights"
    requires_not: ClassVar = {"halved": "a quarter is too little"}

    def provides(self):
        return [Fact("halved", self.component)]

    def apply(self, module):
        module.weight.data /= 2
        return ["halved"] if module.weight.any() else []


def plan():
    return State("Pipeline", {"unet": torch.nn.Linear(2, 2), "vae": torch.nn.Linear(2, 2)})


def test_run_gives_a_new_plan_with_the_facts_and_the_notes():
    before = plan()
    outcome = Halve(component="unet").run(before)
    assert {str(fact) for fact in outcome.state.facts} == {"halved(unet)"}
    assert (outcome.changed, outcome.notes) == (True, ("halved",))
    assert before.facts == frozenset()


def test_no_notes_means_that_nothing_changed():
    before = plan()
    torch.nn.init.zeros_(before.modules["unet"].weight)
    assert not Halve(component="unet").run(before).changed


def test_a_fact_makes_a_pass_illegal_for_its_component_alone():
    after = plan().with_facts([Fact("halved", "unet")])
    (problem,) = Halve(component="unet").check(after, CPU, "$.passes[3]")
    assert str(problem) == "$.passes[3]: halve after halved(unet): a quarter is too little"
    assert not Halve(component="vae").check(after, CPU, "$.passes[3]")


def test_unknown_component_gets_the_nearest_name_or_all_of_them():
    (near,) = unknown_component("une", plan(), "$.passes[0]")
    assert near.where == "$.passes[0].component"
    assert near.hint == 'Did you mean "unet"?'
    (far,) = unknown_component("scheduler", plan(), "$.passes[0]")
    assert far.hint == "It has unet, vae."


def test_options_go_through_json():
    cast = Cast(component="vae", dtype="float16")
    assert cast.options() == {"component": "vae", "dtype": "float16"}
    assert Cast.model_validate(cast.options()) == cast


def test_options_are_frozen_and_known():
    with pytest.raises(ValidationError):
        Cast(component="vae", dtype="float16", how="fast")
    with pytest.raises(ValidationError):
        Cast(component="vae", dtype="float16").dtype = "float32"
