"""Measure coverage: `python -m tests.coverage [NAME …] [--backend NAME] [--group NAME] [--missing] [--page]`.

Names are of classes, and of pipelines, for their calls and compiled. Each result is written as soon as it is known, so
that a run may be interrupted and several may share the work; with `--missing` only what has no result is measured, with
`--page` nothing. Writes docs/coverage.md from all results at the end.
"""

from __future__ import annotations

import argparse
import os
import time
import warnings
from pathlib import Path
from typing import Any

from diffkiln.exporters.cache import EngineCache
from diffkiln.interpreter.quiet import quiet_libraries
from tests.coverage import CASES, GROUPS
from tests.coverage.calls import CALLS
from tests.coverage.calls.compiled import COMPILED, measure_compiled, path_of, write_compiled
from tests.coverage.calls.measure import measure_call, write_call
from tests.coverage.measure import BACKENDS, RESULTS, measure, read, write
from tests.coverage.table import DOCUMENT, document


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.coverage")
    parser.add_argument("names", nargs="*", metavar="NAME")
    parser.add_argument("--backend", action="append", choices=BACKENDS, help="all by default")
    parser.add_argument("--group", choices=[*GROUPS, "calls", "compiled"])
    parser.add_argument("--missing", action="store_true", help="only what has no result yet")
    parser.add_argument("--page", action="store_true", help="only write the page")
    given = parser.parse_args()
    wanted = [name for name in [*CASES, *CALLS] if not given.page and (not given.names or name in given.names)]
    for name in wanted:
        if given.group in (None, CASES[name].group if name in CASES else "calls"):
            begun = time.perf_counter()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                told = _class(name, given) if name in CASES else _call(name, given)
            if told:
                print(f"{name}: {time.perf_counter() - begun:.0f} s, {told}", flush=True)
    for name in COMPILED if given.group in (None, "compiled") and not given.page else ():
        if (given.names and name not in given.names) or (given.missing and path_of(name).exists()):
            continue
        write_compiled(name, result := measure_compiled(name, _cache()))
        print(f"{name}, compiled: {result.get('failure', result.get('difference'))}", flush=True)
    DOCUMENT.write_text(document(), encoding="utf-8")


def _cache() -> EngineCache | None:
    return EngineCache(Path(os.environ["DIFFKILN_TEST_CACHE"])) if "DIFFKILN_TEST_CACHE" in os.environ else None


def _class(name: str, given: argparse.Namespace) -> Any:
    """Measure a class; gives what to tell, or nothing if it is known already."""
    known = read(name) if given.missing else {}
    backends = tuple(key for key in given.backend or BACKENDS if key not in known.get("backends", {}))
    if not backends:
        return None
    with quiet_libraries():
        result = measure(CASES[name], backends, _cache(), known)
    write(name, result)
    return {key: found.get("failure", found.get("difference")) for key, found in result["backends"].items()}


def _call(name: str, given: argparse.Namespace) -> Any:
    if given.missing and (RESULTS / "calls" / f"{name}.json").exists():
        return None
    write_call(name, result := measure_call(name))
    return result.get("refused") or result.get("diffusers", "a program")


if __name__ == "__main__":
    main()
