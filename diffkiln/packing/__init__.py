"""Fills a bundle: configuration, programs, engines, weights, and the manifest that names them all."""

from diffkiln.packing.configuration import pack_configuration
from diffkiln.packing.engines import pack_engines
from diffkiln.packing.licences import pack_licences
from diffkiln.packing.packed import Packed, as_json
from diffkiln.packing.programs import every_program, pack_programs, tokenizers_of
from diffkiln.packing.report import manifest_of, pack_report
from diffkiln.packing.weights import WeightsPacker, as_stored, weights_used

__all__ = [
    "Packed",
    "WeightsPacker",
    "as_json",
    "as_stored",
    "every_program",
    "manifest_of",
    "pack_configuration",
    "pack_engines",
    "pack_licences",
    "pack_programs",
    "pack_report",
    "tokenizers_of",
    "weights_used",
]
