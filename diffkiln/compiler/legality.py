"""What a whole spec asks for and cannot have, beyond what a single pass can see: found by `check`, all together."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from diffkiln.errors import Problem
from diffkiln.passes.base import State
from diffkiln.passes.model.vae import VAE
from diffkiln.passes.program.compile import Compile
from diffkiln.passes.registry import ListedPass
from diffkiln.spec import Spec, Target

#: The most values that torch's nearest upsampling makes on a GPU. Beyond it raises; with channels last it gives zeros.
#: Source: torch, aten/src/ATen/native/cuda/UpSampleNearest2d.cu; pytorch#141831.
INT_MAX = 2**31 - 1
_IMAGES_AT_ONCE = ("batch_size", "num_images_per_prompt", "num_videos_per_prompt")


def problems_of(spec: Spec, listed: Sequence[ListedPass], targets: Sequence[Target]) -> list[Problem]:
    """Everything that the parts of a spec ask of each other, and of this machine's CUDA, in vain."""
    steps = [item.step for item in listed]
    return [
        *_ignored(spec, targets),
        *(problem for item in listed for problem in item.step.check_beside(spec, steps, item.where)),
        *_of_engines(spec, listed, targets),
    ]


def too_large(plan: State, listed: Sequence[ListedPass], targets: Sequence[Target]) -> Iterator[Problem]:
    """Images that a decoder's last upsampling cannot make on a GPU, unless they are decoded in parts."""
    if all(target.device == "cpu" for target in targets):
        return
    in_parts = {item.step.component: item.step for item in listed if isinstance(item.step, VAE)}
    for name, module in plan.modules.items():
        channels = getattr(getattr(module, "config", None), "block_out_channels", None)
        parts = in_parts.get(name)
        if not hasattr(module, "decode") or channels is None or len(channels) < 2 or (parts and parts.tiling):
            continue
        for index, variant in enumerate(plan.variants):
            images = 1 if parts else math.prod(variant.get(key) or 1 for key in _IMAGES_AT_ONCE)
            height, width = variant.get("height") or 0, variant.get("width") or 0
            if images * height * width * channels[1] <= INT_MAX:
                continue
            yield Problem(
                "$.inputs" if len(plan.variants) == 1 else f"$.inputs[{index}]",
                f"images of {height} × {width}, {images} at once, are more than 2³¹ values in {name}, and a GPU "
                "upsamples to no more",
                f'Add {{"name": "vae", "component": "{name}", "tiling": true}} to "passes", or draw fewer at once.',
            )


def _ignored(spec: Spec, targets: Sequence[Target]) -> Iterator[Problem]:
    """What the runtime section asks for and the targets would ignore."""
    if any(target.device != "cpu" for target in targets):
        return
    runtime = spec.runtime
    if runtime.offload is not None and runtime.offload.to == "host":
        reason = "on a CPU weights are used where they would wait: in the host's memory"
        yield Problem("$.runtime.offload.to", reason, 'Remove it, or set it to "disk".')
    if runtime.tf32 is not None:
        yield Problem("$.runtime.tf32", "a CPU has no TF32", "Remove it.")
    if runtime.cuda_graphs is not None:
        reason = "a graph is of a GPU's launches, and a CPU has none"
        yield Problem("$.runtime.cuda_graphs", reason, "Remove it, or choose a GPU as the target.")


def _of_engines(spec: Spec, listed: Sequence[ListedPass], targets: Sequence[Target]) -> Iterator[Problem]:
    """What the runtime section asks for, and the targets promise to make do with, and engines do not allow."""
    compiled = [(item.step, item.where) for item in listed if isinstance(item.step, Compile)]
    for step, where in compiled:
        yield from step.check_runtime(spec.runtime, where)
    promises: list[Problem] = []
    for index, target in enumerate(targets):
        where = f"$.target[{index}]" if isinstance(spec.target, tuple) else "$.target"
        for step, _ in compiled:
            promises += step.exporter.promise_problems(target, where)
    yield from dict.fromkeys(promises)
