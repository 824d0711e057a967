"""Every pass has a file of its own, a test of its own, and documented options."""

from pathlib import Path

import pytest

from diffkiln.passes.registry import PASSES, REASONS, option_models

HERE = Path(__file__).parent


@pytest.mark.parametrize("name", PASSES)
def test_pass_has_its_file_and_its_test(name):
    assert PASSES[name].startswith(f"diffkiln.passes.{name}:")
    assert (HERE / f"test_{name}.py").is_file()


def test_options_are_described():
    for name, model in option_models().items():
        for field, info in model.model_fields.items():
            assert info.description, f"{name}.{field}"


def test_reasons_speak_of_passes_in_their_order():
    order = list(PASSES)
    for first, second in REASONS:
        assert order.index(first) < order.index(second)
