"""Arrays whose numbers depend on the request: what NumPy does with them is recorded, or stops the recording."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from diffkiln.errors import DataDependent
from diffkiln.interpreter.aten import Interpreter
from diffkiln.program import TensorType, verify
from diffkiln.record.arrays import MarkedArray, arrays_of, marked_array
from diffkiln.record.constants import Constants
from diffkiln.record.tape import Tape

HEIGHT, WIDTH = 4, 6


def as_adapters_do(image):
    listed = [np.array(image)[None, ...]]
    array = np.array(np.concatenate(listed, axis=0)).astype(np.float32) / 255.0
    return torch.from_numpy(array.transpose(0, 3, 1, 2))


def as_deep_floyd_does(image):
    array = np.array(image).astype(np.float32)
    return torch.from_numpy(np.stack([array / 127.5 - 1], axis=0).transpose(0, 3, 1, 2))


def as_masks_are_made(image):
    mask = np.array(image).astype(np.float32) / 255.0
    mask[mask < 0.5] = 0
    mask[mask >= 0.5] = 1
    return torch.from_numpy(mask)


def of_eight_bits(image):
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255.0


def divided_without_a_type(image):
    """NumPy computes in float64 there, and torch would not."""
    return torch.from_numpy(np.array(image) / 255.0).float()


def normalised_by_channel(image):
    array = np.moveaxis(np.array(image).astype(np.float32), -1, 0)
    return torch.tensor(((array.T - np.array([1.0, 2.0, 3.0], np.float32)) / np.array([2.0, 3.0, 4.0], np.float32)).T)


def there_and_back(image):
    array = torch.from_numpy(np.array(image).astype(np.float32)).permute(2, 0, 1).numpy()
    return torch.from_numpy(array[1:] * 2)


def below_each_other_and_repeated(image):
    array = np.array(image).astype(np.float32)
    rows = np.vstack([array[0, 0], array[0, 1]])
    return torch.from_numpy(np.vstack([np.tile(rows, (4, 1, 2))] * 2))


FUNCTIONS = [
    as_adapters_do,
    as_deep_floyd_does,
    as_masks_are_made,
    of_eight_bits,
    divided_without_a_type,
    normalised_by_channel,
    there_and_back,
    below_each_other_and_repeated,
]


class Image:
    """Stands for an image that is recorded."""


def recorded(function):
    constants = Constants()
    tape = Tape(FakeTensorMode(allow_non_fake_inputs=True), constants, what="the function")
    tape.as_array = marked_array
    pixels = tape.new_input("pixels", TensorType("float32", (1, 3, HEIGHT, WIDTH)))

    def array_of(value):
        return MarkedArray(pixels[0].permute(1, 2, 0), np.uint8) if isinstance(value, Image) else None

    with torch.inference_mode(), arrays_of(array_of), tape:
        result = function(Image())
    program = tape.finish("function", [result])
    verify(program)
    return program, constants.tensors


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda function: function.__name__)
def test_what_numpy_computes_of_pixels_is_recorded_bit_for_bit(function):
    program, constants = recorded(function)
    for seed in (1, 2):
        image = np.random.default_rng(seed).integers(0, 256, (HEIGHT, WIDTH, 3), np.uint8)
        pixels = torch.from_numpy(image.astype(np.float32)).permute(2, 0, 1)[None]
        (found,) = Interpreter(program)([pixels], {}, constants)
        assert torch.equal(found, function(image))


@pytest.mark.parametrize(
    "function",
    [
        lambda image: np.array(image).mean(),
        lambda image: np.array(image).tolist(),
        lambda image: np.array(image).sum(axis=0),
        lambda image: np.array(image) + 1,  # eight bits, which overflow
        lambda image: np.sort(np.array(image).astype(np.float32)),
        lambda image: float(np.array(image).astype(np.float32)[0, 0, 0]),
        lambda image: bool(np.array(image).astype(np.float32)[0, 0, 0]),
        lambda image: 3 in np.array(image),
        lambda image: f"{np.array(image)}",
        lambda image: np.array(image)[np.array(image).astype(np.float32) > 1],
        lambda image: memoryview(np.array(image).__array_interface__),
    ],
)
def test_what_is_not_recorded_stops_the_recording(function):
    with pytest.raises(DataDependent, match="NumPy"):
        recorded(function)


def test_other_arrays_are_numpys_own():
    with arrays_of(lambda _value: None):
        assert type(np.array([1, 2])) is np.ndarray
        assert torch.equal(torch.from_numpy(np.asarray([1.0], np.float32)), torch.tensor([1.0]))


def test_torch_remembers_its_own_constructors_though_the_first_to_ask_is_a_recording():
    """Z-Image: Qwen 3 was loaded with rotary tables of what memory held."""
    code = (
        "import torch\nfrom diffkiln.record.arrays import arrays_of\n"
        "with arrays_of(lambda _: None), torch.device('meta'):\n    torch.zeros(1)\n"
        "with torch.device('meta'):\n    assert torch.tensor([]).device.type == 'meta'"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
