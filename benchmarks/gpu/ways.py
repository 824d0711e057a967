"""One way to draw with full-size FLUX.1-dev, as a process that is told on its standard input what to do.

    python benchmarks/gpu/ways.py WAY [--work DIR] [--rehearse]

It answers each line with a line of JSON: `run SEED` with the seconds of one image, `latents SEED FILE` when they are
there, `memory` with bytes. Weights are random, of the true shapes, and the same for every way: matrices have the
variance 1 / fan-in, so activations stay near unit scale and no gate is shut. `--rehearse` draws with the tiny FLUX of
the tests on whatever device there is, to try the machinery; its numbers mean nothing. Without a GPU the weights of
bundles then lie on the tests' simulated device, and a picture that is not the CPU's ends the process.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks.gpu.answers import own_output

#: Draws from a seed: (seed, output_type) → result.
Draw = Callable[[int, str], Any]
PROMPT = "a red fox in the snow"
FULL = {"height": 1024, "width": 1024, "num_inference_steps": 28, "guidance_scale": 3.5, "max_sequence_length": 512}
TINY = {"height": 64, "width": 64, "num_inference_steps": 4, "guidance_scale": 3.5, "max_sequence_length": 32}


@dataclass(frozen=True)
class Setting:
    """Where bundles are kept, and whether this is a rehearsal."""

    work: Path
    rehearse: bool

    @property
    def call(self) -> dict[str, Any]:
        return TINY if self.rehearse else FULL

    @property
    def device(self) -> str:
        return "cuda" if torch.cuda.is_available() else "cpu"

    def source(self) -> dict[str, Any]:
        if not self.rehearse:
            return {"architecture": "flux.1-dev", "seed": 0, "dtype": "bfloat16"}
        from tests.pipelines import build_folder

        return {"model": str(build_folder("flux", self.work / "models")), "dtype": "bfloat16"}


# -- diffusers --


def pipeline(setting: Setting, place: str | None = None) -> Any:
    """diffusers' own pipeline, its weights drawn as a bundle's are."""
    from diffkiln.interpreter.quiet import quiet_libraries
    from diffkiln.models.meta import load_module, meta_pipeline
    from diffkiln.models.opening import open_source
    from diffkiln.spec.model import Source

    place = place or setting.device
    with quiet_libraries():
        source = open_source(Source(**setting.source()), Path())
        pipe = meta_pipeline(source, "bfloat16")
        for name in source.modules:
            pipe.register_modules(**{name: load_module(source, name, "bfloat16").to(place)})
    pipe.set_progress_bar_config(disable=True)
    return pipe


def drawing(pipe: Any, setting: Setting) -> Draw:
    def draw(seed: int, output_type: str) -> Any:
        generator = torch.Generator("cpu").manual_seed(seed)
        return pipe(prompt=PROMPT, generator=generator, output_type=output_type, **setting.call).images

    return draw


def eager(setting: Setting) -> Draw:
    return drawing(pipeline(setting), setting)


def eager_cudnn(setting: Setting) -> Draw:
    pipe = pipeline(setting)
    pipe.transformer.set_attention_backend("_native_cudnn" if setting.device == "cuda" else "_native_math")
    return drawing(pipe, setting)


def compile_blocks(setting: Setting) -> Draw:
    pipe = pipeline(setting)
    pipe.transformer.compile_repeated_blocks(fullgraph=True)
    return drawing(pipe, setting)


def compile_full(setting: Setting) -> Draw:
    pipe = pipeline(setting)
    pipe.transformer.compile(fullgraph=True)
    return drawing(pipe, setting)


def pruna_like(setting: Setting) -> Draw:
    """QKV fusion, FORA at an interval of 2, and torch.compile of the blocks."""
    pipe = pipeline(setting)
    pipe.transformer.fuse_qkv_projections()
    pipe.transformer.compile_repeated_blocks(fullgraph=True)
    blocks = [*pipe.transformer.transformer_blocks, *pipe.transformer.single_transformer_blocks]
    kept: dict[int, Any] = {}
    calls = [0]

    def reusing(index: int, block: Callable[..., Any]) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            if calls[0] % 2 == 0:
                kept[index] = block(*args, **kwargs)
            return kept[index]

        return forward

    for index, block in enumerate(blocks):
        block._compiled_call_impl = reusing(index, block._compiled_call_impl)

    def count(*_: Any) -> None:
        calls[0] += 1

    pipe.transformer.register_forward_hook(count)
    draw = drawing(pipe, setting)

    def from_the_start(seed: int, output_type: str) -> Any:
        calls[0] = 0
        return draw(seed, output_type)

    return from_the_start


def offload_group(setting: Setting) -> Draw:
    pipe = pipeline(setting, "cpu")
    pipe.enable_group_offload(
        onload_device=torch.device(setting.device),
        offload_device=torch.device("cpu"),
        offload_type="block_level",
        num_blocks_per_group=1,
        use_stream=setting.device == "cuda",
    )
    return drawing(pipe, setting)


def offload_model(setting: Setting) -> Draw:
    pipe = pipeline(setting, "cpu")
    pipe.enable_model_cpu_offload()
    return drawing(pipe, setting)


def offload_sequential(setting: Setting) -> Draw:
    pipe = pipeline(setting, "cpu")
    pipe.enable_sequential_cpu_offload()
    return drawing(pipe, setting)


# -- bundles --

#: The modulations, 3.2 of 12 billion weights, are quantized too, but not what they are multiplied with.
FP8 = [
    {
        "name": "quantize",
        "mapping": {
            "transformer": {"type": "float8_dynamic", "exclude": ["*norm*", "*embed*", "proj_out"]},
            "text_encoder_2": {"type": "float8_weight_only"},
        },
    },
    {"name": "quantize", "component": "transformer", "type": "float8_weight_only", "include": ["*.norm*.linear"]},
]
FUSE = {"name": "fuse_qkv", "component": "transformer"}
HOIST = {"name": "hoist", "component": "transformer"}
MASK = {"name": "cache_schedule", "component": "transformer", "method": "mask", "steps": [1, 0] * 14}
ENGINES = [
    {"name": "compile", "component": "transformer"},
    {"name": "compile", "component": "vae", "scope": "whole"},
    {"name": "compile", "component": "scheduler"},
]
BUNDLES: dict[str, dict[str, Any]] = {
    "bf16": {"passes": [FUSE, *ENGINES]},
    "bf16-hoisted": {"passes": [FUSE, HOIST, *ENGINES]},
    "fp8": {"passes": [FUSE, *FP8, *ENGINES]},
    "fp8-mask": {"passes": [FUSE, *FP8, MASK, *ENGINES]},
    "fp8-streamed": {"passes": [FUSE, *FP8, HOIST, *ENGINES], "runtime": {"offload": {"num_blocks_per_group": 1}}},
}


def build(name: str, setting: Setting, hidden: bool = False) -> Path:
    """The bundle, compiled where it is not there yet; `hidden` is the GPU from the compiler's process."""
    import diffkiln

    path = setting.work / f"bundle-{name}{'-hidden' if hidden else ''}"
    if path.exists():
        return path
    if hidden:
        command = [sys.executable, __file__, f"bundle-{name}", "--work", str(setting.work), "--build-as", str(path)]
        command += ["--rehearse"] if setting.rehearse else []
        subprocess.run(command, check=True, stdout=sys.stderr, env=os.environ | {"CUDA_VISIBLE_DEVICES": ""})
        return path
    diffkiln.compile(spec_of(name, setting), path, progress=lambda step: print(step, file=sys.stderr, flush=True))
    return path


