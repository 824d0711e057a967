"""Images as diffusers' image processors make tensors of them."""

from __future__ import annotations

import io
import math

import numpy as np
import pytest
import torch
from PIL import Image

from diffkiln.errors import CallError
from diffkiln.runtime.image_end import image_list, pixels, refusal


def noise(width=40, height=30, mode="RGB", seed=0):
    channels = () if mode == "L" else (len(mode),)
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, *channels), np.uint8))


def source(*edits, normalize=True, binarize=False, size=None, count=1):
    return {
        "kind": "image", "keyword": "image", "index": list(range(count)), "edits": [list(edit) for edit in edits],
        "size": size, "normalize": normalize, "binarize": binarize, "scaled": None,
    }  # fmt: skip


@pytest.mark.parametrize("name", ["lanczos", "bicubic", "bilinear", "nearest"])
def test_images_are_those_of_diffusers(name):
    from diffusers.image_processor import VaeImageProcessor

    images = [noise(seed=1), noise(seed=2)]
    want = VaeImageProcessor(resample=name).preprocess(images, height=16, width=24)
    got = pixels(source(("resize", 24, 16, name), count=2), (2, 3, 16, 24), images)
    assert torch.equal(want, got)
    assert got.stride() == want.stride()


def test_masks_are_those_of_diffusers():
    from diffusers.image_processor import VaeImageProcessor

    processor = VaeImageProcessor(do_normalize=False, do_binarize=True, do_convert_grayscale=True)
    made = source(("resize", 24, 16, "lanczos"), ("convert", "L"), normalize=False, binarize=True)
    for mask in (noise(), noise(mode="L"), noise(24, 16)):
        assert torch.equal(processor.preprocess(mask, height=16, width=24), pixels(made, (1, 1, 16, 24), [mask]))


@pytest.mark.parametrize("size", [(24, 16), (48, 32)])
def test_numbers_are_resized_as_diffusers_resizes_them(size):
    from diffusers.image_processor import VaeImageProcessor

    array = np.asarray(noise(*size), np.float32) / 255
    made = source(("resize", 24, 16, "lanczos"))
    for given in (array, torch.from_numpy(array).permute(2, 0, 1).contiguous()):
        want = VaeImageProcessor().preprocess(given, height=16, width=24)
        assert torch.equal(want, pixels(made, (1, 3, 16, 24), [given]))


@pytest.mark.parametrize(
    "changed",
    [
        lambda array: array[..., ::-1],
        lambda array: array[::-1, ::-1],
        lambda array: array.astype(">f4"),
        lambda array: array.astype(np.float64) / 3,
        lambda array: array.round().astype(np.uint8),
    ],
    ids=["bgr", "turned", "big-endian", "float64", "uint8"],
)
def test_arrays_are_read_as_diffusers_reads_them(changed):
    from diffusers.image_processor import VaeImageProcessor

    array = changed(np.random.default_rng(3).random((16, 24, 3), np.float32))
    native = np.ascontiguousarray(array, array.dtype.newbyteorder("="))  # diffusers takes no other
    want = VaeImageProcessor().preprocess(native, height=8, width=8)
    got = pixels(source(("resize", 8, 8, "lanczos")), (1, 3, 8, 8), [array])
    assert got.dtype == torch.float32
    assert torch.equal(want.float(), got)


def test_a_read_only_array_and_a_tensor_with_a_gradient_are_only_read():
    array = np.asarray(Image.new("L", (4, 4), 1))  # a view of the image's own memory
    assert not array.flags.writeable
    got = pixels(source(normalize=False), (1, 1, 4, 4), [array])
    assert torch.equal(got, torch.ones(1, 1, 4, 4))
    assert not pixels(source(), (1, 3, 4, 4), [torch.rand(3, 4, 4, requires_grad=True)]).requires_grad


@pytest.mark.parametrize("dtype", [object, np.complex64, "U3", "datetime64[s]"])
def test_arrays_of_no_numbers_are_refused(dtype):
    with pytest.raises(CallError, match=r"image: an array of .*, required real numbers"):
        pixels(source(), (1, 3, 4, 4), [np.zeros((4, 4, 3)).astype(dtype)])


def test_complex_and_empty_tensors_are_refused():
    with pytest.raises(CallError, match=r"image: a tensor of torch\.complex64, required real numbers"):
        pixels(source(), (1, 3, 4, 4), [torch.zeros(3, 4, 4, dtype=torch.complex64)])
    with pytest.raises(CallError, match=r"image: numbers of shape \(3, 0, 4\)"):
        pixels(source(), (1, 3, 4, 4), [torch.zeros(3, 0, 4)])


def test_one_image_a_list_and_a_batch_are_lists():
    image = noise()
    array = np.zeros((2, 4, 4, 3), np.float32)
    assert image_list("image", image) == [image]
    assert len(image_list("image", [image, image])) == 2
    assert len(image_list("image", array)) == 2
    assert image_list("mask_image", torch.zeros(4, 4))[0].shape == (4, 4)
    assert [frame.shape for frame in image_list("video", torch.zeros(2, 5, 3, 4, 4))] == [(3, 4, 4)] * 10


@pytest.mark.parametrize("given", ["file.png", 3, np.zeros(3)])
def test_what_is_no_image_is_refused(given):
    with pytest.raises(CallError, match=r"image: .* is neither an image nor a list"):
        image_list("image", given)


