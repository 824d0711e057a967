"""Engines: what runs a lowered region, one module a backend, imported when a bundle names it and no sooner."""

from diffkiln.runtime.engines.base import Engine, Layout, holds_weights
from diffkiln.runtime.engines.registry import engine, names, register

__all__ = ["Engine", "Layout", "engine", "holds_weights", "names", "register"]
