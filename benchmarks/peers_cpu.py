"""Pipelines of middle size on this CPU: the bundle against eager diffusers, its compilers, OpenVINO and ONNX Runtime.

    python benchmarks/peers_cpu.py [--only sd,flux] [--ways bundle,eager] [--rounds 5] [--folder build/peers]

Every run is a process of its own, and the ways take turns, forwards and backwards. The clock is this process's: from
starting a process to the lines that it prints. OpenVINO and ONNX Runtime have environments of their own, made here.
What was measured stays in the folder, so that the same command goes on after an interruption. Prints Markdown.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path

from measuring import ROOT, machine
from peers.pipelines import MID, PROMPT, parameters
from peers.prepare import BUNDLES, PEERS, python_of, versions
from peers.results import Prepared, Results, Run, render

#: The ways in the order of the table. Compilers run fewer rounds, since each takes minutes.
WAYS = (
    "bundle", "bundle_first", "bundle_openvino", "eager", "compile_repeated_blocks", "torch_compile", "openvino",
    "onnxruntime",
)  # fmt: skip
COMPILERS = ("compile_repeated_blocks", "torch_compile")
_PEERS = Path(__file__).parent / "peers"


class Bench:
    """The folder with sources, bundles, exports, environments and results."""

    def __init__(self, folder: Path, images: int) -> None:
        self.folder, self.images = folder, images
        folder.mkdir(parents=True, exist_ok=True)
        self.results = Results(folder / "results.jsonl")

    def prepare(self, pipeline: str, way: str) -> None:
        """Makes what the way needs, once, and runs one process that warms the caches."""
        if self.results.preparation(pipeline, way) is not None:
            return
        started = time.perf_counter()
        try:
            python = python_of(way, self.folder)
            self._make(pipeline, way, python)
        except subprocess.CalledProcessError as error:
            self.results.add(Prepared(pipeline, way, failed=f"{error}; see {self._log(pipeline, way)}"))
            return
        seconds = time.perf_counter() - started
        warm = self.run(pipeline, way, 0, images=1)
        if way in COMPILERS:
            seconds = warm.first  # what their first process compiles is kept in Inductor's caches
        size = _bytes(self.made(pipeline, way))
        self.results.add(Prepared(pipeline, way, seconds, size, versions(python), warm.failed))

    def made(self, pipeline: str, way: str) -> Path:
        """What a way loads: the source itself, unless something was made of it."""
        kind = "bundle" if way == "bundle_first" else way
        return self.folder / f"{pipeline}-{kind if kind in (*BUNDLES, *PEERS) else 'source'}"

    def run(self, pipeline: str, way: str, number: int, images: int | None = None) -> Run:
        """Runs one process and keeps what it said."""
        call = dict(MID[pipeline].call) | {"prompt": PROMPT}
        made, count = self.made(pipeline, way), str(images or self.images)
        command = [python_of(way, self.folder), _PEERS / "child.py", way, made, json.dumps(call), count]
        with tempfile.TemporaryDirectory() as empty, self._log(pipeline, way).open("w") as log:
            environment = self._environment(pipeline, way, Path(empty))
            started = time.perf_counter()
            child = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=log, text=True)
            assert child.stdout is not None
            lines = [(time.perf_counter() - started, json.loads(line)) for line in child.stdout if line[0] == "{"]
            code = child.wait()
        run = _run(pipeline, way, number, lines)
        if code or run is None:
            run = Run(pipeline, way, number, failed=f"exit {code}: {_last_line(self._log(pipeline, way))}")
        self.results.add(run)
        return run

    def _make(self, pipeline: str, way: str, python: Path) -> None:
        self._once(pipeline, "source", Path(sys.executable))
        made = self.made(pipeline, way)
        kind = made.name.removeprefix(f"{pipeline}-")
        if kind != "source":
            self._once(pipeline, kind, python)

    def _once(self, pipeline: str, kind: str, python: Path) -> None:
        target = self.folder / f"{pipeline}-{kind}"
        if target.exists():
            return
        staged = target.with_name(f"{target.name}.part")
        shutil.rmtree(staged, ignore_errors=True)
        command = [python, _PEERS / "prepare.py", kind, pipeline, self.folder / f"{pipeline}-source", staged]
        with self._log(pipeline, kind).open("w") as log:
            environment = self._environment(pipeline, kind, self.folder)
            subprocess.run(command, env=environment, stdout=log, stderr=log, check=True)
        staged.rename(target)

    def _environment(self, pipeline: str, way: str, empty: Path) -> Mapping[str, str]:
        """Threads that wait sleep, and caches are kept for each way by itself. A first load finds no receipts."""
        own = self.folder / "caches" / f"{pipeline}-{way}"
        caches = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")
        state = empty if way == "bundle_first" else self.folder / "state"
        fixed = {"OMP_WAIT_POLICY": "passive", "HF_HUB_OFFLINE": "1", "XDG_STATE_HOME": str(state)}
        return os.environ | dict.fromkeys(caches, str(own)) | fixed | {"PYTHONPATH": str(ROOT)}

    def _log(self, pipeline: str, way: str) -> Path:
        logs = self.folder / "logs"
        logs.mkdir(exist_ok=True)
        return logs / f"{pipeline}-{way}.log"


def _run(pipeline: str, way: str, number: int, lines: Sequence[tuple[float, Mapping[str, float]]]) -> Run | None:
    """The times between a process's lines: loaded, and one for each image."""
    if len(lines) < 2:
        return None
    times = [seconds for seconds, _ in lines]
    each = tuple(later - sooner for sooner, later in pairwise(times[1:]))
    (load, loaded), (first, drawn), last = lines[0], lines[1], lines[-1][1]
    return Run(pipeline, way, number, load, first, each, loaded["cpu"], drawn["cpu"], int(last["peak"]))


