"""Builds bundles and prints their ids as JSON; run by tests in processes of their own."""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path

import diffkiln
from diffkiln.interpreter.quiet import quiet_libraries


def main() -> None:
    warnings.simplefilter("ignore")
    job = json.loads(sys.argv[1])
    with quiet_libraries():
        ids = {name: diffkiln.compile(spec, Path(job["out"]) / name).id for name, spec in job["specs"].items()}
    print(json.dumps(ids))


if __name__ == "__main__":
    main()
