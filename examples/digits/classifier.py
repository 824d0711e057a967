"""Read generated digits back, with a classifier that knows nothing of the pipeline that drew them.

The judge is a support vector machine on the 64 grey values of scikit-learn's `load_digits`; images of any
larger size are averaged down to 8 × 8 first. Fitting it takes well under a second.

    from classifier import requests, score
    wanted = requests(100)
    images = [pipe(prompt, generator=torch.Generator("cpu").manual_seed(seed)) for prompt, _, seed in wanted]
    score(images, [digit for _, digit, _ in wanted])    # the fraction that is read as what was asked for
"""

from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import numpy as np
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from sklearn.svm import SVC

SIDE = 8  # load_digits' images are SIDE × SIDE …
INK = 16.0  # … with values from 0 (paper) to INK
WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
PHRASINGS = (
    "a handwritten {word}",
    "the digit {numeral}",
    "{word}",
    "a picture of the number {word}",
    "A Handwritten {numeral}",
    "THE NUMBER {WORD}",
)


class Request(NamedTuple):
    """One image to ask for: the prompt, the digit that it names and the seed of the noise."""

    prompt: str
    digit: int
    seed: int


def prompts(digit: int) -> list[str]:
    """The phrasings of one digit (0 to 9) that `requests` asks with."""
    word = WORDS[digit]
    return [phrasing.format(word=word, WORD=word.upper(), numeral=digit) for phrasing in PHRASINGS]


def requests(n: int = 100, first_seed: int = 1000) -> list[Request]:
    """`n` requests, evenly over the ten digits; the phrasing and the seed change from one to the next."""
    wanted = []
    for index in range(n):
        digit = index % 10
        phrasings = prompts(digit)
        wanted.append(Request(phrasings[index // 10 % len(phrasings)], digit, first_seed + index))
    return wanted


def as_digits(images: Sequence[Any] | np.ndarray) -> np.ndarray:
    """Images as rows of load_digits' features.

    Args:
        images: PIL images, or arrays of shape (height, width) or (height, width, channels); uint8 in 0…255 or
            floats in 0…1. Height and width are multiples of 8.

    Returns:
        float64 array of shape (len(images), 64), in 0…16.

    Raises:
        ValueError: an image whose sides are not multiples of 8.
    """
    return np.stack([_as_digit(np.asarray(image)) for image in images])


def _as_digit(pixels: np.ndarray) -> np.ndarray:
    scale = 255.0 if pixels.dtype == np.uint8 else 1.0
    grey = pixels.astype(np.float64) / scale
    if grey.ndim == 3:
        grey = grey.mean(axis=-1)
    height, width = grey.shape
    if height % SIDE or width % SIDE:
        raise ValueError(f"an image of {height} × {width} pixels does not divide into {SIDE} × {SIDE} cells")
    cells = grey.reshape(SIDE, height // SIDE, SIDE, width // SIDE).mean(axis=(1, 3))
    return INK * cells.ravel()


@cache
def classifier() -> SVC:
    """The judge, fitted on all 1797 images."""
    digits = load_digits()
    return _fit(digits.data, digits.target)


def _fit(features: np.ndarray, digits: np.ndarray) -> SVC:
    return SVC(kernel="rbf", gamma=0.001, C=10.0).fit(features, digits)


def read(images: Sequence[Any] | np.ndarray) -> np.ndarray:
    """The digit that the classifier sees in each image: integers of shape (len(images),)."""
    return classifier().predict(as_digits(images))


def score(images: Sequence[Any] | np.ndarray, digits: Sequence[int]) -> float:
    """The fraction of images, 0 to 1, that are read as the digits asked for."""
    return float(np.mean(read(images) == np.asarray(digits)))


def held_out_accuracy(seed: int = 0) -> float:
    """How good the judge itself is: fitted on three quarters of load_digits, asked about the rest."""
    digits = load_digits()
    seen, unseen, truth, hidden = train_test_split(
        digits.data, digits.target, test_size=0.25, random_state=seed, stratify=digits.target
    )
    return float(_fit(seen, truth).score(unseen, hidden))
