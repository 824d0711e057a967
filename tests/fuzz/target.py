"""One harness under atheris: `python -m tests.fuzz.target NAME`, and then what libFuzzer takes (directories, flags)."""

from __future__ import annotations

import sys

import atheris

with atheris.instrument_imports(include=["diffkiln"]):
    from tests.fuzz.harnesses import HARNESSES


def main() -> None:
    harness = HARNESSES[sys.argv.pop(1)]

    def mutator(data: bytes, max_size: int, seed: int) -> bytes:
        # One change in four is libFuzzer's own, which knows nothing of form and so tries the parsers.
        changed = atheris.Mutate(data, max_size) if seed % 4 == 0 else harness.mutate(data, seed)
        return changed[:max_size]

    atheris.Setup(sys.argv, harness.run, custom_mutator=mutator)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
