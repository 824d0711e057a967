"""Processors of image encoders: recorded from a sentinel, and equal to what the runtime then makes of an image."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from torch._subclasses.fake_tensor import FakeTensorMode

from diffkiln.errors import CallError, RecordError
from diffkiln.interpreter.aten import Interpreter
from diffkiln.program.images import is_edits, is_scaled
from diffkiln.record.constants import Constants
from diffkiln.record.images import ImageRecorder
from diffkiln.record.sentinels import sentinels
from diffkiln.record.tape import Tape
from diffkiln.record.vision import encoded
from diffkiln.runtime.image_end import pixels


@pytest.fixture
def tape():
    return Tape(FakeTensorMode(allow_non_fake_inputs=True), Constants(), [], what="a test")


def recorded(tape, processor, image):
    """The input that a processor's tensor became, and its source."""
    recorder = ImageRecorder(tape)
    with torch.inference_mode(), recorder.patched(), tape:
        processor(images=image, return_tensors="pt")
    (item,) = tape.inputs
    return item, dict(item.source) | recorder.sources()[item.name]


@pytest.mark.parametrize("size", [(64, 48), (48, 64), (33, 71), (28, 28)])
@pytest.mark.parametrize(
    "processor",
    [
        transformers.CLIPImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}),
        transformers.CLIPImageProcessor(do_normalize=False, crop_size={"height": 20, "width": 24}, do_resize=False),
        transformers.SiglipImageProcessor(size={"height": 28, "width": 20}),
    ],
    ids=["clip", "cropped", "siglip"],
)
def test_the_runtime_prepares_an_image_as_the_processor_does(tape, processor, size):
    item, source = recorded(tape, processor, sentinels({"image": size})["image"])
    image = Image.fromarray(np.random.default_rng(1).integers(0, 256, (size[1], size[0], 3), np.uint8))
    want = processor(images=image, return_tensors="pt")["pixel_values"]
    assert torch.equal(want, pixels(source, item.type.shape, [image]))
    assert is_edits(source["edits"])
    assert is_scaled(source["scaled"])


QWEN = transformers.Qwen2VLImageProcessor(size={"shortest_edge": 56 * 56, "longest_edge": 28 * 28 * 12})


@pytest.mark.parametrize("size", [(112, 84), (84, 112), (33, 71), (300, 200)])
def test_patches_are_cut_by_the_program(tape, size):
    """Of an image that keeps its size, of one that becomes larger, and of one that becomes smaller."""
    given = sentinels({"image": size})["image"]
    recorder = ImageRecorder(tape)
    with torch.inference_mode(), recorder.patched(), tape:
        encoding = QWEN(images=[given], return_tensors="pt")
    (item,) = tape.inputs
    source = dict(item.source) | recorder.sources()[item.name]
    assert source["size"] == list(size)
    image = Image.fromarray(np.random.default_rng(1).integers(0, 256, (size[1], size[0], 3), np.uint8))
    want = QWEN(images=[image], return_tensors="pt")
    assert torch.equal(encoding["image_grid_thw"], want["image_grid_thw"])
    program = tape.finish("call", [encoding["pixel_values"]])
    (got,) = Interpreter(program, torch.device("cpu"))([pixels(source, item.type.shape, [image])], {}, {})
    assert torch.equal(want["pixel_values"], got)


def test_patches_of_images_of_several_sizes_follow_each_other(tape):
    given = sentinels({"image": ((112, 84), (84, 112), (84, 112))})["image"]
    with torch.inference_mode(), ImageRecorder(tape).patched(), tape:
        encoding = QWEN(images=given, return_tensors="pt")
    assert [item.source["index"] for item in tape.inputs] == [[0], [1, 2]]
    assert encoding["pixel_values"].shape == (3 * 8 * 6, 3 * 2 * 14 * 14)


@pytest.fixture
def torchvisions(monkeypatch):
    """A processor that says that torchvision brought it."""
    processor = transformers.CLIPImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    monkeypatch.setattr(type(processor), "backend", "torchvision")
    return processor


