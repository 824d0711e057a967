"""AnyFlow with far context: its transformer writes into a cache of keys and values that it is given."""

from __future__ import annotations

from typing import Any

from diffkiln.errors import RecordError
from diffkiln.families import Family
from diffkiln.record.patches import Patch


def _encode_kv_cache(_self: Any, *_args: Any, **_kwargs: Any) -> Any:
    raise RecordError(
        "the transformer of AnyFlowFARPipeline writes the keys and values of each chunk of frames into a cache, "
        "which is no result of it"
    )


PLUGIN = Family(
    patches=(
        Patch({"encode_kv_cache": "5a85e837717b502e"}, _encode_kv_cache, known_in="AnyFlowFARPipeline", refuses=True),
    ),
)
