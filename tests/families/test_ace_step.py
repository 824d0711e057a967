"""ACE-Step's sound, divided by its peak without asking whether that is above 1."""

from types import ModuleType

import pytest
import torch

from diffkiln.families.ace_step import PLUGIN

CALL = """
import torch
def __call__(self, audio):
    peak = audio.abs().amax(dim=[1, 2], keepdim=True)
    if torch.any(peak > 1.0):
        audio = audio / peak.clamp(min=1.0)
    return audio
"""


@pytest.fixture
def module(monkeypatch):
    made = ModuleType("ace_step_like")
    monkeypatch.setitem(__import__("sys").modules, made.__name__, made)
    exec(CALL, vars(made))
    return made


@pytest.mark.parametrize("loudness", [[0.5, 0.25], [3.0, 0.5], [3.0, 2.0]])
def test_quiet_sound_stays_as_it_is_and_loud_sound_is_divided(module, loudness):
    audio = torch.tensor(loudness).reshape(2, 1, 1) * torch.tensor([1.0, -0.3, 0.7])
    (patch,) = PLUGIN.patches
    patched = patch.replacement(module.__call__)
    assert patched(None, audio).equal(module.__call__(None, audio))
    assert module.torch is torch
