"""Exporters by name. A backend's module is imported when it is asked for, and no sooner."""

from __future__ import annotations

from importlib import import_module

from diffkiln.errors import ExportError
from diffkiln.exporters.base import Exporter

_PLACES: dict[str, str] = {}


def register(name: str, place: str) -> None:
    """Add a backend: `place` is "module:Class", and the class takes no arguments.

    Raises:
        ValueError: the name is taken.
    """
    if name in _PLACES:
        raise ValueError(f"the exporter {name!r} is registered twice: {_PLACES[name]} and {place}")
    _PLACES[name] = place


def names() -> tuple[str, ...]:
    return tuple(sorted(_PLACES))


def exporter(name: str) -> Exporter:
    """The exporter of this name.

    Raises:
        ExportError: there is none.
    """
    if name not in _PLACES:
        raise ExportError(f"there is no backend {name!r}. Choose one of {', '.join(names())}")
    module, _, attribute = _PLACES[name].partition(":")
    return getattr(import_module(module), attribute)()


register("aot_inductor", "diffkiln.exporters.aot_inductor:AotInductor")
register("onnx", "diffkiln.exporters.onnx:Onnx")
register("torch_compile", "diffkiln.exporters.torch_compile:TorchCompile")
register("tensorrt", "diffkiln.exporters.tensorrt:Tensorrt")
