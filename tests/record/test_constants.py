"""Constants are kept by their content, whatever tensor brings it."""

from __future__ import annotations

import pytest
import torch

from diffkiln.record.constants import Constants


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.complex64])
@pytest.mark.parametrize("shape", [(), (0, 2), (2, 3), (2**17,)])
def test_the_same_content_has_the_same_key(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    constants = Constants()
    first, again = torch.ones(shape, dtype=dtype), torch.ones(shape, dtype=dtype)
    key = constants.add(first)
    assert constants.add(first) == constants.add(again) == key
    assert list(constants.tensors) == [key]
    assert torch.equal(constants.tensors[key], first)


def test_another_shape_type_or_sign_of_zero_is_another() -> None:
    zeros = torch.zeros(2, 2**17)
    assert len(set(map(Constants().add, (zeros, zeros.reshape(2**17, 2), zeros.half(), -zeros)))) == 4


def test_a_tensor_that_changed_is_another() -> None:
    constants = Constants()
    tensor = torch.arange(2.0**15)
    keys = [constants.add(tensor), constants.add(tensor.mul_(2)), constants.add(tensor.unsqueeze_(0))]
    keys += [constants.add(tensor.zero_()), constants.add(tensor.neg_())]
    assert len(set(keys)) == 5
    assert torch.equal(constants.tensors[keys[0]], torch.arange(2.0**15))


@pytest.mark.parametrize(
    "tensor",
    [
        torch.arange(2.0**17).reshape(2, -1).t(),
        torch.ones(2**17, dtype=torch.complex64).conj(),
        torch.ones(2**17, dtype=torch.complex64).conj().imag,
        torch.ones(()).expand(1),
        torch.ones(()).expand(2**17),
    ],
)
def test_a_tensor_is_kept_as_it_is_read(tensor: torch.Tensor) -> None:
    constants = Constants()
    keys = {constants.add(tensor), constants.add(tensor), constants.add(torch.clone(tensor).resolve_conj())}
    assert len(keys) == 1
    assert torch.equal(constants.tensors[keys.pop()], tensor)


def test_not_a_number_is_the_same_as_itself() -> None:
    constants = Constants()
    tensor = torch.full((2**17,), float("nan"))
    assert constants.add(tensor) == constants.add(tensor)


def test_a_new_tensor_in_an_old_ones_place_is_another() -> None:
    constants = Constants()
    assert len({constants.add(torch.full((2**15,), float(index))) for index in range(100)}) == 100
