"""The table of pipelines; those that the tests share come first."""

from __future__ import annotations

from functools import partial

from tests.pipelines import FAMILIES
from tests.pipelines.registry import Family, family

CALLS: dict[str, Family] = dict(FAMILIES)
#: As `tests.pipelines.registry.family`, for this table.
call = partial(family, table=CALLS)
