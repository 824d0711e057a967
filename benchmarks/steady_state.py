"""Seconds an image once everything is warm: bundle, torch.compile, eager; and what an engine's call costs.

    python benchmarks/steady_state.py [--runs 20]

One process holds all three; they take turns, forwards and backwards. Prints Markdown tables.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from measuring import DIGITS, machine, median, table

CALL = {"height": 32, "width": 32, "num_inference_steps": 8, "guidance_scale": 1.0, "max_sequence_length": 16}


def timed(run: Callable[[], Any]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def pipelines(folder: Path) -> dict[str, Any]:
    """The ways by name: called with a prompt and the keywords of CALL."""
    from diffusers import FluxPipeline

    import diffkiln

    def diffusers_pipeline() -> Any:
        pipe = FluxPipeline.from_pretrained(DIGITS / "model", local_files_only=True)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    spec = json.loads((DIGITS / "spec.json").read_text())
    offloaded = diffkiln.compile(spec, folder / "offloaded", base=DIGITS).path
    resident = diffkiln.compile(spec | {"runtime": {}}, folder / "resident", base=DIGITS).path
    compiled = diffusers_pipeline()
    compiled.transformer.compile_repeated_blocks(fullgraph=True)
    return {
        "bundle, resident": diffkiln.load(resident),
        "bundle, group offload from disk": diffkiln.load(offloaded),
        "compile_repeated_blocks": compiled,
        "eager diffusers": diffusers_pipeline(),
    }


def images(runs: int, ways: dict[str, Any]) -> dict[str, list[float]]:
    """Seconds an image, `runs` for each way after 3 that do not count."""

    def draw(pipe: Any) -> Any:
        return pipe("a handwritten seven", generator=torch.Generator("cpu").manual_seed(7), **CALL).images[0]

    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for index in range(runs + 3):
        for way in list(ways)[:: 1 if index % 2 == 0 else -1]:
            value = timed(lambda way=way: draw(ways[way]))
            if index >= 3:
                seconds[way].append(value)
    return seconds


def engine_overhead(pipe: Any, runs: int = 2000) -> tuple[float, float, float]:
    """Microseconds of one block: the raw `boxed_run`, the engine, and the executor's REGION operation."""
    executor = pipe.executor
    (component, region_name), engine = next(iter(executor.engines.items()))
    module = executor.modules[component]
    program = next(iter(module.programs.values()))
    op = next(op for op in program.ops if op.attrs.get("region") == region_name)
    region = module.regions[region_name]
    inputs = [torch.randn(item.type.shape) for item in region.inputs]
    weights = executor.store.get(executor.store.key_of(component, f"{op.attrs['instance']}.{region.weights[0]}"))
    flat = [*inputs, *(weights[f"{op.attrs['instance']}.{name}"] for name in region.weights)]
    flat += [executor.constants[key] for key in region.constants]
    part = executor.component(component, program.name)
    call = part._region(op)

    with torch.inference_mode(), executor.running(part.schedule):
        direct = [timed(lambda: engine._run(list(flat))) for _ in range(runs)]
        wrapped = [timed(lambda: engine(flat)) for _ in range(runs)]
        whole = [timed(lambda: call(*inputs)) for _ in range(runs)]
    return tuple(median(values) * 1e6 for values in (direct, wrapped, whole))  # type: ignore[return-value]


def operation_overhead(runs: int = 300) -> float:
    """Microseconds that the interpreter adds to one small operation."""
    from diffkiln.interpreter.aten import Interpreter
    from diffkiln.program import Input, Op, Program, Ref, TensorType

    kind, count = TensorType("float32", (4,)), 200
    names = ["%x", *(f"%{index}" for index in range(count))]
    ops = tuple(Op("aten.add.Tensor", (Ref(a), Ref("%x")), (b,)) for a, b in pairwise(names))
    program = Program("chain", (Input("%x", kind),), ops, (Ref(names[-1]),), dict.fromkeys(names, kind))
    replay, x, add = Interpreter(program), torch.ones(4), torch.ops.aten.add.Tensor

    def by_hand() -> torch.Tensor:
        value = x
        for _ in range(count):
            value = add(value, x)
        return value

    with torch.inference_mode():
        a = median([timed(lambda: replay([x])) for _ in range(runs)])
        b = median([timed(by_hand) for _ in range(runs)])
    return (a - b) / count * 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=20)
    options = parser.parse_args()
    described = machine()
    with tempfile.TemporaryDirectory() as folder:
        ways = pipelines(Path(folder))
        seconds = images(options.segments, ways)
        direct, wrapped, whole = engine_overhead(ways["bundle, resident"])
        compiled, eager = median(seconds["compile_repeated_blocks"]), median(seconds["eager diffusers"])
        rows = [
            (
                way,
                f"{median(values) * 1e3:.1f} ms",
                " ms, ".join(f"{value * 1e3:.1f}" for value in (min(values), max(values))) + " ms",
                f"{median(values) / compiled:.2f}",
                f"{median(values) / eager:.2f}",
            )
            for way, values in seconds.items()
        ]
        print("# Steady state\n")
        print(f"{described}; {torch.get_num_threads()} threads\n")
        print(f"examples/digits, float32, 8 steps, {options.runs} runs each after 3.\n")
        print(table(("way", "median", "lowest, highest", "× torch.compile", "× eager"), rows))
        print("\nGoals: bundle ≤ 1.02 × torch.compile and ≤ eager.\n")
        overhead = [
            ("engine's call over a direct boxed_run, one block", f"{wrapped - direct:.1f} µs", "≤ 100 µs"),
            ("the executor's, weights looked up, over boxed_run", f"{whole - direct:.1f} µs", ""),
            ("interpreter, one operation", f"{operation_overhead():.1f} µs", "≤ 20 µs"),
        ]
        print(table(("overhead", "measured", "goal"), overhead))
        for way in ("bundle, resident", "bundle, group offload from disk"):
            ways[way].close()


if __name__ == "__main__":
    main()
