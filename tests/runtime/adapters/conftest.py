"""A tiny FLUX, fused and not compiled: its programs are replayed, which is cheap."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import diffkiln
from diffkiln.interpreter.quiet import quiet_libraries
from tests.pipelines import FAMILIES
from tests.runtime.adapters.files import adapter_of

CALL = {"height": 64, "width": 64, "num_inference_steps": 1, "guidance_scale": 3.5}


@pytest.fixture(scope="session")
def eager() -> Any:
    with quiet_libraries():
        return FAMILIES["flux"].build()


@pytest.fixture(scope="session")
def bundle(eager, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("adapters")
    eager.save_pretrained(folder / "model", safe_serialization=True)
    spec = {
        "spec_version": 1,
        "source": {"model": str(folder / "model")},
        "target": {"device": "cpu"},
        "inputs": CALL | {"call": {"max_sequence_length": 32}},
        "passes": [{"name": "fuse_qkv", "component": "transformer"}],
    }
    return diffkiln.compile(spec, folder / "bundle").path


@pytest.fixture
def pipe(bundle) -> Iterator[Any]:
    with diffkiln.load(bundle) as loaded:
        yield loaded


@pytest.fixture
def style(eager, tmp_path) -> Path:
    return adapter_of(tmp_path / "style.safetensors", {"transformer": eager.transformer}, ("to_q", "to_v", "proj_mlp"))


@pytest.fixture
def detail(eager, tmp_path) -> Path:
    return adapter_of(tmp_path / "detail.safetensors", {"transformer": eager.transformer}, ("to_k", "to_q"), seed=2)


def weights(pipe: Any) -> dict[str, torch.Tensor]:
    """Copies of all weights in the store."""
    store = pipe.executor.store
    return {f"{key[0]}.{name}": tensor.clone() for key in store.groups for name, tensor in store.get(key).items()}


def changed(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> set[str]:
    return {name for name, tensor in one.items() if not torch.equal(tensor, other[name])}
