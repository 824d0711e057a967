"""Programs as passes rewrite them, against what they were. What constants hold is left out.

DIFFKILN_UPDATE_GOLDEN=1 writes the files anew; read the difference before you commit it.
"""

from __future__ import annotations

import difflib
import os
import re
from pathlib import Path

import pytest

from diffkiln.compiler.check import check
from diffkiln.interpreter.quiet import quiet_libraries
from diffkiln.passes import manager
from diffkiln.program import listing
from diffkiln.record.constants import Constants
from diffkiln.record.pipeline import record
from tests.passes.test_cache_schedule import spec
from tests.pipelines import WARNING_FILTERS

pytestmark = [pytest.mark.filterwarnings(text) for text in WARNING_FILTERS]
HERE = Path(__file__).parent
#: (family, component, options); a cache_schedule where the options name no pass.
REWRITES = {
    "flux-fora": ("flux", "transformer", {"method": "fora", "interval": 2}),
    "flux-dbcache": ("flux", "transformer", {"method": "dbcache", "interval": 3, "back": 1}),
    "flux-taylorseer": ("flux", "transformer", {"method": "taylorseer", "interval": 2, "order": 2}),
    "sdxl-deepcache": ("sdxl", "unet", {"method": "deepcache", "interval": 3}),
    "flux-arithmetic": ("flux", "scheduler", {"name": "compile"}),
}


@pytest.mark.parametrize("name", REWRITES)
def test_the_program_is_as_it_was(name, families):
    family, component, options = REWRITES[name]
    checked = check(spec(families, family, component, **options))
    with quiet_libraries():
        recording = record(checked.pipe, checked.requests, Constants())
    before = listing(recording.calls[0]["call"])
    recording, _ = manager.rewrite(recording, checked.listed)
    programs = recording.modules[component].programs
    reusing = [listing(program) for key, program in programs.items() if key.endswith(".reusing")]
    told = "\n\n".join(["before:", before, "after:", listing(recording.calls[0]["call"]), *reusing]) + "\n"
    _compare(name, told)


def _plain(told: str) -> str:
    """Without what a constant holds and the digits of a timestep, which follow torch's and NumPy's versions."""
    return re.sub(r"(timestep=\d+)\.\d+", r"\1", re.sub(r"#[0-9a-f]{12,}", "#constant", told))


def _compare(name: str, told: str) -> None:
    told = _plain(told)
    file = HERE / f"{name}.txt"
    if os.environ.get("DIFFKILN_UPDATE_GOLDEN"):
        file.write_text(told)
    assert file.read_text() == told


#: name → (family, component, options of guidance)
GUIDANCE = {
    "flux-guidance-doubled": ("flux", "transformer", {"batch": "doubled"}),
    "sdxl-guidance-halved": ("sdxl", "unet", {"batch": "halved", "steps": [1, 0]}),
}


@pytest.mark.parametrize("name", GUIDANCE)
def test_guidance_changes_these_lines(name, families):
    family, component, options = GUIDANCE[name]
    made = spec(families, family)
    made["passes"] = [{"name": "guidance", "component": component, **options}]
    made["inputs"]["num_inference_steps"] = 2
    if family == "flux":
        made["inputs"]["call"]["true_cfg_scale"] = 3.0
    checked = check(made)
    with quiet_libraries():
        recording = record(checked.pipe, checked.requests, Constants())
        rewritten, _ = manager.rewrite(recording, checked.listed)
    before, after = (_plain(listing(of.calls[0]["call+negative"])).splitlines() for of in (recording, rewritten))
    lines = [line for line in difflib.ndiff(before, after) if line[0] in "+-"]
    _compare(name, "\n".join(lines) + "\n")


#: name → (family, a pass); what it changes in the call, or in a component's program.
LINES = {
    "sd-euler": ("sd", "call", {"name": "scheduler", "type": "EulerDiscreteScheduler"}),
    "flux-attention": (
        "flux",
        "transformer",
        {"name": "attention_backend", "component": "transformer", "backend": "native_math"},
    ),
    "flux-whole-vae": ("flux", "vae", {"name": "compile", "component": "vae", "scope": "whole"}),
}


@pytest.mark.parametrize("name", LINES)
def test_pass_changes_these_lines(name, families):
    family, where, step = LINES[name]

    def told(passes):
        checked = check(spec(families, family) | {"passes": passes})
        with quiet_libraries():
            recording, _ = manager.rewrite(record(checked.pipe, checked.requests, Constants()), checked.listed)
        if where == "call":
            return _plain(listing(recording.calls[0]["call"])).splitlines()
        module = recording.modules[where]
        parts = (
            [*module.regions.values(), *module.programs.values()]
            if where == "transformer"
            else module.programs.values()
        )
        return [line for program in parts for line in _plain(listing(program)).splitlines()]

    lines = [line for line in difflib.ndiff(told([]), told([step])) if line[0] in "+-"]
    _compare(name, "\n".join(lines) + "\n")
