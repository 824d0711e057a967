"""Configurations of strangers: which keys have diffusers or transformers fetch or run code, so that they are refused.

The libraries take names out of JSON: of a class, of a pipeline, of a kernel on the Hub. Some of them they then download
and run, with checks of their own. Here nothing that can come to that reaches them. Read in diffusers 0.42 and
transformers 5.23; a test looks in the installed ones for keys that are not known here.
"""

from __future__ import annotations

import inspect
import json
import re
import sys
from collections.abc import Iterator
from typing import Any

#: Values of `attn_implementation` and `experts_implementation` that are the library's own. FlashAttention is not among
#: them: where the package is missing, transformers takes it from the Hub.
OWN_IMPLEMENTATIONS = frozenset({"eager", "sdpa", "flex_attention", "batched_mm", "grouped_mm"})

#: Keys, without underscores at the front, that have a library look for code elsewhere, if they hold anything.
_FETCHING = frozenset(
    {"auto_map", "custom_pipeline", "custom_pipelines", "trust_remote_code", "use_kernels", "kernel_config"}
)
_PRETRAINED = frozenset({"use_timm_backbone", "use_pretrained_backbone"})
#: Keys that name a class, which is an identifier, of the libraries alone.
_CLASSES = frozenset(
    {
        "class_name",
        "feature_extractor_type",
        "image_processor_type",
        "processor_class",
        "slow_tokenizer_class",
        "tokenizer_class",
        "video_processor_type",
    }
)
_KERNELS = re.compile(r"kernels-[a-z]+/")
#: What, in a module of transformers, brings code from the Hub, or has timm bring a model.
_SOURCES = ("get_kernel(", "timm.create_model(")


def is_configuration(name: str) -> bool:
    """Returns True for a file of this name whose keys the libraries act on; others hold words and tokens."""
    return name == "model_index.json" or name.endswith("config.json")


def reaching_out(text: str | bytes) -> str | None:
    """Returns what in a configuration, as JSON, would have a library fetch or run code; `None` where nothing would.

    Raises:
        ValueError, RecursionError: it is not JSON.
    """
    for path, key, value in _entries(json.loads(text)):
        if reason := _reason(key.lower().lstrip("_"), value):
            return f"{path} is {json.dumps(value)[:80]}, {reason}"
    return None


def fetches_code(kind: type) -> bool:
    """Returns True for a class of transformers whose own module brings code from elsewhere when it is built or run."""
    module = sys.modules.get(kind.__module__)
    if module is None or not kind.__module__.startswith("transformers."):
        return False
    try:
        source = inspect.getsource(module)
    except (OSError, TypeError):
        return False
    return any(call in source for call in _SOURCES)


def _reason(key: str, value: Any) -> str:
    if key in _FETCHING and value:
        return "which asks for code that comes with a model, and that is never run"
    if key in _PRETRAINED and value:
        return "which has transformers fetch another model"
    if "attn_implementation" in key or "experts_implementation" in key:
        return "" if _is_own(value) else "which may have transformers fetch native code. Take it out, or name sdpa"
    if key in _CLASSES and value is not None and not (isinstance(value, str) and value.isidentifier()):
        return "which is not a name of a class of diffusers or transformers"
    if isinstance(value, str) and _KERNELS.match(value):
        return "which names native code on the Hub"
    return ""


def _is_own(value: Any) -> bool:
    """Returns True if an implementation, or each of those for parts of a model, is the library's own."""
    pending = [value]
    while pending:
        item = pending.pop()
        if isinstance(item, dict):
            pending.extend(item.values())
        elif item is not None and not isinstance(item, bool) and str(item) not in OWN_IMPLEMENTATIONS:
            return False
    return True


def _entries(config: Any) -> Iterator[tuple[str, str, Any]]:
    """Yields every entry of every object: JSON path, key, value."""
    pending: list[tuple[str, Any]] = [("$", config)]
    while pending:
        path, item = pending.pop()
        if isinstance(item, dict):
            for key, value in item.items():
                yield f"{path}.{key[:60]}", key, value
                pending.append((f"{path}.{key[:60]}", value))
        elif isinstance(item, list):
            pending.extend((f"{path}[{index}]", value) for index, value in enumerate(item))
