"""Bria FIBO's edits: the prompt of a recording is taken for one, and the program says what a prompt must be."""

from __future__ import annotations

import sys

import diffusers
import pytest
from torch._subclasses.fake_tensor import FakeTensorMode

from diffkiln.record.constants import Constants
from diffkiln.record.patches import fixed_lengths
from diffkiln.record.tape import Tape
from diffkiln.record.text import TextRecorder, sentinel


@pytest.fixture
def recorder():
    tape = Tape(FakeTensorMode(allow_non_fake_inputs=True), Constants())
    return TextRecorder(tape, {sentinel("prompt", 0): ("prompt", 0)}, {})


def test_the_prompt_of_a_recording_is_taken_for_an_edit(recorder):
    pipeline = diffusers.BriaFiboEditPipeline
    module = sys.modules[pipeline.__module__]
    with fixed_lengths(pipeline.__new__(pipeline)), recorder.active():
        assert not module.is_valid_edit_json("a fox")
        assert recorder.demanded == {}
        assert module.is_valid_edit_json(sentinel("prompt", 0))
    assert recorder.demanded == {"form": "edit_json"}
    assert not module.is_valid_edit_json(sentinel("prompt", 0))
