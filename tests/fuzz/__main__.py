"""Fuzz for a while: `python -m tests.fuzz [--seconds 600] [NAME…]`. Needs the extra `fuzz` (atheris).

The seconds are shared out among the harnesses, which run one after another. What libFuzzer adds to the corpus and what
makes a harness fail goes to build/fuzz; with `--keep`, the smallest of the former are added to tests/fuzz/corpus.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path

from tests.fuzz.harnesses import CORPUS, HARNESSES

BUILD = Path("build", "fuzz")
#: Kept inputs are read by everyone who clones the repository.
MAX_KEPT, MAX_BYTES = 12, 4096


def fuzz(name: str, seconds: int) -> bool:
    """Run one harness; whether nothing was found."""
    grown = BUILD / "corpus" / name
    found = BUILD / "found" / name
    grown.mkdir(parents=True, exist_ok=True)
    found.mkdir(parents=True, exist_ok=True)
    flags = [f"-max_total_time={seconds}", f"-artifact_prefix={found}/", "-timeout=20", "-rss_limit_mb=4096"]
    command = [sys.executable, "-m", "tests.fuzz.target", name, str(grown), str(CORPUS / name), *flags]
    environment = os.environ | {"XDG_STATE_HOME": str(BUILD.resolve() / "state"), "OMP_NUM_THREADS": "1"}
    return subprocess.run([*command, "-max_len=20000"], env=environment, check=False).returncode == 0


def keep(name: str) -> None:
    """Add the smallest of what libFuzzer wrote down, each of which reached what none before it did, to the corpus."""
    grown = sorted((BUILD / "corpus" / name).iterdir(), key=lambda entry: (entry.stat().st_size, entry.name))
    for entry in grown[:MAX_KEPT]:
        if entry.stat().st_size <= MAX_BYTES:
            shutil.copy(entry, CORPUS / name / entry.name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", choices=[*HARNESSES, []], help="harnesses; all by default")
    parser.add_argument("--seconds", type=int, default=600, help="for all of them together")
    parser.add_argument("--keep", action="store_true", help="add to the corpus what reaches more")
    given = parser.parse_args()
    names = given.names or list(HARNESSES)
    failed = [name for name in names if not fuzz(name, max(given.seconds // len(names), 1))]
    for name in names if given.keep else ():
        keep(name)
    if failed:
        sys.exit(f"findings in {', '.join(failed)}: see {BUILD / 'found'}")


if __name__ == "__main__":
    main()
