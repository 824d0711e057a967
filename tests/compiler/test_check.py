"""What a whole spec asks for in vain, by `check` alone: nothing is built."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import diffkiln
from diffkiln.errors import IllegalPlan, SpecError
from diffkiln.exporters.aot_inductor import check
from tests.conftest import DIGITS

#: Older than CUDA 13 takes.
OLD = {"device": "cuda", "gpu": "nvidia-l4", "driver": "570.26", "cuda": "12.8"}
COMPILE = [{"name": "compile", "component": "transformer"}]


def spec(target: Any, passes: list[dict[str, Any]]) -> dict[str, Any]:
    inputs = {"height": 32, "width": 32, "num_inference_steps": 8}
    return {"spec_version": 1, "source": {"model": "model"}, "target": target, "inputs": inputs, "passes": passes}


@pytest.fixture
def with_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """A torch built with CUDA 13, on a machine that lacks nothing."""
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(check, "cuda_problems", lambda: iter(()))


def refused(target: Any) -> list[str]:
    with pytest.raises(IllegalPlan) as caught:
        diffkiln.check(spec(target, COMPILE), base=DIGITS)
    return [str(problem) for problem in caught.value.problems]


@pytest.mark.usefixtures("with_cuda")
def test_a_promised_driver_that_engines_will_not_run_with_is_found_before_they_are_built() -> None:
    mend = "Raise it, or build with a torch for an earlier CUDA."
    assert refused(OLD) == [
        f"$.target.driver: found 570.26, required 580.65.06 or later: engines hold code of CUDA 13.0. {mend}",
        f"$.target.cuda: found 12.8, required 13.0 or later: engines hold code of CUDA 13.0. {mend}",
    ]


@pytest.mark.usefixtures("with_cuda")
def test_of_several_targets_the_one_is_named() -> None:
    kept = {"device": "cuda", "gpu": "nvidia-h200", "driver": "590.0", "cuda": "13.0"}
    assert [problem.partition(":")[0] for problem in refused([kept, OLD])] == [
        "$.target[1].driver",
        "$.target[1].cuda",
    ]


@pytest.mark.usefixtures("with_cuda")
def test_a_bundle_without_engines_promises_what_it_likes() -> None:
    assert diffkiln.check(spec(OLD, []), base=DIGITS).targets[0].driver == "570.26"


def large(height: int, images: int, target: dict[str, Any], passes: list[dict[str, Any]]) -> dict[str, Any]:
    inputs = {"height": height, "width": height, "num_inference_steps": 8, "num_images_per_prompt": images}
    source = {"architecture": "flux.1-dev", "seed": 0}
    return {"spec_version": 1, "source": source, "target": target, "inputs": inputs, "passes": passes}


GPU = {"device": "cuda", "gpu": "nvidia-h200"}
TILES = {"name": "vae", "component": "vae", "tiling": True}


@pytest.mark.parametrize(("height", "images"), [(4096, 1), (1024, 8)])
def test_images_that_a_gpu_cannot_upsample_at_once_need_tiles(height: int, images: int) -> None:
    """256 channels at 4096 x 4096 are 2**32 values."""
    with pytest.raises(IllegalPlan, match=r"\$\.inputs: images of .* more than 2³¹ values in vae.*\"tiling\": true"):
        diffkiln.check(large(height, images, GPU, []))
    diffkiln.check(large(height, images, GPU, [TILES | {"tile": 512}]))
    diffkiln.check(large(height, images, {"device": "cpu"}, []))


def test_images_that_a_gpu_can_upsample_need_none() -> None:
    diffkiln.check(large(2048, 1, GPU, []))
    diffkiln.check(large(1024, 8, GPU, [{"name": "vae", "component": "vae", "slicing": True}]))


def test_files_of_passes_that_are_not_there_are_named_together_with_their_places() -> None:
    lora = {"name": "fuse_lora", "component": "transformer", "adapters": [{"file": "nope.safetensors"}]}
    recover = {"name": "recover", "component": "transformer", "prompts": "nowhere.txt"}
    with pytest.raises(SpecError) as caught:
        diffkiln.check(spec({"device": "cpu"}, [lora, recover]), base=DIGITS)
    first, second = map(str, caught.value.problems)
    assert first.startswith("$.passes[0]: the adapter nope.safetensors cannot be read")
    assert second.startswith("$.passes[1]: there is no file of prompts")
