"""Images that a GPU cannot decode at once."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from diffkiln.errors import Problem
from diffkiln.passes.base import Pass, State
from diffkiln.spec import Target

#: The most values that torch's nearest upsampling makes on a GPU. Beyond it raises; with channels last it gives zeros.
#: Source: torch, aten/src/ATen/native/cuda/UpSampleNearest2d.cu; pytorch#141831.
INT_MAX = 2**31 - 1
_IMAGES_AT_ONCE = ("batch_size", "num_images_per_prompt", "num_videos_per_prompt")


def too_large(state: State, passes: Sequence[Pass], targets: Sequence[Target]) -> Iterator[Problem]:
    """Yields images that a decoder's last upsampling cannot make on a GPU, unless they are decoded in parts."""
    if all(target.device == "cpu" for target in targets):
        return
    in_parts = {step.component: step.decodes for step in passes if step.decodes}
    for name, module in state.modules.items():
        channels = getattr(getattr(module, "config", None), "block_out_channels", None)
        parts = in_parts.get(name)
        if not hasattr(module, "decode") or channels is None or len(channels) < 2 or parts == "tiles":
            continue
        for index, variant in enumerate(state.variants):
            images = 1 if parts else math.prod(variant.get(key) or 1 for key in _IMAGES_AT_ONCE)
            height, width = variant.get("height") or 0, variant.get("width") or 0
            if images * height * width * channels[1] <= INT_MAX:
                continue
            yield Problem(
                "$.inputs" if len(state.variants) == 1 else f"$.inputs[{index}]",
                f"images of {height} × {width}, {images} at once, are more than 2³¹ values in {name}, and a GPU "
                "upsamples to no more",
                f'Add {{"name": "vae", "component": "{name}", "tiling": true}} to "passes", or draw fewer at once.',
            )
