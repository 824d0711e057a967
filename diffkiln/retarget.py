"""Targets of a bundle that is there: engines for another, for one fewer, or built anew.

A bundle holds all that engines are built from: the regions' programs, their constants, and in the rows of the engines
how they were built. So neither the source nor diffusers is needed, and nothing else changes: weights stay the same
files. What comes out is another bundle, with an id of its own, which takes the old one's place in one step.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import diffkiln
from diffkiln.built import Built
from diffkiln.bundle import (
    Bundle,
    BundleWriter,
    EngineRow,
    FileRow,
    Manifest,
    engine_targets,
    has_receipt,
    left_out,
    open_bundle,
    write_receipt,
)
from diffkiln.bundle.card import MAX_BUILD_BYTES, card, read_build
from diffkiln.errors import IllegalPlan, Problem, SpecError
from diffkiln.exporters.cache import EngineCache
from diffkiln.exporters.registry import exporter
from diffkiln.packing.engines import groups_of, pack_group
from diffkiln.packing.packed import Packed, as_json
from diffkiln.packing.targets import SPEC, spec_without, spec_with
from diffkiln.record.constants import Constants
from diffkiln.record.pipeline import Recording
from diffkiln.runtime.compatibility import check_target
from diffkiln.runtime.loading import read_constants, read_modules
from diffkiln.runtime.targets import choose
from diffkiln.spec import TARGETS, Target, suggest
from diffkiln.steps import Progress, Steps

Location = str | os.PathLike[str]
