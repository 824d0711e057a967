"""Version specifiers of manifests."""

import pytest

from diffkiln.bundle.versions import fits


@pytest.mark.parametrize(
    ("found", "wanted", "fit"),
    [
        ("2.8.3", ">=2.6.3,<3", True),
        ("2.8.3.post2", ">=2.6.3,<3", True),
        ("2.6.2", ">=2.6.3,<3", False),
        ("3.0.0", ">=2.6.3,<3", False),
        ("4.0.0b36", ">=4,<5", True),
        ("2.13.1", "==2.13.*", True),
        ("2.14.0", "==2.13.*", False),
        ("1.0", "", True),
    ],
)
def test_versions_that_fit(found, wanted, fit):
    assert fits(found, wanted) is fit


def test_what_cannot_be_read_is_an_error():
    with pytest.raises(ValueError, match=r"'~=2\.13' is not a version specifier"):
        fits("2.13", "~=2.13")
