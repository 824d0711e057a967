import pytest

from diffkiln.errors import ExportError
from diffkiln.exporters import registry
from diffkiln.exporters.aot_inductor import AotInductor


def test_gives_the_exporter_of_a_name() -> None:
    assert isinstance(registry.exporter("aot_inductor"), AotInductor)
    assert "aot_inductor" in registry.names()


def test_says_which_backends_there_are() -> None:
    with pytest.raises(ExportError, match="aot_inductor"):
        registry.exporter("aot-inductor")


def test_refuses_a_name_that_is_taken() -> None:
    with pytest.raises(ValueError, match="twice"):
        registry.register("aot_inductor", "elsewhere:Other")
