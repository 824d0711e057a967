"""Parts of a program that are computed apart from each other, such as the tiles of a decoder: found by what operations
need of each other (`parts`), and shared among processes (`spreading`). They know nothing of decoders."""

from diffkiln.passes.tiling.parts import Part, parts_of
from diffkiln.passes.tiling.spreading import spread_parts

__all__ = ["Part", "parts_of", "spread_parts"]
