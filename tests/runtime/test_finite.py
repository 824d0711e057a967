"""Results that are no pictures: which component is named, and what is said of it."""

from __future__ import annotations

import pytest
import torch

from diffkiln.errors import NotFinite
from diffkiln.runtime.finite import all_finite, check, outputs_of

GOOD, BAD = torch.ones(2, 3), torch.tensor([1.0, float("inf")])


def outputs(**tensors: torch.Tensor):
    return [item for name, tensor in tensors.items() if (item := outputs_of(name, [tensor])) is not None]


def test_the_first_component_is_named() -> None:
    with pytest.raises(NotFinite, match=r"^unet: its output \(float32\) is not finite.*allow_nan=True") as caught:
        check(outputs(text_encoder=GOOD, unet=BAD, vae=BAD), [BAD], decoded=True)
    assert caught.value.exit_code == 7


def test_what_nobody_reads_does_not_count() -> None:
    """A text encoder's rows for padding may be no numbers."""
    check(outputs(text_encoder=BAD * 0, unet=GOOD, vae=GOOD), [GOOD], decoded=True)


def test_infinity_of_a_decoder_counts_though_the_picture_is_clamped() -> None:
    with pytest.raises(NotFinite, match=r"^vae: "):
        check(outputs(unet=GOOD, vae=BAD), [BAD.clamp(0, 1)], decoded=True)
    check(outputs(unet=GOOD, vae=BAD), [GOOD], decoded=False)


@pytest.mark.parametrize(("component", "upcast"), [("vae", True), ("transformer", False)])
def test_in_float16_the_mend_is_another_type(component: str, upcast: bool) -> None:
    with pytest.raises(NotFinite, match='"dtype": "bfloat16"') as caught:
        check(outputs(**{component: BAD.half()}), [BAD.half()], decoded=True)
    assert ("force_upcast" in str(caught.value)) is upcast
    assert len(str(caught.value).split()) < 60


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_large_numbers_are_finite(dtype: torch.dtype) -> None:
    """Also where their sum would not be, in their own type."""
    tensor = torch.full((64,), torch.finfo(dtype).max / 100, dtype=dtype)
    check(outputs(vae=tensor), [tensor], decoded=True)
    with pytest.raises(NotFinite):
        check(outputs(vae=tensor * 1000), [tensor * 1000], decoded=True)


def test_whole_numbers_and_nothing_are_finite() -> None:
    assert all_finite([torch.ones(2, dtype=torch.uint8), torch.ones(0)])
    assert outputs_of("a", [torch.ones(2, dtype=torch.int64)]) is None


def test_a_result_that_no_component_made_so_is_refused_too() -> None:
    with pytest.raises(NotFinite, match="though what every component gave is"):
        check(outputs(vae=GOOD), [BAD], decoded=True)