#: What a way that draws with a bundle is built from: the bundle, and whether the GPU is hidden from its compiler.
BUILT = {
    "bundle-bf16": ("bf16", False),
    "bundle-bf16-untuned": ("bf16", True),
    "bundle-bf16-hoisted": ("bf16-hoisted", False),
    "bundle-fp8": ("fp8", False),
    "bundle-fp8-mask": ("fp8-mask", False),
    "bundle-fp8-streamed": ("fp8-streamed", False),
}


def spec_of(name: str, setting: Setting) -> dict[str, Any]:
    call = dict(setting.call)
    inputs = {"call": {"max_sequence_length": call.pop("max_sequence_length")}} | call
    made = {"spec_version": 1, "source": setting.source(), "inputs": inputs} | BUNDLES[name]
    if setting.rehearse:  # what a CPU has no types and no time for is left out
        steps = {"steps": [1, 0] * (call["num_inference_steps"] // 2)}
        passes = [each | steps if each is MASK else each for each in made["passes"] if each in (FUSE, HOIST, MASK)]
        return made | {"target": {"device": "cpu"}, "passes": passes}
    return made | {"target": {"device": "cuda", "gpu": "nvidia-h200"}}


def bundle(name: str, graphs: str | None = None, hidden: bool = False) -> Callable[[Setting], Draw]:
    def way(setting: Setting) -> Draw:
        import diffkiln
        from diffkiln.runtime.graphs import Graphs

        path = build(name, setting, hidden)
        if setting.rehearse and setting.device == "cpu":
            return simulated(path, setting)
        pipe = diffkiln.load(path)
        if graphs and setting.device == "cuda":  # by hand, as a second bundle of 33 GB would have to lie on the disk
            pipe.executor.graphs = Graphs(graphs, torch.device("cuda"))
        return drawing(pipe, setting)

    return way


def simulated(path: Path, setting: Setting) -> Draw:
    """Draws with a bundle whose weights are on the tests' simulated device, and compares with the CPU's picture."""
    import diffkiln
    from tests.simulated import Simulated
    from tests.simulated.whole import weights_on

    with diffkiln.load(path) as pipe:
        plain = torch.as_tensor(drawing(pipe, setting)(0, "latent"))
    device = Simulated()
    weights_on(device).__enter__()  # for as long as the process lives
    draw = drawing(diffkiln.load(path), setting)
    if not torch.equal(torch.as_tensor(draw(0, "latent")), plain) or device.races:
        raise SystemExit(f"the simulated device draws another picture; races: {device.races[:3]}")
    return draw


WAYS: dict[str, Callable[[Setting], Draw]] = {
    "eager": eager,
    "eager-cudnn": eager_cudnn,
    "compile-blocks": compile_blocks,
    "compile-full": compile_full,
    "pruna-like": pruna_like,
    "bundle-bf16": bundle("bf16"),
    "bundle-bf16-untuned": bundle("bf16", hidden=True),
    "bundle-bf16-hoisted": bundle("bf16-hoisted"),
    "bundle-bf16-step-graphs": bundle("bf16", "step"),
    "bundle-bf16-program-graphs": bundle("bf16", "program"),
    "bundle-fp8": bundle("fp8"),
    "bundle-fp8-mask": bundle("fp8-mask"),
    "bundle-fp8-streamed": bundle("fp8-streamed"),
    "offload-group": offload_group,
    "offload-model": offload_model,
    "offload-sequential": offload_sequential,
}


# -- the process --


def timed(draw: Draw, seed: int) -> float:
    synchronize()
    started = time.perf_counter()
    draw(seed, "pt")
    synchronize()
    return time.perf_counter() - started


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def memory() -> dict[str, int]:
    """Bytes: torch's peaks since it was last asked, and what all processes hold by the driver's count."""
    if not torch.cuda.is_available():
        return {}
    free, total = torch.cuda.mem_get_info()
    peaks = {"allocated": torch.cuda.max_memory_allocated(), "reserved": torch.cuda.max_memory_reserved()}
    torch.cuda.reset_peak_memory_stats()
    return {**peaks, "driver": total - free}


def predicted(way: str, setting: Setting) -> dict[str, int]:
    """Bytes that the planner says a bundle's call takes at its peak: weights, constants and results, no workspace."""
    if way not in BUILT:
        return {}
    import diffkiln

    name, hidden = BUILT[way]
    plans = diffkiln.plan_memory(build(name, setting, hidden))
    return {"predicted": max(call.residency.peak for calls in plans.values() for call in calls.values())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("way", choices=WAYS)
    parser.add_argument("--work", type=Path, default=Path("/tmp/diffkiln-gpu"))
    parser.add_argument("--rehearse", action="store_true")
    parser.add_argument("--build", action="store_true", help="of a bundle: compile it if it is missing, and no more")
    parser.add_argument("--build-as", type=Path, help="of a bundle: compile it to this place, and no more")
    options = parser.parse_args()
    setting = Setting(options.work, options.rehearse)
    if options.build_as:
        import diffkiln

        diffkiln.compile(spec_of(options.way.removeprefix("bundle-"), setting), options.build_as)
        return
    if options.build:
        name, hidden = BUILT[options.way]
        build(name, setting, hidden)
        return
    answers = own_output()
    draw = WAYS[options.way](setting)
    print(json.dumps({"ready": True}), file=answers, flush=True)
    for line in sys.stdin:
        verb, *rest = line.split()
        if verb == "run":
            answer: dict[str, Any] = {"seconds": timed(draw, int(rest[0]))}
        elif verb == "latents":
            torch.save(torch.as_tensor(draw(int(rest[0]), "latent")).float().cpu(), rest[1])
            answer = {"saved": rest[1]}
        else:
            answer = memory() | predicted(options.way, setting)
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
