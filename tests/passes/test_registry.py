"""Every pass has a file, a test, documented options, and a place in the order with its reasons."""

from pathlib import Path
from typing import ClassVar

import pytest

from diffkiln import passes
from diffkiln.errors import SpecError
from diffkiln.passes import registry
from diffkiln.passes.base import ModelPass, ProgramPass
from diffkiln.passes.order import ORDER
from diffkiln.passes.registry import option_models, pass_class, read_passes, reason
from diffkiln.plugins import plugins
from diffkiln.spec import PassEntry

HERE = Path(__file__).parent


def test_the_order_names_every_built_in_pass_once():
    built_in = [name for name, plugin in plugins("passes").items() if not plugin.distribution]
    assert sorted(ORDER) == sorted(built_in)


@pytest.mark.parametrize("name", ORDER)
def test_pass_has_its_file_its_kind_and_its_test(name):
    cls, folder = pass_class(name), Path(passes.__file__).parent
    kind = next(kind for kind in ("model", "program") if list((folder / kind).glob(f"{name}*")))
    assert cls.__module__ == f"diffkiln.passes.{kind}.{name}"
    assert issubclass(cls, ModelPass if kind == "model" else ProgramPass)
    assert cls.name == name
    assert (HERE / f"test_{name}.py").is_file()


def test_options_are_described():
    models = [(name, model) for name, cls in option_models().items() for model in (cls, *cls.variants().values())]
    for name, model in models:
        for field, info in model.model_fields.items():
            assert info.description, f"{name}.{field}"


def test_passes_stand_where_they_say():
    for name, cls in option_models().items():
        for other in set(cls.before) - {"*"}:
            assert ORDER.index(name) < ORDER.index(other)
        for other in set(cls.after) - {"*"}:
            assert ORDER.index(name) > ORDER.index(other)
        assert "*" not in cls.after or name == ORDER[-1]
    first = [name for name, cls in option_models().items() if "*" in cls.before]
    assert first == list(ORDER[: len(first)])


def test_a_reason_that_names_the_pass_is_given_before_one_for_all():
    models = option_models()
    assert "precision" in reason(models["fuse_lora"], models["cast"])
    assert "original weights" in reason(models["fuse_lora"], models["vae"])
    assert "engines are built" in reason(models["vae"], models["compile"])
    assert reason(models["prune"], models["vae"]) == ""


class Between(ProgramPass):
    name: ClassVar[str] = "between"
    after: ClassVar = {"guidance": "a reason"}
    before: ClassVar = {"cache_schedule": "a reason"}


class Nowhere(ProgramPass):
    name: ClassVar[str] = "nowhere"
    after: ClassVar = {"cache_schedule": "a reason"}
    before: ClassVar = {"guidance": "a reason"}


def test_a_pass_of_another_package_stands_where_it_says():
    assert registry._index(Between, list(ORDER)) == ORDER.index("cache_schedule")
    with pytest.raises(SpecError, match="the pass nowhere wants to stand after cache_schedule and before guidance"):
        registry._index(Nowhere, list(ORDER))


@pytest.mark.parametrize("name", ORDER)
def test_examples_are_entries_of_a_spec(name):
    examples = option_models()[name].examples
    assert examples
    for example in examples:
        assert example["name"] == name
        assert read_passes([PassEntry.model_validate(example)])
