"""Engine classes by the name of their backend, as the manifest has it."""

from __future__ import annotations

from importlib import import_module

from diffkiln.errors import Incompatible
from diffkiln.runtime.engines.base import EngineClass

_PLACES: dict[str, str] = {}


def register(name: str, place: str) -> None:
    """Add a backend: `place` is "module:Class".

    Raises:
        ValueError: the name is taken.
    """
    if name in _PLACES:
        raise ValueError(f"the engine {name!r} is registered twice: {_PLACES[name]} and {place}")
    _PLACES[name] = place


def names() -> tuple[str, ...]:
    return tuple(sorted(_PLACES))


def engine(name: str) -> EngineClass:
    """The class that runs this backend's engines.

    Raises:
        Incompatible: this diffkiln has none.
    """
    if name not in _PLACES:
        raise Incompatible(
            f"engine backend: found {name!r}, this diffkiln runs {', '.join(names())}. Install a later diffkiln"
        )
    module, _, attribute = _PLACES[name].partition(":")
    return getattr(import_module(module), attribute)


register("aot_inductor", "diffkiln.runtime.engines.aot_inductor:AotInductorEngine")
register("onnx", "diffkiln.runtime.engines.onnx:OnnxEngine")
register("torch_compile", "diffkiln.runtime.engines.torch_compile:TorchCompileEngine")
register("tensorrt", "diffkiln.runtime.engines.tensorrt:TensorrtEngine")