def test_what_torchvision_resizes_torch_resizes(tape, torchvisions):
    """transformers' processors of that kind: torch's filter of bytes, and the factor within mean and deviation."""
    item, source = recorded(tape, torchvisions, sentinels({"image": (64, 48)})["image"])
    assert source["edits"][1] == ["resize", 37, 28, "torch_bicubic"]
    image = np.random.default_rng(1).integers(0, 256, (48, 64, 3), np.uint8)
    given = torch.from_numpy(image).permute(2, 0, 1).unsqueeze(0)
    made = torch.nn.functional.interpolate(given, (28, 37), mode="bicubic", antialias=True)[..., 4:32].float()
    mean, std = ((torch.tensor(row) * 255)[:, None, None] for row in (torchvisions.image_mean, torchvisions.image_std))
    assert torch.equal((made - mean) / std, pixels(source, item.type.shape, [Image.fromarray(image)]))


def test_what_torchvision_only_rescales_is_computed_in_float32(tape, torchvisions):
    torchvisions.do_normalize = False
    _, source = recorded(tape, torchvisions, sentinels({"image": (64, 48)})["image"])
    assert source["scaled"] == {"factor": torch.tensor(1 / 255).item()}


def test_what_torchvision_does_otherwise_is_refused(tape, torchvisions):
    torchvisions.resample = Image.Resampling.LANCZOS
    with pytest.raises(RecordError, match="resizes by torchvision's lanczos, which diffkiln does not record"):
        recorded(tape, torchvisions, sentinels({"image": (64, 48)})["image"])


def test_an_encoding_that_is_not_known_is_refused(tape, monkeypatch):
    monkeypatch.setattr(type(QWEN), "__call__", lambda *_, **__: {"pixel_values": None, "spatial_shapes": None})
    with pytest.raises(RecordError, match="gives pixel_values, spatial_shapes, and diffkiln knows pixel_values"):
        encoded(tape, {}, type(QWEN).__call__, QWEN, [sentinels({"image": (64, 48)})["image"]])


def test_images_that_are_treated_differently_are_inputs_of_their_own(tape):
    """As Wan encodes the first and the last image of a video in one batch."""
    clip = transformers.CLIPImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    given = sentinels({"image": (64, 48), "last_image": (40, 90), "images": ((30, 30), (30, 30))})
    recorder = ImageRecorder(tape)
    with torch.inference_mode(), recorder.patched(), tape:
        batch = clip(images=[given["image"], given["last_image"], *given["images"]], return_tensors="pt")
        assert tape.is_marked(batch["pixel_values"])
    assert batch["pixel_values"].shape == (4, 3, 28, 28)
    assert [(item.source["keyword"], item.source["index"]) for item in tape.inputs] == [
        ("image", [0]), ("last_image", [0]), ("images", [0, 1]),
    ]  # fmt: skip
    sizes = [source["size"] for source in recorder.sources().values()]
    assert sizes == [[64, 48], [40, 90], [30, 30]]


def test_a_processor_that_keeps_proportions_needs_the_recorded_size(tape):
    clip = transformers.CLIPImageProcessor()
    assert recorded(tape, clip, sentinels({"image": (64, 48)})["image"])[1]["size"] == [64, 48]


def test_a_processor_of_one_size_takes_all(tape):
    siglip = transformers.SiglipImageProcessor()
    assert recorded(tape, siglip, sentinels({"image": (64, 48)})["image"])[1]["size"] is None


def test_other_images_are_left_to_the_processor(tape):
    with ImageRecorder(tape).patched():
        transformers.CLIPImageProcessor()(images=Image.new("RGB", (30, 30)), return_tensors="pt")
    assert tape.inputs == []


def test_sizes_that_cannot_be_written_down_are_refused(tape):
    processor = transformers.CLIPImageProcessor(size={"shortest_edge": 28, "longest_edge": 40}, do_center_crop=False)
    with pytest.raises(RecordError, match="which diffkiln does not record"):
        recorded(tape, processor, sentinels({"image": (64, 48)})["image"])


def test_numbers_do_not_go_to_an_image_encoder(tape):
    item, source = recorded(tape, transformers.CLIPImageProcessor(), sentinels({"image": (64, 48)})["image"])
    with pytest.raises(CallError, match="Give a PIL image, not numbers"):
        pixels(source, item.type.shape, [torch.zeros(3, 48, 64)])


@pytest.mark.parametrize(
    "scaled",
    [{}, {"factor": "1"}, {"factor": 1.0, "mean": [0, 0, 0]}, {"factor": 1, "mean": [0] * 3, "std": [1, 0, 1]}],
)
def test_a_hostile_scale_is_no_scale(scaled):
    assert not is_scaled(scaled)