def test_wrong_channels_are_told_with_the_mode():
    with pytest.raises(CallError, match=r"mode 'RGBA' becomes \(4, 16, 24\), this variant takes \(3, 16, 24\)"):
        pixels(source(("resize", 24, 16, "nearest")), (1, 3, 16, 24), [noise(mode="RGBA")])


@pytest.mark.parametrize("edits", [(), (("convert", "RGB"),), (("resize", 4, 4, "lanczos"), ("convert", "L"))])
@pytest.mark.parametrize("mode", ["I;16", "I", "F"])
def test_an_image_of_more_than_eight_bits_is_refused(mode, edits):
    """Pillow converts it by cutting off at 255: a photograph of sixteen bits would be white."""
    with pytest.raises(CallError, match=r"mode 'I?F?.*' has more than eight bits\. Give its numbers"):
        pixels(source(*edits), (1, 1, 4, 4), [Image.new(mode, (4, 4))])


def broken(how):
    file = io.BytesIO()
    noise(64, 64).save(file, "PNG")
    image = Image.open(io.BytesIO(file.getvalue()[:3000] if how == "cut" else file.getvalue()))
    if how == "closed":
        image.close()
    return image


@pytest.mark.parametrize(
    ("image", "reason"),
    [
        (broken("cut"), "cannot be read: .*truncated"),
        (broken("closed"), "cannot be read: .*closed"),
        (Image.new("LAB", (8, 8)), "cannot be read: conversion from LAB"),
        (Image.new("RGB", (0, 8)), "0 x 8 pixels"),
    ],
    ids=["cut", "closed", "mode", "empty"],
)
def test_an_image_that_pillow_cannot_read_is_told(image, reason):
    with pytest.raises(CallError, match=f"^image: .*{reason}"):
        pixels(source(("resize", 4, 4, "lanczos"), ("convert", "L")), (1, 1, 4, 4), [image])


def test_small_images_and_odd_modes_are_those_of_diffusers():
    from diffusers.image_processor import VaeImageProcessor

    made = source(("resize", 24, 16, "lanczos"), ("convert", "RGB"))
    transparent = Image.new("P", (9, 5), 3)
    transparent.putpalette([number % 256 for number in range(768)])
    for image in (
        noise(1, 1),
        transparent,
        noise(mode="RGBA"),
        noise(mode="L"),
        noise(mode="LA"),
        noise().convert("1"),
    ):
        want = VaeImageProcessor(do_convert_rgb=True).preprocess(image, height=16, width=24)
        assert torch.equal(want, pixels(made, (1, 3, 16, 24), [image]))


@pytest.mark.parametrize(("low", "high"), [(-1.0, 1.0), (0.0, 255.0), (0.0, math.nan), (0.0, math.inf)])
def test_numbers_beyond_zero_and_one_are_refused(low, high):
    with pytest.raises(CallError, match=r"required from 0 to 1"):
        pixels(source(), (1, 3, 2, 2), [torch.tensor([low, high]).repeat(3, 2, 1)])


def test_bytes_as_numbers_are_told_what_scales_them():
    with pytest.raises(CallError, match=r"numbers from 0 to 255, required from 0 to 1\. Divide them by 255"):
        pixels(source(), (1, 3, 2, 2), [np.array([[0, 255], [7, 9]], np.uint8)[..., None].repeat(3, 2)])


@pytest.mark.parametrize("side", [6, 8])
def test_numbers_that_would_be_cropped_are_refused(side):
    with pytest.raises(CallError, match="Give a PIL image"):
        pixels(source(("crop", 1, 1, 5, 5), ("resize", 8, 8, "nearest")), (1, 3, 8, 8), [torch.zeros(3, side, side)])


def test_numbers_of_another_size_are_told_where_nothing_resizes():
    with pytest.raises(
        CallError, match=r"Tensor of shape \(3, 6, 6\) becomes \(3, 6, 6\), this variant takes \(3, 8, 8\)"
    ):
        pixels(source(), (1, 3, 8, 8), [torch.zeros(3, 6, 6)])


def test_edits_are_done_in_their_order():
    image = noise(8, 8)
    got = pixels(source(("crop", 2, 2, 6, 6), ("resize", 2, 2, "nearest"), ("convert", "L")), (1, 1, 2, 2), [image])
    want = np.asarray(image.crop((2, 2, 6, 6)).resize((2, 2), Image.Resampling.NEAREST).convert("L"), np.float32) / 255
    assert torch.equal(got, 2.0 * torch.from_numpy(want)[None, None] - 1.0)


def test_an_image_is_resized_in_two_steps_as_pillow_does_it():
    image = noise(64, 64)
    got = pixels(source(("resize", 5, 7, "bicubic", 1)), (1, 3, 7, 5), [image])
    small = image.resize((5, 7), Image.Resampling.BICUBIC, reducing_gap=1)
    assert small != image.resize((5, 7), Image.Resampling.BICUBIC)
    want = torch.from_numpy(np.asarray(small, np.float32) / 255).permute(2, 0, 1)
    assert torch.equal(got, 2.0 * want[None] - 1.0)


def test_sizes_that_the_pipeline_looked_at_must_agree():
    assert refusal(source(size=[40, 30]), [noise()]) == ""
    assert refusal(source(), [noise(3, 3)]) == ""
    assert refusal(source(size=[40, 30]), [torch.zeros(3, 30, 40)]) == ""
    assert "image: 30 x 40 pixels (width x height), this variant takes 40 x 30" in refusal(
        source(size=[40, 30]), [noise(30, 40)]
    )
