"""Fills a bundle: configuration, programs, engines, weights, and the manifest that names them all."""

from diffkiln.compiler.packing.configuration import pack_configuration
from diffkiln.compiler.packing.engines import EnginesPacker
from diffkiln.compiler.packing.licences import pack_licences
from diffkiln.compiler.packing.programs import every_program, pack_constants, pack_programs
from diffkiln.compiler.packing.report import manifest_of, pack_report
from diffkiln.compiler.packing.uses import Uses, uses_of
from diffkiln.compiler.packing.weights import WeightsPacker, as_stored

__all__ = [
    "EnginesPacker",
    "Uses",
    "WeightsPacker",
    "as_stored",
    "every_program",
    "manifest_of",
    "pack_configuration",
    "pack_constants",
    "pack_licences",
    "pack_programs",
    "pack_report",
    "uses_of",
]
