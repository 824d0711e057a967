"""Quantize the linear layers of a component. One file has the types of one library."""

from __future__ import annotations

from collections.abc import Mapping

from diffkiln.passes.model.quantize import bitsandbytes, quanto, torchao
from diffkiln.passes.model.quantize.base import Quantize

_TYPES: tuple[type[Quantize], ...] = (*torchao.TYPES, *bitsandbytes.TYPES, *quanto.TYPES)
_BY_NAME = {kind.called(): kind for kind in _TYPES}


class AnyQuantize(Quantize):
    __doc__ = Quantize.__doc__

    @classmethod
    def variants(cls) -> Mapping[str, type[Quantize]]:
        return _BY_NAME


PLUGIN = AnyQuantize

__all__ = ["PLUGIN", "Quantize"]
