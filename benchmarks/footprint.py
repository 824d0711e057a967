"""What diffkiln itself takes: import time, checking and recording a full-size model, memory of a compile, bytes stored.

    python benchmarks/footprint.py [--without-compile] [--only-streamed]

Each row is measured in a process of its own. Prints a Markdown table.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from measuring import DIGITS, machine, median, spread, table

FLUX = {
    "spec_version": 1,
    "source": {"architecture": "flux.1-dev", "seed": 0},
    "target": {"device": "cpu"},
    "inputs": {"height": 1024, "width": 1024, "num_inference_steps": 28, "guidance_scale": 3.5},
    "passes": [{"name": "fuse_qkv", "component": "transformer"}, {"name": "compile", "component": "transformer"}],
}
SD = {
    "spec_version": 1,
    "source": {"architecture": "sd-1.5", "seed": 0, "dtype": "float32"},
    "target": {"device": "cpu"},
    "inputs": {"height": 256, "width": 256, "num_inference_steps": 20, "guidance_scale": 7.5},
    "passes": [{"name": "fuse_qkv", "component": "unet"}],
}

#: Checked only: full-size models with the passes that a small GPU needs.
CHECKED: dict[str, tuple[dict[str, Any], str]] = {
    "FLUX.1-dev, fused, float8, T5 in NF4": (
        {
            **FLUX,
            "target": {"device": "cuda", "gpu": "nvidia-rtx-4090"},
            "passes": [
                {"name": "fuse_qkv", "component": "transformer"},
                {
                    "name": "quantize",
                    "mapping": {
                        "transformer": {"type": "float8_dynamic", "exclude": ["*norm*"]},
                        "text_encoder_2": {"backend": "bitsandbytes", "type": "nf4", "double_quant": True},
                    },
                },
            ],
        },
        "FluxPipeline",
    ),
    "SDXL, fused, int8, decoder with channels last": (
        {
            "spec_version": 1,
            "source": {"architecture": "sdxl-base-1.0", "seed": 0, "dtype": "float16"},
            "target": {"device": "cpu"},
            "inputs": {"height": 1024, "width": 1024, "num_inference_steps": 30, "guidance_scale": 5.0},
            "passes": [
                {"name": "fuse_qkv", "component": "unet"},
                {"name": "quantize", "component": "unet", "type": "int8_weight_only"},
                {"name": "channels_last", "component": "vae"},
                {"name": "compile", "component": "unet"},
            ],
        },
        "StableDiffusionXLPipeline",
    ),
    "Wan 2.2 A14B, both experts fused and int8, UMT5 in float8": (
        {
            "spec_version": 1,
            "source": {"architecture": "wan2.2-t2v-a14b", "seed": 0},
            "target": {"device": "cpu"},
            "inputs": {"height": 480, "width": 832, "num_frames": 81, "num_inference_steps": 40},
            "passes": [
                {"name": "fuse_qkv", "component": "transformer"},
                {"name": "fuse_qkv", "component": "transformer_2"},
                {
                    "name": "quantize",
                    "type": "int8_weight_only",
                    "mapping": {"transformer": {}, "transformer_2": {}},
                },
                {"name": "layerwise_cast", "component": "text_encoder"},
            ],
        },
        "WanPipeline",
    ),
}
#: Bytes of SD 1.5's UNet in float32.
LARGEST = 859_520_964 * 4
_MEASURE = """
import json, resource, sys, time
spec, output = json.loads(sys.argv[1]), sys.argv[2]
import diffusers, torch, torchao, transformers
from transformers import CLIPTextModel, T5EncoderModel
getattr(diffusers, sys.argv[3])
import diffkiln.compiler.compile as compiler
from diffkiln.record.pipeline import record
from diffkiln.interpreter.quiet import quiet_libraries
from diffkiln.record.constants import Constants
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
imported = peak()
started = time.perf_counter()
if output:
    built = compiler.compile(spec, output)
    told = {"seconds": time.perf_counter() - started, "steps": dict(built.seconds)}
