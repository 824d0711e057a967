"""Models behind a pipeline: what they are given, in which range and form, and what is no picture."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from diffkiln.errors import RecordError
from diffkiln.models.added import Added, added_to, finishing
from diffkiln.models.components import Component


class Bright(torch.nn.Module):
    """Enlarges twice, and adds a weight."""

    def __init__(self, light: float = 0.5, result: Any = None) -> None:
        super().__init__()
        self.light, self._result = torch.nn.Parameter(torch.tensor(light)), result

    def forward(self, pictures: torch.Tensor) -> Any:
        made = pictures.repeat_interleave(2, -1).repeat_interleave(2, -2) + self.light
        return self._result(made) if self._result else made


class Output(dict):
    """A result by names, as diffusers gives it."""


class Pipe:
    """A pipeline that gives what it was made with."""

    def __init__(self, result: Any) -> None:
        self._result = result

    @property
    def components(self) -> dict[str, Any]:
        return {"vae": torch.nn.Identity()}

    def to(self, device: str) -> Pipe:
        return self

    def __call__(self, prompt: str = "", output_type: str = "pil", return_dict: bool = True) -> Any:
        asked = self._result(output_type)
        return Output(images=asked) if return_dict else (asked, None)


def added(name: str = "enhancer", signed: bool = False) -> Added:
    return Added(Component(name, Bright, Path()), signed)


def pipe_of(pictures: torch.Tensor, module: torch.nn.Module | None = None, signed: bool = False) -> Any:
    return finishing(Pipe(lambda _: pictures), {"enhancer": (added(signed=signed), module or Bright())})


def test_pictures_are_given_from_0_to_1_and_come_back_so():
    pictures = torch.full((2, 3, 2, 2), 0.75)
    made = pipe_of(pictures)(output_type="pt")["images"]
    assert made.shape == (2, 3, 4, 4)
    assert torch.equal(made, torch.ones(2, 3, 4, 4))  # 1.25, cut off


def test_a_signed_model_is_given_pictures_from_minus_1_to_1():
    made = pipe_of(torch.full((1, 3, 2, 2), 0.25), signed=True)(output_type="pt")["images"]
    assert torch.equal(made, torch.full((1, 3, 4, 4), 0.5))  # -0.5 + 0.5 = 0


def test_a_model_computes_in_its_own_type_and_gives_the_pictures_theirs():
    seen = []
    module = Bright(result=lambda made: seen.append(made.dtype) or made).bfloat16()
    made = pipe_of(torch.zeros(1, 3, 2, 2), module)(output_type="pt")["images"]
    assert seen == [torch.bfloat16]
    assert made.dtype == torch.float32


def test_frames_are_enlarged_one_after_the_other():
    shapes = []
    module = Bright(0.0, result=lambda made: shapes.append(made.shape) or made)
    frames = torch.rand(1, 3, 3, 2, 2)
    made = pipe_of(frames, module)(output_type="pt")["images"]
    assert shapes == [(1, 3, 4, 4)] * 3
    assert torch.equal(made[..., ::2, ::2], frames)


def test_forms_are_those_that_are_asked_for():
    pipe = pipe_of(torch.full((1, 3, 2, 2), 0.25))
    assert np.array_equal(pipe(output_type="np")["images"], np.full((1, 4, 4, 3), 0.75, np.float32))
    assert pipe()["images"][0].size == (4, 4)
    assert pipe(return_dict=False)[0][0].getpixel((0, 0)) == (191, 191, 191)
    assert pipe_of(torch.rand(1, 2, 3, 2, 2))()["images"][0][1].size == (4, 4)


def test_latents_are_left_alone():
    latents = torch.rand(1, 4, 2, 2)
    assert pipe_of(latents)(output_type="latent")["images"] is latents


def test_the_pipeline_has_the_model_among_its_components():
    module = Bright()
    pipe = pipe_of(torch.zeros(1, 3, 2, 2), module)
    assert list(pipe.components) == ["vae", "enhancer"]
    assert type(pipe).__name__ == "Pipe"
    assert added_to(pipe) == {"enhancer"}
    pipe.to("meta")
    assert module.light.is_meta


def test_models_follow_each_other():
    modules = {"one": (added("one"), Bright(0.25)), "two": (added("two"), Bright(0.5))}
    made = finishing(Pipe(lambda _: torch.zeros(1, 3, 2, 2)), modules)(output_type="pt")["images"]
    assert torch.equal(made, torch.full((1, 3, 8, 8), 0.75))


@pytest.mark.parametrize(
    ("pictures", "result", "reason"),
    [
        (torch.zeros(1, 4, 2, 2), None, r"Pipe makes no pictures of three colours \(images of 1 x 4 x 2 x 2\)"),
        (torch.zeros(1, 2, 5), None, "Pipe makes no pictures of three colours"),
        (np.zeros((1, 2, 2, 3)), None, r"no pictures of three colours \(images\)"),
        (
            torch.zeros(1, 3, 2, 2),
            lambda made: made.mean(1, True),
            "enhancer .Bright. makes no pictures: of 1 x 3 x 2 x 2",
        ),
        (torch.zeros(1, 3, 2, 2), lambda made: SimpleNamespace(), "it gives no tensor"),
        (torch.zeros(1, 3, 2, 2), lambda made: made.view(7), "takes no pictures of 1 x 3 x 2 x 2: RuntimeError"),
    ],
)
def test_what_is_no_picture_is_refused(pictures, result, reason):
    with pytest.raises(RecordError, match=reason):
        pipe_of(pictures, Bright(result=result))(output_type="pt")
