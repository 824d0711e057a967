"""Bundles of strangers as diffusers: no configuration has a library fetch or run code."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

import diffkiln
from diffkiln.errors import DiffkilnError, IntegrityError
from tests.faults.test_loading import rehash
from tests.pipelines import WARNING_FILTERS

FROZEN = Path(__file__).parents[2] / "frozen" / "0.1.0"
pytestmark = [pytest.mark.filterwarnings(text) for text in WARNING_FILTERS]


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    """One without native code."""
    return shutil.copytree(FROZEN / "data" / "bundle", tmp_path / "bundle")


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What transformers asks the Hub's kernels for, as where the package `kernels` is installed."""
    found: list[Any] = []

    def get_kernel(*arguments: Any, **_: Any) -> Any:
        found.append(arguments)
        raise ValueError("native code would be fetched and run")

    from transformers.integrations import hub_kernels

    monkeypatch.setattr(hub_kernels, "is_kernels_available", lambda *_, **__: True)
    monkeypatch.setattr(hub_kernels, "get_kernel", get_kernel)
    return found


def edit(bundle: Path, file: str, **entries: Any) -> None:
    path = bundle / file
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))
    rehash(bundle, file)


CASES: list[tuple[str, dict[str, Any]]] = [
    ("pipeline/text_encoder/config.json", {"_attn_implementation": "kernels-community/x"}),
    ("pipeline/text_encoder/config.json", {"attn_implementation": "kernels-community/x"}),
    ("pipeline/text_encoder/config.json", {"_attn_implementation_internal": "kernels-community/x"}),
    ("pipeline/text_encoder/config.json", {"auto_map": {"AutoModel": "code.Model"}}),
    ("pipeline/vae/config.json", {"_class_name": ["code", "VAE"]}),
    ("pipeline/scheduler/scheduler_config.json", {"_class_name": "code.Scheduler"}),
    ("pipeline/tokenizer/tokenizer_config.json", {"auto_map": {"AutoTokenizer": ["code.Tokenizer", None]}}),
    ("pipeline/tokenizer/tokenizer_config.json", {"trust_remote_code": True}),
    ("pipeline/model_index.json", {"custom_pipeline": "someone/x"}),
]


@pytest.mark.parametrize(("file", "entry"), CASES, ids=lambda item: str(item)[:60])
def test_configuration_that_reaches_out_is_refused_before_anything_is_asked(
    bundle: Path, asked: list[Any], file: str, entry: dict[str, Any]
) -> None:
    edit(bundle, file, **entry)
    with pytest.raises(IntegrityError, match=rf"{file}: \$\.{next(iter(entry))} is"):
        diffkiln.load(bundle, as_diffusers=True)
    assert asked == []


@pytest.mark.parametrize(
    "entry",
    [
        ["transformers", "AutoModel"],
        ["transformers", "YosoModel"],
        ["transformers", "CLIPTextModel"],
        ["diffusers", "OnnxRuntimeModel"],
        ["diffusers", "StableDiffusionPipeline"],
        ["diffusers", "UNet2DModel"],
        ["os", "system"],
        ["torch.hub", "load"],
        ["transformers", 1],
    ],
)
def test_component_that_diffusers_would_load_by_itself_is_no_model(bundle: Path, entry: list[Any]) -> None:
    """It has no weights in the manifest, so diffusers would look for a file of weights, pickles among them."""
    edit(bundle, "pipeline/model_index.json", tokenizer=entry)
    with pytest.raises(DiffkilnError, match=r"weights of such a model|elsewhere|neither|native code|no library and"):
        diffkiln.load(bundle, as_diffusers=True)


def test_pipeline_that_is_made_of_others_is_refused(bundle: Path) -> None:
    edit(bundle, "pipeline/model_index.json", _class_name="KandinskyV22CombinedPipeline")
    manifest = json.loads((bundle / "manifest.json").read_bytes())
    manifest["pipeline"]["class_name"] = "KandinskyV22CombinedPipeline"
    (bundle / "manifest.json").write_text(json.dumps(manifest))
    rehash(bundle, "pipeline/model_index.json")
    with pytest.raises(DiffkilnError, match="fetch other pipelines"):
        diffkiln.load(bundle, as_diffusers=True)


def test_plain_bundle_loads_as_diffusers(bundle: Path, asked: list[Any]) -> None:
    assert diffkiln.load(bundle, as_diffusers=True)
    assert asked == []
