"""Parts of a program that are computed apart from each other, such as the tiles of a decoder: found by what operations
need of each other (`parts`), or as the calls of one component program (`calls`), and shared among processes
(`spreading`). They know nothing of decoders."""

from diffkiln.passes.tiling.calls import calls_of, spread_preambles
from diffkiln.passes.tiling.parts import Part, parts_of
from diffkiln.passes.tiling.spreading import spread_parts

__all__ = ["Part", "calls_of", "parts_of", "spread_parts", "spread_preambles"]
