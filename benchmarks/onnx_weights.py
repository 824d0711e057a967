"""What it costs ONNX Runtime that weights are inputs, which it cannot rearrange ahead of time. Prints a table.

PYTHONPATH=. python benchmarks/onnx_weights.py
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import onnx
import onnxruntime
import torch
from onnx import numpy_helper

from diffkiln.exporters.artefact import Lowering
from diffkiln.exporters.cache import EngineCache
from diffkiln.exporters.onnx.check import Onnx
from diffkiln.program import Program, Ref
from diffkiln.runtime.engines.onnx.engine import MODEL, OnnxEngine
from tests.exporters.regions import CPU, Writer, block, interpreted, tensors


def convolutions(channels: int, side: int) -> Program:
    """Six convolutions of 3 × 3 with SiLU between them, as a VAE's decoder has them."""
    w = Writer()
    x: Ref = w.value("%x", 1, channels, side, side)
    for index in range(6):
        weight, bias = w.value(f"@{index}.weight", channels, channels, 3, 3), w.value(f"@{index}.bias", channels)
        x = w.op("silu.default", w.op("conv2d.default", x, weight, bias, (1, 1), (1, 1)))
    return w.program("Convolutions", x)


def with_constants(model: Path, flat: list[torch.Tensor]) -> onnxruntime.InferenceSession:
    """The same graph with its weights built in."""
    held = onnx.load(model)
    for value, tensor in list(zip(held.graph.input, flat, strict=True))[1:]:
        held.graph.initializer.append(numpy_helper.from_array(tensor.numpy(), value.name))
    del held.graph.input[1:]
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(held.SerializeToString(), options, providers=["CPUExecutionProvider"])


def milliseconds(calls: list[Callable[[], object]], seconds: float = 3.0) -> list[float]:
    """The fastest time of each call. They take turns, so that a busy moment meets all of them."""
    times: list[list[float]] = [[] for _ in calls]
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times[0]) < 7:
        for call, found in zip(calls, times, strict=True):
            start = time.perf_counter()
            call()
            found.append((time.perf_counter() - start) * 1000)
    return [min(found) for found in times]


def main() -> None:
    torch.set_num_threads(1)
    cases = {
        "block, width 32, 16 tokens": block(32, 2, 16),
        "block, width 256, 64 tokens": block(256, 4, 64),
        "block, width 1024, 256 tokens": block(1024, 16, 256),
        "6 convolutions, 32 channels, 32²": convolutions(32, 32),
        "6 convolutions, 128 channels, 64²": convolutions(128, 64),
    }
    print(f"onnxruntime {onnxruntime.__version__}, torch {torch.__version__}, one thread\n")
    print(
        "| region | replay, ms | weights as inputs, ms | as constants, ms | inputs ÷ constants |\n|---|---|---|---|---|"
    )
    with tempfile.TemporaryDirectory() as folder:
        for name, region in cases.items():
            artefact = Onnx().export(Lowering(region, CPU), EngineCache(Path(folder)))
            run, flat = OnnxEngine(artefact.directory, artefact.inputs), tensors(region)
            constant = with_constants(artefact.directory / MODEL, flat)
            feed = {constant.get_inputs()[0].name: flat[0].numpy()}
            calls = [lambda: interpreted(region, flat), lambda: run(flat), lambda: constant.run(None, feed)]  # noqa: B023
            replay, inputs, constants = milliseconds(calls)
            print(f"| {name} | {replay:.2f} | {inputs:.2f} | {constants:.2f} | {inputs / constants:.2f} |", flush=True)


if __name__ == "__main__":
    main()
