"""Compute some steps of the denoising run, and let the others reuse what those kept. One file has one method."""

from __future__ import annotations

from collections.abc import Mapping

from diffkiln.passes.program.cache_schedule.base import CacheSchedule
from diffkiln.passes.program.cache_schedule.dbcache import DBCache
from diffkiln.passes.program.cache_schedule.deepcache import DeepCache
from diffkiln.passes.program.cache_schedule.dynamic import DynamicFirstBlock, FasterCache, PyramidAttention, SeaCache
from diffkiln.passes.program.cache_schedule.first_block import FirstBlock
from diffkiln.passes.program.cache_schedule.fixed import Fixed, Listed
from diffkiln.passes.program.cache_schedule.fora import Fora
from diffkiln.passes.program.cache_schedule.magcache import MagCache
from diffkiln.passes.program.cache_schedule.mask import StepMask
from diffkiln.passes.program.cache_schedule.taylorseer import TaylorSeer

_METHODS: tuple[type[CacheSchedule], ...] = (
    StepMask, Fora, FirstBlock, DBCache, TaylorSeer, MagCache, DeepCache,
    DynamicFirstBlock, SeaCache, PyramidAttention, FasterCache,
)  # fmt: skip
_BY_NAME = {method.called(): method for method in _METHODS}


class AnyCacheSchedule(CacheSchedule):
    __doc__ = CacheSchedule.__doc__

    @classmethod
    def variants(cls) -> Mapping[str, type[CacheSchedule]]:
        return _BY_NAME


PLUGIN = AnyCacheSchedule

__all__ = ["PLUGIN", "CacheSchedule", "Fixed", "Listed"]
