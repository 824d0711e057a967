"""Tokens shared by several processes (Ulysses): what each operator makes of a value of which every process has a shard
(`rules`), programs over shards (`sharing`), attention over the shards of all (`attending`), and regions that are split
at what is exchanged (`pieces`). They are rewrites of programs and know nothing of models."""

from diffkiln.passes.sequencing.pieces import share_module

__all__ = ["share_module"]
