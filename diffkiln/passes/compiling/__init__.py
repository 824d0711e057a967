"""The backends of `compile`."""

from diffkiln.passes.compiling.backends import BACKENDS, Asked, Backend

__all__ = ["BACKENDS", "Asked", "Backend"]
