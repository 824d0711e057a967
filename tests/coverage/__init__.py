"""What of diffusers and transformers diffkiln compiles, class by class, on tiny configurations: docs/coverage.md.

A class is a `Case`; what became of it is one JSON file in `results`, so that pieces can be measured by processes that
know nothing of each other, and again after a change. `python -m tests.coverage` measures, `make coverage` everything.
"""

from tests.coverage import (  # noqa: F401  (they register)
    autoencoders,
    flux_like,
    image_transformers,
    other_transformers,
    text_encoders,
    unets,
    video_transformers,
    wan_like,
)
from tests.coverage.registry import CASES, GROUPS, Case

__all__ = ["CASES", "GROUPS", "Case"]
