"""`diffkiln tune` on the digits pipeline, beside the best schedules that were written by hand.

    python benchmarks/tuning.py [--trials 12]

The trials are measured one after the other, so the tuned bundle and those by hand are measured once more, in turn.
Prints Markdown tables.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from images import draw
from measuring import DIGITS, machine, table

sys.path.insert(0, str(DIGITS))

#: The schedules of results/schedules.md that keep 40 dB.
BY_HAND: dict[str, dict[str, Any] | None] = {
    "none": None,
    "TaylorSeer of outputs, order 1, interval 2": {"interval": 2, "order": 1},
    "TaylorSeer of outputs, order 2, interval 2": {"interval": 2, "order": 2},
    "TaylorSeer of blocks, order 1, interval 2": {"interval": 2, "order": 1, "keep": "blocks"},
}


def by_hand(tuning: Any, schedule: dict[str, Any] | None) -> dict[str, Any]:
    """The tuned spec with fused QKV and a schedule in the place of its choices."""
    passes = [{"name": "fuse_qkv", "component": "transformer"}]
    if schedule:
        passes.append({"name": "cache_schedule", "component": "transformer", "method": "taylorseer", **schedule})
    return {**tuning.data, "passes": [*passes, {"name": "compile", "component": "transformer"}]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=12)
    options = parser.parse_args()
    described = machine()

    import classifier

    import diffkiln
    from diffkiln.evaluate.bench import Rounds
    from diffkiln.evaluate.tune import tune
    from diffkiln.evaluate.tuned import ended, shown
    from diffkiln.spec.tuning import read_tuning

    wanted = classifier.requests(100)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shutil.copytree(DIGITS / "tune", folder / "tune")
        (folder / "model").symlink_to(DIGITS / "model")
        spec = folder / "tune" / "spec.json"
        tuned = tune(spec, folder / "study", trials=options.trials, progress=lambda text: print(text, file=sys.stderr))
        names = tuned.goal.measures

        def row(words: str, trial: Any, end: str) -> tuple[str, ...]:
            return words, *(shown(trial, name) for name in names), end

        rows = [row(tuned.in_words(trial).replace("|", ""), trial, ended(tuned, trial)) for trial in tuned.trials]
        rows = [(str(number), *cells) for number, cells in enumerate(rows, 1)]
        built = diffkiln.compile(tuned.path, folder / "tuned")
        again, tuning = {"tuned": "the tuned spec"}, read_tuning(spec)
        for number, (words, schedule) in enumerate(BY_HAND.items(), 1):
            plain = {key: value for key, value in by_hand(tuning, schedule).items() if key != "quality"}
            diffkiln.compile(plain, folder / f"hand{number}", base=spec.parent)
            again[f"hand{number}"] = f"by hand: {words}"
        others = [str(folder / name) for name in again if name != "tuned"]
        turns = diffkiln.bench(built.path, others, rounds=Rounds(0, 5, 40)).ways
        with diffkiln.load(built.path) as pipe:
            images, _ = draw(pipe, wanted)
        score = classifier.score(images, [request.digit for request in wanted])
    print("# Tuning the digits pipeline\n")
    print(described + "\n")
    print(
        f"`diffkiln tune examples/digits/tune/spec.json -o tuning --trials {options.trials}`: {len(tuned.trials)} of "
        f"{tuned.combinations} combinations, the lowest latency with a PSNR of at least 40 dB on ten prompts and at "
        f"most 2 GB of memory. The tuned spec draws {score:.2f} of 100 digits as asked. Latency in ms, memory "
        "and bytes in MB.\n"
    )
    print(table(("trial", "chosen", *names, "ended"), rows))
    print("\nThe same, and the schedules that were written by hand, in turn: 40 calls each, in ms.\n")
    spreads = {words: way.seconds["call"] for words, way in zip(again.values(), turns, strict=True)}
    calls = [
        (words, *(f"{value * 1e3:.2f}" for value in (found.median, found.lowest)))
        for words, found in spreads.items()
        if found
    ]
    print(table(("bundle", "median", "lowest"), calls))
    print("\nOn a GPU: not measured.")


if __name__ == "__main__":
    main()
