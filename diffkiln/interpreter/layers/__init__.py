"""Layers and blocks in another form than the library builds them, in plain tensors and plain operations.

Passes put them in, the recorder writes down what they do, and so a bundle needs none of the libraries that quantized
it. `as_diffusers` builds the same modules again. Nothing here knows of specs, programs or bundles.
"""

from diffkiln.interpreter.layers.blocks import drop_blocks, droppable_blocks, matching, repeated_blocks
from diffkiln.interpreter.layers.decoding import decode_in_parts, parts_problem, tile_side, tile_unit
from diffkiln.interpreter.layers.fused import FUSED, first_row
from diffkiln.interpreter.layers.layout import is_channels_last, to_channels_last
from diffkiln.interpreter.layers.merging import MOST, merge_tokens, self_attentions
from diffkiln.interpreter.layers.slots import Slotted, can_have_slots, parts_of, put_slots, put_slots_as_stored
from diffkiln.interpreter.layers.storage import (
    STORAGE_FORMATS,
    Cast,
    FourBit,
    Int4,
    Int8,
    LowRank,
    Sparse24,
    StorageFormat,
)
from diffkiln.interpreter.layers.stored import Stored, add_factors, described, store, store_as_described

__all__ = [
    "FUSED",
    "MOST",
    "STORAGE_FORMATS",
    "Cast",
    "FourBit",
    "Int4",
    "Int8",
    "LowRank",
    "Slotted",
    "Sparse24",
    "StorageFormat",
    "Stored",
    "add_factors",
    "can_have_slots",
    "decode_in_parts",
    "described",
    "drop_blocks",
    "droppable_blocks",
    "first_row",
    "is_channels_last",
    "matching",
    "merge_tokens",
    "parts_of",
    "parts_problem",
    "put_slots",
    "put_slots_as_stored",
    "repeated_blocks",
    "self_attentions",
    "store",
    "store_as_described",
    "tile_side",
    "tile_unit",
    "to_channels_last",
]
