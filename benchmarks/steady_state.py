"""Seconds an image once everything is warm: bundle, torch.compile, eager; and what an engine's call costs.

    python benchmarks/steady_state.py [--runs 20]

`diffkiln.bench` measures the images: each way has a process of its own, and they take turns, forwards and backwards.
Prints Markdown tables.
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
from measuring import DIGITS, machine, median, ratio, seconds, table

import diffkiln
from diffkiln.evaluate.bench import Rounds


def timed(run: Callable[[], Any]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


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
    spec = json.loads((DIGITS / "spec.json").read_text())
    with tempfile.TemporaryDirectory() as folder:
        offloaded = diffkiln.compile(spec, Path(folder) / "offloaded", base=DIGITS).path
        resident = diffkiln.compile(spec | {"runtime": {}}, Path(folder) / "resident", base=DIGITS).path
        against = [str(offloaded), "compile", "eager"]
        ways = diffkiln.bench(resident, against, rounds=Rounds(0, 3, options.runs)).ways
        with diffkiln.load(resident) as pipe:
            pipe("a handwritten seven")
            direct, wrapped, whole = engine_overhead(pipe)
        compiled, eager = (way.seconds["call"] for way in ways[2:])
        rows = [
            (
                way.name,
                seconds(found := way.seconds["call"], "ms"),
                seconds(way.seconds["denoise"], "ms"),
                ratio(found, compiled),
                ratio(found, eager),
            )
            for way in ways
        ]
        print("# Steady state\n")
        print(described + "\n")
        print(f"examples/digits, float32, 8 steps, {options.runs} calls of each way after 3, a process each.\n")
        print(table(("way", "a call", "denoising", "× torch.compile", "× eager"), rows))
        print("\nGoals: bundle ≤ 1.02 × torch.compile and ≤ eager.\n")
        overhead = [
            ("engine's call over a direct boxed_run, one block", f"{wrapped - direct:.1f} µs", "≤ 100 µs"),
            ("the executor's, weights looked up, over boxed_run", f"{whole - direct:.1f} µs", ""),
            ("interpreter, one operation", f"{operation_overhead():.1f} µs", "≤ 20 µs"),
        ]
        print(table(("overhead", "measured", "goal"), overhead))


if __name__ == "__main__":
    main()
