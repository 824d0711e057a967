"""Keywords of a signature, drawn at random: a bundle gives what diffusers gives, or refuses in its own words.

Never another exception, and never another picture. `DIFFKILN_FUZZ=N` draws N calls of every family instead of a few.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from PIL import Image

import diffkiln
from diffkiln.errors import DiffkilnError
from diffkiln.interpreter.portable import portable
from diffkiln.interpreter.quiet import quiet_libraries
from tests.end_to_end.test_families import spec_of
from tests.pipelines import FAMILIES, WARNING_FILTERS
from tests.portably import as_recorded

pytestmark = [
    *(pytest.mark.filterwarnings(text) for text in WARNING_FILTERS),
    pytest.mark.filterwarnings("ignore:invalid value encountered in cast:RuntimeWarning"),  # diffusers' own
]
ASKED = int(os.environ.get("DIFFKILN_FUZZ", "0"))
NAMES = sorted(FAMILIES) if ASKED else ["flux", "sd", "wan"]
CALLS = ASKED or 40
#: The largest difference of a number from 0 to 1, and of a pixel; as in tests/end_to_end/test_families.py.
CLOSE = 1e-4
#: Not for drawing: what they do is tested by name, or they are objects of the caller's.
_LEFT_OUT = ("self", "prompt", "output_type", "generator", "callback_on_step_end", "callback", "kwargs", "return_dict")
_WORDS = st.sampled_from(["", "a red Fox", "blurred, dark", "🦊 x" * 40])
_ODD: list[Any] = [None, True, False, 0, 1, 2, -1, 0.0, 0.5, 1.0, 3.25, float("nan"), "x", [], [1.0, 0.5], (0, 0), {}]


class Pair:
    """A family's bundle, and the same pipeline as diffusers has it."""

    def __init__(self, name: str, root: Any, output: Any) -> None:
        from diffusers.pipelines.pipeline_utils import DiffusionPipeline

        spec = spec_of(name, root)
        self.base = {key: value for key, value in spec["inputs"].items() if key != "call"} | spec["inputs"]["call"]
        self.compiled = diffkiln.load(diffkiln.compile(spec, output / name).path)
        with quiet_libraries():
            self.eager: Any = DiffusionPipeline.from_pretrained(spec["source"]["model"])
        self.eager.set_progress_bar_config(disable=True)
        self.keywords = inspect.signature(type(self.eager).__call__).parameters

    def call(self, which: Any, prompt: Any, seed: Any, changed: dict[str, Any]) -> Any:
        """What a call gives, as an array; or the exception that it raises."""
        generator = torch.Generator("cpu").manual_seed(seed) if isinstance(seed, int) else seed
        try:
            with quiet_libraries(), as_recorded():
                made = which(prompt, generator=generator, **{"output_type": "np"} | self.base | changed)
        except Exception as error:
            return error
        first = made[0] if isinstance(made, tuple) else next(iter(made.values()))
        return first if isinstance(first, torch.Tensor) else np.asarray(first)


@st.composite
def calls(draw: Any, pair: Pair) -> tuple[Any, Any, dict[str, Any]]:
    """A prompt, a seed (or what is given for a generator), and up to three keywords."""
    names = [name for name in pair.keywords if name not in _LEFT_OUT]
    changed = {name: draw(_value(pair, name)) for name in draw(st.lists(st.sampled_from(names), max_size=3))}
    if draw(st.integers(0, 3)) == 0:
        changed["output_type"] = draw(st.sampled_from(["np", "pt", "pil", "latent", "jpeg", None]))
    if draw(st.integers(0, 5)) == 0:
        changed["return_dict"] = draw(st.booleans())
    if draw(st.integers(0, 7)) == 0:
        changed[draw(st.sampled_from(["negativ_prompt", "height_", "zoom"]))] = draw(st.sampled_from(_ODD))
    prompt = draw(st.one_of(_WORDS, _WORDS, _WORDS, st.lists(_WORDS, max_size=2), st.sampled_from([None, 7])))
    seed = draw(st.one_of(st.integers(0, 2**31), st.sampled_from(["7", None])))
    return prompt, seed, changed


def _value(pair: Pair, name: str) -> st.SearchStrategy[Any]:
    if "prompt" in name and not name.endswith(("embeds", "mask")) and "num" not in name:
        return st.one_of(_WORDS, st.lists(_WORDS, max_size=2), st.sampled_from([None, 7]))
    if name.endswith(("embeds", "mask", "latents")) or "image" in name:
        return st.sampled_from([None, torch.zeros(1, 4, 8), np.zeros((8, 8, 3), np.float32), Image.new("RGB", (8, 8))])
    known = pair.base.get(name, pair.keywords[name].default)
    return st.one_of(st.just(known), st.sampled_from(_ODD)) if known is not inspect.Parameter.empty else st.just(None)


@pytest.fixture(scope="module", params=NAMES)
def pair(request: Any, families: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    with portable():
        made = Pair(request.param, families, tmp_path_factory.mktemp("keywords"))
    yield made
    made.compiled.close()


@pytest.mark.slow
def test_a_bundle_gives_what_diffusers_gives_or_refuses_in_its_own_words(pair: Pair) -> None:
    ran: list[bool] = []

    @settings(
        max_examples=CALLS,
        deadline=None,
        derandomize=not ASKED,
        database=None,
        phases=[Phase.explicit, Phase.generate],
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
    )
    @given(calls(pair))
    def compare(call: tuple[Any, Any, dict[str, Any]]) -> None:
        got = pair.call(pair.compiled, *call)
        ran.append(not isinstance(got, Exception))
        if isinstance(got, Exception):
            assert isinstance(got, DiffkilnError), f"{call}: {type(got).__name__}: {got}"
            assert len(str(got)) < 2000
            return
        want = pair.call(pair.eager, *call)
        assert not isinstance(want, Exception), f"{call}: diffusers refuses it: {type(want).__name__}: {want}"
        assert want.shape == got.shape, call
        if call[1] is not None:  # without a generator noise is anybody's
            scale = 255 if got.dtype == np.uint8 else 1
            want, got = (torch.as_tensor(item).double() / scale for item in (want, got))
            assert float((want - got).abs().max()) <= (1 / 255 if scale == 255 else CLOSE), call

    compare()
    assert sum(ran) > CALLS // 10, "hardly a call was served"
