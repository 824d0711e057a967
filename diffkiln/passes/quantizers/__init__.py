"""The libraries that quantize, one file each. `quantizer` gives one by its name."""

from __future__ import annotations

from importlib import import_module

from diffkiln.passes.quantizers.base import Layers, Quantizer, Settings

#: backend → "module:Class", imported when it is asked for.
_QUANTIZERS = {
    "torchao": "diffkiln.passes.quantizers.torchao:TorchAO",
    "bitsandbytes": "diffkiln.passes.quantizers.bitsandbytes:BitsAndBytes",
    "quanto": "diffkiln.passes.quantizers.quanto:Quanto",
}


def quantizer(backend: str) -> Quantizer:
    """The quantizer of this backend, which exists."""
    module, _, name = _QUANTIZERS[backend].partition(":")
    return getattr(import_module(module), name)()


__all__ = ["Layers", "Quantizer", "Settings", "quantizer"]
