"""Golden files: one for each thing that is guarded."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

GOLDEN = Path(__file__).parent / "golden"


def same(name: str, told: Any) -> None:
    """Asserts that `told`, a text or a value of JSON, is what `golden/<name>` says.

    DIFFKILN_UPDATE_GOLDEN=1 writes the file anew; read the difference before you commit it.
    """
    text = told if isinstance(told, str) else json.dumps(told, indent=1, ensure_ascii=False) + "\n"
    file = GOLDEN / name
    if os.environ.get("DIFFKILN_UPDATE_GOLDEN"):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    assert text == file.read_text()
