"""Which steps compute."""

import pytest

from diffkiln.passes.caching import every, magnitude, symbols


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ({"interval": 2}, "●○●○●○●○"),
        ({"interval": 3}, "●○○●○○●○"),
        ({"interval": 3, "start": 3}, "●●●○○●○○"),
        ({"interval": 4, "end": 2}, "●○○○●○●●"),
        ({"interval": 20}, "●○○○○○○○"),
    ],
)
def test_every_so_many(given, wanted):
    assert symbols(every(8, **given)) == wanted


@pytest.mark.parametrize(
    ("threshold", "most", "retention", "wanted"),
    [
        (0.0, 3, 0.0, "●●●●●●"),
        (0.05, 3, 0.0, "●○○○●○"),
        (0.05, 1, 0.0, "●○●○●○"),
        (0.025, 3, 0.0, "●○○○●●"),
        (0.05, 3, 0.5, "●●●○○○"),
    ],
)
def test_magnitudes_add_up_until_the_threshold(threshold, most, retention, wanted):
    ratios = [1.0, 1.01, 0.98, 1.01, 1.01, 0.97]
    assert symbols(magnitude(ratios, threshold, most, retention)) == wanted
