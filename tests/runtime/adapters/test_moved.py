"""Passes that computed from weights what an adapter would change."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from diffkiln.errors import CallError
from diffkiln.runtime.adapters.moved import check_folded


def manifest(name: str) -> Any:
    return SimpleNamespace(passes=[SimpleNamespace(name=name, changed=True, options={"component": "transformer"})])


def test_a_layer_that_was_hoisted_is_refused_and_one_that_nothing_ever_reads_is_not():
    with pytest.raises(CallError, match=r"the pass hoist comes before a\.safetensors.*norm1: what does not follow"):
        check_folded(manifest("hoist"), {"transformer": "norm1"}, "a.safetensors")
    check_folded(manifest("hoist"), {"text_encoder": "norm1"}, "a.safetensors")
    check_folded(manifest("fuse_qkv"), {"transformer": "norm1"}, "a.safetensors")
    with pytest.raises(CallError, match="not installed here"):
        check_folded(manifest("a_strangers"), {"transformer": "norm1"}, "a.safetensors")