def _last_line(path: Path) -> str:
    lines = [line for line in path.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1][:300] if lines else "it said nothing"


def _bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(MID), help="pipelines, by commas: " + ", ".join(MID))
    parser.add_argument("--ways", default=",".join(WAYS), help="ways, by commas: " + ", ".join(WAYS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--compiler-rounds", type=int, default=2, help="of torch.compile in its two forms")
    parser.add_argument("--images", type=int, default=3, help="of each process; all but the first are steady")
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "peers", help="takes some 5 GB a pipeline")
    parser.add_argument("--again", action="store_true", help="measure the named ways anew; what was made stays")
    parser.add_argument("--note", default="", help="a sentence on the circumstances, for the head of the page")
    options = parser.parse_args()
    began = machine()
    pipelines, ways = options.only.split(","), options.ways.split(",")
    if unknown := [name for name in pipelines if name not in MID] + [name for name in ways if name not in WAYS]:
        parser.error(f"unknown: {', '.join(unknown)}")
    bench = Bench(options.folder.absolute(), options.images)
    if options.again:
        bench.results.forget(ways, pipelines)
    for pipeline in pipelines:
        for way in ways:
            bench.prepare(pipeline, way)
        for number in range(1, options.rounds + 1):
            for way in ways[:: 1 if number % 2 else -1]:
                few = way in COMPILERS and number > options.compiler_rounds
                if not few and not bench.results.has(pipeline, way, number):
                    bench.run(pipeline, way, number)
    show(bench, f"{began}\n\n{options.note}".strip(), pipelines, ways)


def show(bench: Bench, began: str, pipelines: Sequence[str], ways: Sequence[str]) -> None:
    print(f"# Pipelines of middle size on a CPU\n\n{began}\n")
    print("float32, OMP_WAIT_POLICY=passive, warm page cache. Median and range of whole processes; ratios are of runs")
    print("in the same round. Load and first picture count from the start of the process. Compilers find their caches")
    print("of an earlier process. `bundle_first` is the first load by a user without any receipt. `bundle_openvino`")
    print("is a bundle with each component compiled whole by OpenVINO; `openvino` is optimum-intel's pipeline.\n")
    for pipeline in pipelines:
        mid = MID[pipeline]
        counts = parameters(bench.folder / f"{pipeline}-source")
        told = ", ".join(f"{name} {count / 1e6:.0f} M" for name, count in counts.items())
        print(f"## {mid.title}: {told}\n")
        print(", ".join(f"{key} {value}" for key, value in mid.call.items()) + "\n")
        print(render(bench.results, pipeline, ways), end="\n\n")
    for way in ways:
        found = [row.versions for row in bench.results.prepared if row.way == way and row.versions]
        if way in PEERS and found:
            print(f"{way}: {found[-1]}")


if __name__ == "__main__":
    main()
