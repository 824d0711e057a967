"""One way to draw, in a process of its own: says on stdout when it has loaded and when each image is there.

    python child.py WAY FOLDER CALL IMAGES

It imports nothing but what the way needs, so that it runs in the environment of every peer. FOLDER is what `prepare`
made for the way, and CALL the keywords as JSON. Each line that it prints is a JSON object; the clock is the parent's.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any


def bundle(folder: str) -> Any:
    import diffkiln

    return diffkiln.load(folder)


def bundle_of_others(folder: str) -> Any:
    """The first load by a user who did not build the bundle, and has no receipt of any kind."""
    import diffkiln

    return diffkiln.load(folder, allow_native=True)


def eager(folder: str) -> Any:
    from diffusers import DiffusionPipeline

    return DiffusionPipeline.from_pretrained(folder, local_files_only=True)


def compile_repeated_blocks(folder: str) -> Any:
    pipe = eager(folder)
    denoiser(pipe).compile_repeated_blocks(fullgraph=True)
    return pipe


def torch_compile(folder: str) -> Any:
    """Denoiser, text encoders and the decoder, each whole."""
    pipe = eager(folder)
    for name in ("unet", "transformer", "text_encoder", "text_encoder_2"):
        if (component := getattr(pipe, name, None)) is not None:
            component.compile()
    import torch

    pipe.vae.decode = torch.compile(pipe.vae.decode)
    return pipe


def openvino(folder: str) -> Any:
    """Static shapes and a cache of compiled models, as OpenVINO's documentation advises, in float32 like the others.

    By itself it computes in bfloat16 where the CPU can; `DIFFKILN_OPENVINO_PRECISION=dynamic` leaves that to it.
    """
    from optimum.intel import OVDiffusionPipeline

    precision = os.environ.get("DIFFKILN_OPENVINO_PRECISION", "f32")
    told = {"CACHE_DIR": str(Path(folder) / "model_cache"), "INFERENCE_PRECISION_HINT": precision}
    pipe = OVDiffusionPipeline.from_pretrained(folder, compile=False, ov_config=told)
    call = json.loads(sys.argv[3])
    sizes = {"height": call["height"], "width": call["width"], "num_images_per_prompt": 1}
    if "num_frames" in call:
        sizes["num_frames"] = call["num_frames"]
    if "max_sequence_length" in call:  # its static shape is that of the longest prompt that the tokenizer allows
        longest = getattr(pipe, "tokenizer_2", None) or pipe.tokenizer
        longest.model_max_length = call["max_sequence_length"]
    pipe.reshape(batch_size=1, **sizes)
    pipe.compile()
    return pipe


def onnxruntime(folder: str) -> Any:
    from optimum.onnxruntime import ORTDiffusionPipeline

    return ORTDiffusionPipeline.from_pretrained(folder, provider="CPUExecutionProvider")


WAYS: Mapping[str, Callable[[str], Any]] = {
    "bundle": bundle,
    "bundle_first": bundle_of_others,
    "bundle_openvino": bundle,
    "eager": eager,
    "compile_repeated_blocks": compile_repeated_blocks,
    "torch_compile": torch_compile,
    "openvino": openvino,
    "onnxruntime": onnxruntime,
}


def denoiser(pipe: Any) -> Any:
    return getattr(pipe, "unet", None) or pipe.transformer


def say(event: str) -> None:
    """Prints an event with this process's CPU seconds and its highest resident memory so far."""
    status = Path("/proc/self/status").read_text().splitlines()
    peak = int(next(line.split()[1] for line in status if line.startswith("VmHWM"))) * 1024
    times = os.times()
    line = {"event": event, "cpu": round(times.user + times.system, 3), "peak": peak}
    print(json.dumps(line), flush=True)


def main() -> None:
    way, folder, call, images = sys.argv[1:5]
    pipe = WAYS[way](folder)
    if hasattr(pipe, "set_progress_bar_config"):
        pipe.set_progress_bar_config(disable=True)
    say("loaded")
    import torch

    keywords = json.loads(call)
    for _ in range(int(images)):
        made = pipe(generator=torch.Generator("cpu").manual_seed(7), **keywords)
        made = made.frames[0] if hasattr(made, "frames") else made.images[0]
        assert len(made) if hasattr(made, "__len__") else made.tobytes()
        say("image")


if __name__ == "__main__":
    main()