elif sys.argv[4:]:
    checked = compiler.check(spec)
    told = {"check": time.perf_counter() - started, "bytes": sum(checked.bytes_after.values())}
    told["before"] = sum(checked.bytes_before.values())
else:
    checked = compiler.check(spec)
    told = {"check": time.perf_counter() - started, "after_check": peak()}
    started = time.perf_counter()
    with quiet_libraries(), compiler._collection_paused():  # as compile does
        record(checked.pipe, checked.requests, Constants())
    told["record"] = time.perf_counter() - started
print(json.dumps(told | {"imported": imported, "peak": peak()}))
"""


def measured(spec: dict[str, Any], pipeline: str, output: Path | None = None, *more: str) -> dict[str, Any]:
    command = [sys.executable, "-c", _MEASURE, json.dumps(spec), str(output or ""), pipeline, *more]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout.strip().splitlines()[-1])


def seconds(*command: str, runs: int = 7) -> list[float]:
    values = []
    for _ in range(runs):
        started = time.perf_counter()
        subprocess.run([sys.executable, *command], check=True, capture_output=True)
        values.append(time.perf_counter() - started)
    return values


def check_batches() -> list[tuple[str, str, str]]:
    rows = []
    for name, (spec, pipeline) in CHECKED.items():
        told = [measured(spec, pipeline, None, "check only") for _ in range(3)]
        took, peak = [each["check"] for each in told], max(each["peak"] for each in told)
        sizes = f"{told[0]['before'] / 1e9:.1f} → {told[0]['bytes'] / 1e9:.1f} GB of weights"
        measured_ = f"{median(took):.2f} s ({spread(took)}), {peak / 1e9:.2f} GB"
        rows.append((f"check of {name} ({sizes})", measured_, "≤ 2 s, < 1 GB"))
    return rows


def compile_rows(folder: Path) -> list[tuple[str, str, str]]:
    rows = []
    int8 = {"name": "quantize", "component": "unet", "type": "int8_weight_only"}
    nf4 = {"name": "quantize", "component": "unet", "backend": "bitsandbytes", "type": "nf4"}
    for name, more in (("", []), (", unet int8", [int8]), (", unet NF4", [nf4])):
        output = folder / f"sd{len(rows)}"
        told = measured({**SD, "passes": [*SD["passes"], *more]}, "StableDiffusionPipeline", output)
        manifest = json.loads((output / "manifest.json").read_text())
        sizes = {key: sum(row["bytes"] for row in groups) for key, groups in manifest["weights"].items()}
        files = sum(row["size"] for row in manifest["files"] if row["role"] == "weights")
        largest, total = LARGEST, sum(sizes.values())
        rows += [
            (
                f"peak memory of compiling SD 1.5, float32{name} (largest component {largest / 1e9:.2f} GB)",
                f"{told['peak'] / 1e9:.2f} GB = {told['peak'] / largest:.2f} × the largest; without the "
                f"{told['imported'] / 1e9:.2f} GB of imports {(told['peak'] - told['imported']) / largest:.2f} ×",
                "≤ 1.3 ×",
            ),
            (f"weights in that bundle against the transformed weights{name}", f"{files / total:.4f} ×", "≤ 1.01 ×"),
        ]
    return rows


def grown(folder: Path) -> int:
    """The digits pipeline with a transformer of many blocks in bfloat16, saved in shards; gives its bytes."""
    import torch
    from diffusers import FluxTransformer2DModel

    from diffkiln.models.stand_ins import fill_with_noise

    shutil.copytree(DIGITS / "model", folder, ignore=shutil.ignore_patterns("transformer"))
    config = FluxTransformer2DModel.load_config(DIGITS / "model" / "transformer")
    config |= {"num_attention_heads": 40, "num_layers": 12, "num_single_layers": 24}
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("meta"):
        transformer = FluxTransformer2DModel.from_config(config)
    transformer = transformer.to_empty(device="cpu").requires_grad_(False)
    torch.set_default_dtype(torch.float32)
    fill_with_noise(transformer, "grown")
    transformer.save_pretrained(folder / "transformer", max_shard_size="400MB")
    return sum(weight.nbytes for weight in transformer.parameters())


def streamed_rows(folder: Path) -> list[tuple[str, str, str]]:
    """A component much larger than its blocks, from shards; without engines, so that weights alone are seen."""
    with ProcessPoolExecutor(1, get_context("spawn")) as apart:  # what it takes is not what a compile takes
        size = apart.submit(grown, folder / "grown").result()
    spec = json.loads((DIGITS / "spec.json").read_text())
    spec["source"] = {"model": str(folder / "grown"), "dtype": "bfloat16"}
    fuse = {"name": "fuse_qkv", "component": "transformer"}
    int8 = {"name": "quantize", "component": "transformer", "type": "int8_weight_only"}
    rows = []
    for name, passes in (("fused", [fuse]), ("fused, int8", [fuse, int8])):
        output = folder / name.replace(", ", "-")
        told = measured({**spec, "passes": passes}, "FluxPipeline", output)
        shutil.rmtree(output)
        over = told["peak"] - told["imported"]
        rows.append(
            (
                f"peak memory of compiling a FLUX of 36 blocks, bfloat16, {name} (transformer {size / 1e9:.2f} GB)",
                f"{told['peak'] / 1e9:.2f} GB = {told['peak'] / size:.2f} × the largest; without the "
                f"{told['imported'] / 1e9:.2f} GB of imports {over / size:.2f} ×; {told['seconds']:.0f} s",
                "≤ 1.3 ×",
            )
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--without-compile", action="store_true", help="leave out the compile of SD 1.5")
    parser.add_argument("--only-streamed", action="store_true", help="only the component that is streamed from shards")
    options = parser.parse_args()
    print("# Footprint\n")
    print(machine() + "\n")
    if options.only_streamed:
        with tempfile.TemporaryDirectory() as folder:
            print(table(("what", "measured", "goal"), streamed_rows(Path(folder))))
        return

    bare, imported = seconds("-c", "pass"), seconds("-c", "import diffkiln")
    shown = seconds("-m", "diffkiln", "--help")
    flux = [measured(FLUX, "FluxPipeline") for _ in range(3)]
    digits = json.loads((DIGITS / "spec.json").read_text())
    digits["source"]["model"] = str(DIGITS / "model")
    small = [measured(digits, "FluxPipeline") for _ in range(3)]
    check, record = [told["check"] for told in flux], [told["record"] for told in flux]
    rows: list[tuple[str, str, str]] = [
        ("`import diffkiln`, without Python's own start", f"{median(imported) - median(bare):.3f} s", "≤ 0.15 s"),
        ("`diffkiln --help`", f"{median(shown):.3f} s ({spread(shown)})", "≤ 0.5 s"),
        ("check of full-size FLUX.1-dev, after imports", f"{median(check):.2f} s ({spread(check)})", "≤ 2 s"),
        ("memory of that process, imports included", f"{max(t['after_check'] for t in flux) / 1e9:.2f} GB", "< 1 GB"),
        ("recording FLUX.1-dev, call and components, 28 steps", f"{median(record):.2f} s ({spread(record)})", "≤ 5 s"),
        ("memory after recording it", f"{max(told['peak'] for told in flux) / 1e9:.2f} GB", ""),
        ("recording the digits pipeline, 8 steps", f"{median([told['record'] for told in small]):.2f} s", "≤ 5 s"),
    ]
    rows += check_batches()
    if not options.without_compile:
        with tempfile.TemporaryDirectory() as folder:
            rows += compile_rows(Path(folder))
            rows += streamed_rows(Path(folder))
    print(table(("what", "measured", "goal"), rows))


if __name__ == "__main__":
    main()
