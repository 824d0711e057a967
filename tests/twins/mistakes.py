"""Makes mistakes in a twin on purpose: `python -m tests.twins.mistakes FOLDER`. Prints a line of JSON for each.

Each is one change of the C++ or of one kernel, as a fault of Inductor's, of Triton's or of ours would be.
"""

from __future__ import annotations

from tests.twins import interpreting  # noqa: F401  isort: skip  (Triton must know first)

import json
import pickle
import re
import shutil
import sys
from dataclasses import replace
from pathlib import Path

from diffkiln.errors import VerifyError
from tests.twins.building import library
from tests.twins.memory import Fault
from tests.twins.mistaken import MISTAKES, Mistake
from tests.twins.running import Twin, run
from tests.twins.written import Written


def make(mistake: Mistake, folder: Path, place: Path) -> None:
    """Writes a twin with a mistake: its library in `place`/engine, its kernels in `place`/kernels."""
    kernels = Path(shutil.copytree(folder / "kernels", place / "kernels"))
    if mistake.kernel:
        shutil.copytree(folder / "engine", place / "engine")
        (file,) = kernels.glob(f"*{mistake.kernel}*.py")
        file.write_text(_changed(mistake, file.read_text()))
        return
    written: Written = pickle.loads((folder / "case.pickle").read_bytes())
    sources = pickle.loads((folder / "twin.pickle").read_bytes())
    model = _changed(mistake, sources.model)
    library(replace(sources, model=model), [Path(name) for name in written.objects], written.flags, place)


def _changed(mistake: Mistake, text: str) -> str:
    # The C++ begins with the kernels' sources as comments, which nobody runs.
    text, count = re.subn(mistake.pattern, mistake.text, text, count=1)
    assert count == 1, f"there is no {mistake.pattern}"
    return text


def main(folder: Path) -> None:
    written: Written = pickle.loads((folder / "case.pickle").read_bytes())
    for number, (name, mistake) in enumerate(MISTAKES.items()):
        place = folder / f"mistake-{number}"
        make(mistake, folder, place)
        message = ""
        try:
            run(Twin(place, written), written, 0)
        except (Fault, VerifyError) as fault:
            message = str(fault)
        print(json.dumps({"mistake": name, "found": message}), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
