"""The backends of `compile`."""

from diffkiln.passes.compiling.backends import BACKENDS, Backend

__all__ = ["BACKENDS", "Backend"]
