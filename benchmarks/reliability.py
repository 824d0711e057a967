"""What integrity costs: hashing, loading a bundle for the first and for the second time, eight loads at once.

    python benchmarks/reliability.py [--gigabytes 2]

The bundle is the digits example, without engines, padded with random weights that no program reads: to be hashed, and
nothing else. Prints Markdown tables. BLAKE3 is measured where the package is installed (extra `sign` brings it).
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from measuring import DIGITS, machine, median, spread, table

import diffkiln
from diffkiln.bundle import BundleWriter, GroupEntry, open_bundle
from diffkiln.bundle.hashed import SETTLED_NS

PADDING_FILES = 8
_BLOCK = 1 << 24

_LOAD = """
import sys, time
import diffkiln, torch
import diffkiln.runtime.loading
hashed = []
started = time.perf_counter()
diffkiln.load(sys.argv[1], rehash=sys.argv[2] == "rehash", progress=hashed.append)
print(time.perf_counter() - started, sum(hashed))
"""


def padded(folder: Path, size: int) -> Path:
    """The digits bundle with `size` bytes of weights more."""
    spec = json.loads((DIGITS / "spec.json").read_text()) | {"passes": []}
    small, output = folder / "small", folder / "bundle"
    diffkiln.compile(spec, small, base=DIGITS)
    with open_bundle(small) as bundle, bundle.verify() as verified, BundleWriter(output) as writer:
        manifest = verified.manifest
        for row in manifest.files:
            writer.write(row.path, verified.read(row.path), row.role)
        weights = dict(manifest.weights)
        for index in range(PADDING_FILES):
            path = f"weights/padding{index}/unused.safetensors"
            count = _write_tensor(writer.path(path), size // PADDING_FILES)
            writer.add(path, "weights")
            weights[f"padding{index}"] = (GroupEntry(name="unused", file=path, tensors=1, bytes=count),)
        writer.publish(lambda rows: manifest.model_copy(update={"files": rows, "weights": weights}))
    return output


def _write_tensor(path: Path, size: int) -> int:
    size -= size % _BLOCK
    header = json.dumps({"padding": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}).encode()
    header += b" " * (-len(header) % 8)
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        for _ in range(size // _BLOCK):
            file.write(os.urandom(_BLOCK))
    return size


def throughput() -> str:
    """Of bytes in memory: what is hashed, not what the disk gives."""
    rows = [_rate(f"hashlib SHA-256, {threads} at a time", _sha256, threads) for threads in (1, os.cpu_count() or 1)]
    try:
        from blake3 import blake3
    except ImportError:
        return table(("hash", "GiB/s"), rows)

    def single(blocks: list[bytes]) -> None:
        _feed(blake3(), blocks)

    def several(blocks: list[bytes]) -> None:
        _feed(blake3(max_threads=blake3.AUTO), blocks)

    rows.append(_rate("BLAKE3, 1 thread", single, 1))
    rows.append(_rate("BLAKE3, its own threads", several, 1))
    rows.append(_rate(f"BLAKE3, 1 thread, {os.cpu_count()} at a time", single, os.cpu_count() or 1))
    return table(("hash", "GiB/s"), rows)


def _sha256(blocks: list[bytes]) -> None:
    _feed(hashlib.sha256(), blocks)


def _feed(digest: object, blocks: list[bytes]) -> None:
    for block in blocks:
        digest.update(block)  # type: ignore[attr-defined]


def _rate(name: str, function: Callable[[list[bytes]], None], at_once: int) -> tuple[str, str]:
    blocks = [os.urandom(_BLOCK)] * 16
    rates = []
    for _ in range(5):
        started = time.perf_counter()
        with ThreadPoolExecutor(at_once) as pool:
            list(pool.map(function, [blocks] * at_once))
        rates.append(at_once * len(blocks) * _BLOCK / 2**30 / (time.perf_counter() - started))
    return name, f"{median(rates):.2f} ({spread(rates)})"


def loads(bundle: Path, folder: Path) -> str:
    """Each in a process of its own that has imported torch; the bundle is in the page cache."""
    rows = []
    firsts = [_load(bundle, folder / f"state{index}") for index in range(3)]
    rows.append(_row("first load", firsts))
    rows.append(_row("second load", [_load(bundle, folder / "state0") for _ in range(3)]))
    rows.append(_row("load with `rehash`", [_load(bundle, folder / "state0", "rehash") for _ in range(3)]))
    for name, state in (("eight first loads at once, each", "together"), ("eight second loads, each", "together")):
        started = time.perf_counter()
        with ThreadPoolExecutor(8) as pool:
            results = list(pool.map(lambda _, state=state: _load(bundle, folder / state), range(8)))
        rows.append((*_row(name, results), f"{time.perf_counter() - started:.1f} s with their imports"))
    return table(("", "seconds", "bytes hashed", "all eight"), [(*row, "")[:4] for row in rows])


def _load(bundle: Path, state: Path, how: str = "") -> tuple[float, int]:
    command = [sys.executable, "-c", _LOAD, str(bundle), how]
    environment = os.environ | {"XDG_STATE_HOME": str(state), "XDG_CONFIG_HOME": str(state)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    seconds, count = done.stdout.split()
    return float(seconds), int(count)


def _row(name: str, results: list[tuple[float, int]]) -> tuple[str, str, str]:
    seconds = [result[0] for result in results]
    return name, f"{median(seconds):.2f} ({spread(seconds)})", f"{results[0][1] / 1e9:.3f} GB"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--gigabytes", type=float, default=2.0, help="how much the bundle is padded with")
    options = parser.parse_args()
    print(f"{machine()}; {datetime.date.today()}, on a machine shared with others\n")
    print(throughput(), "\n")
    with tempfile.TemporaryDirectory() as name:
        bundle = padded(Path(name), int(options.gigabytes * 1e9))
        time.sleep(SETTLED_NS / 1e9)
        print(loads(bundle, Path(name)))


if __name__ == "__main__":
    main()
