"""Every pass has a file of its own, a test of its own, and documented options."""

import ast
import inspect
from pathlib import Path

import pytest

from diffkiln.passes import registry
from diffkiln.passes.registry import PASSES, REASONS, option_models, read_passes
from diffkiln.spec import PassEntry

HERE = Path(__file__).parent


@pytest.mark.parametrize("name", PASSES)
def test_pass_has_its_file_and_its_test(name):
    assert PASSES[name].startswith(f"diffkiln.passes.{name}:")
    assert (HERE / f"test_{name}.py").is_file()


def test_nothing_is_registered_twice():
    """Python takes the last of two equal keys without a word, so the source is read; and each class stands once."""
    for node in ast.walk(ast.parse(inspect.getsource(registry))):
        if isinstance(node, ast.Dict):
            keys = [ast.dump(key) for key in node.keys if key is not None]
            assert len(keys) == len(set(keys)), f"line {node.lineno} of registry.py has a key twice"
    assert len(set(PASSES.values())) == len(PASSES)


def test_every_file_of_a_pass_is_registered():
    files = {path.stem for path in Path(registry.__file__).parent.glob("*.py")}
    assert files == {*PASSES, "__init__", "base", "manager", "registry"}


def test_options_are_described():
    for name, model in option_models().items():
        for field, info in model.model_fields.items():
            assert info.description, f"{name}.{field}"


def test_reasons_speak_of_passes_in_their_order():
    order = list(PASSES)
    for first, second in REASONS:
        assert order.index(first) < order.index(second)


@pytest.mark.parametrize("name", PASSES)
def test_examples_are_entries_of_a_spec(name):
    examples = option_models()[name].examples
    assert examples
    for example in examples:
        assert example["name"] == name
        assert read_passes([PassEntry.model_validate(example)])
