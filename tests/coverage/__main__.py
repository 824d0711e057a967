"""Measure coverage: `python -m tests.coverage [CLASS …] [--backend NAME] [--missing] [--group NAME]`.

Each class's result is written as soon as it is known, so that a run may be interrupted and several may share the work;
with `--missing` only those without a result are measured. Writes docs/coverage.md from all results at the end.
"""

from __future__ import annotations

import argparse
import os
import time
import warnings
from pathlib import Path

from diffkiln.exporters.cache import EngineCache
from diffkiln.record.quiet import quiet_libraries
from tests.coverage import CASES, GROUPS
from tests.coverage.measure import BACKENDS, measure, read, write
from tests.coverage.table import DOCUMENT, document


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.coverage")
    parser.add_argument("classes", nargs="*", metavar="CLASS")
    parser.add_argument("--backend", action="append", choices=BACKENDS, help="all by default")
    parser.add_argument("--group", choices=GROUPS)
    parser.add_argument("--missing", action="store_true", help="only what has no result yet")
    given = parser.parse_args()
    backends = tuple(given.backend or BACKENDS)
    cache = EngineCache(Path(os.environ["DIFFKILN_TEST_CACHE"])) if "DIFFKILN_TEST_CACHE" in os.environ else None
    for name in given.classes or CASES:
        case = CASES[name]
        wanted = [key for key in backends if not given.missing or key not in read(name).get("backends", {})]
        if not wanted or given.group not in (None, case.group):
            continue
        begun = time.perf_counter()
        with warnings.catch_warnings(), quiet_libraries():
            warnings.simplefilter("ignore")
            result = measure(case, tuple(wanted), cache)
        write(name, result)
        said = {key: found.get("failure", found.get("difference")) for key, found in result["backends"].items()}
        print(f"{name}: {time.perf_counter() - begun:.0f} s, {said}", flush=True)
    DOCUMENT.write_text(document())


if __name__ == "__main__":
    main()
