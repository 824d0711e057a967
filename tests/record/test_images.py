"""Images while a call is recorded: sentinels, image processors, what stops the recording."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from torch._subclasses.fake_tensor import FakeTensorMode

from diffkiln.errors import DataDependent, RecordError
from diffkiln.program.images import is_edits
from diffkiln.record.constants import Constants
from diffkiln.record.images import ImageRecorder, twice_the_images
from diffkiln.record.sentinels import sentinels
from diffkiln.record.tape import Tape


@pytest.fixture
def tape():
    return Tape(FakeTensorMode(allow_non_fake_inputs=True), Constants(), [], what="a test")


def made(tape, processor, image, *args, **kwargs):
    """The type of what a processor gives for a sentinel, and the source of the input that it became."""
    recorder = ImageRecorder(tape)
    with torch.inference_mode(), recorder.patched(), tape:
        tensor = processor.preprocess(image, *args, **kwargs)
    (item,) = tape.inputs
    return tuple(tensor.shape), dict(item.source) | recorder.sources()[item.name]


def test_a_processor_is_written_down(tape):
    from diffusers.image_processor import VaeImageProcessor

    shape, source = made(tape, VaeImageProcessor(), sentinels({"image": (64, 48)})["image"], height=16, width=32)
    assert shape == (1, 3, 16, 32)
    assert source == {
        "kind": "image", "keyword": "image", "index": [0], "edits": [["resize", 32, 16, "lanczos"]], "size": None,
        "normalize": True, "binarize": False, "scaled": None,
    }  # fmt: skip


def test_a_mask_becomes_gray_and_binary(tape):
    from diffusers.image_processor import VaeImageProcessor

    processor = VaeImageProcessor(do_normalize=False, do_binarize=True, do_convert_grayscale=True)
    shape, source = made(tape, processor, sentinels({"mask_image": (64, 48)})["mask_image"], height=16, width=32)
    assert shape == (1, 1, 16, 32)
    assert source["edits"][-1] == ["convert", "L"]
    assert (source["normalize"], source["binarize"]) == (False, True)


def test_without_a_size_the_image_decides_it_and_has_to_keep_it(tape):
    from diffusers.image_processor import VaeImageProcessor

    shape, source = made(tape, VaeImageProcessor(vae_scale_factor=8), sentinels({"image": (70, 48)})["image"])
    assert shape == (1, 3, 48, 64)
    assert source["size"] == [70, 48]


def test_a_processor_that_does_not_resize_has_the_size_of_the_image(tape):
    """PIA and VideoToVideoSD: other sizes reached the VAE."""
    from diffusers.video_processor import VideoProcessor

    shape, source = made(tape, VideoProcessor(do_resize=False), sentinels({"image": (64, 48)})["image"])
    assert shape == (1, 3, 48, 64)
    assert source["size"] == [64, 48]


def test_a_list_is_one_batch(tape):
    from diffusers.image_processor import VaeImageProcessor

    listed = sentinels({"image": ((16, 16), (32, 16))})["image"]
    shape, source = made(tape, VaeImageProcessor(), listed, height=16, width=16)
    assert shape == (2, 3, 16, 16)
    assert source["index"] == [0, 1]


def test_an_image_keeps_what_was_done_to_it_before_its_processor(tape):
    from diffusers.image_processor import VaeImageProcessor

    image = sentinels({"image": (64, 64)})["image"].crop((0, 0, 32, 32)).convert("RGB").copy()
    _, source = made(tape, VaeImageProcessor(), image, height=16, width=16)
    assert source["edits"] == [["crop", 0, 0, 32, 32], ["convert", "RGB"], ["resize", 16, 16, "lanczos"]]
    assert is_edits(source["edits"])


def test_other_images_and_tensors_are_left_to_diffusers(tape):
    from diffusers.image_processor import VaeImageProcessor

    with ImageRecorder(tape).patched():
        given = VaeImageProcessor().preprocess(Image.new("RGB", (16, 16)))
    assert tape.inputs == []
    assert torch.equal(given, torch.full((1, 3, 16, 16), -1.0))


def test_pixels_that_a_processor_gives_by_itself_cannot_be_looked_at(tape):
    """They may still become a tensor, which is an input then."""
    from diffusers.image_processor import VaeImageProcessor

    image = sentinels({"image": (8, 8)})["image"]
    with ImageRecorder(tape).patched():
        VaeImageProcessor().preprocess(image)
        pixels = VaeImageProcessor.pil_to_numpy(image)
        with pytest.raises(DataDependent, match="reads the pixels of image"):
            _ = pixels.shape


@pytest.mark.parametrize(
    "look",
    [np.array, lambda image: image.getpixel((0, 0)), lambda image: image.tobytes(), lambda image: image.transpose(0)],
    ids=["array", "getpixel", "tobytes", "transpose"],
)
def test_whoever_looks_at_pixels_stops_the_recording(look):
    with pytest.raises(DataDependent, match="reads the pixels of image past its image processor"):
        look(sentinels({"image": (8, 8)})["image"])


@pytest.mark.parametrize(
    "edit",
    [
        lambda image: image.resize((4, 4), box=(0, 0, 2, 2)),
        lambda image: image.convert("P", palette=1),
        lambda image: image.convert("HSV"),
        lambda image: image.crop((4, 4, 4, 8)),
    ],
    ids=["resize", "convert", "mode", "crop"],
)
def test_edits_that_cannot_be_written_down_are_refused(edit):
    with pytest.raises(RecordError, match="does not record"):
        edit(sentinels({"image": (8, 8)})["image"])


def test_twice_the_prompts_have_twice_the_images_where_each_has_its_own():
    assert twice_the_images({"image": (8, 4), "mask_image": ((8, 4),)}) == {
        "image": (8, 4),
        "mask_image": ((8, 4), (8, 4)),
    }
