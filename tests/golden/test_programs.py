"""The digits pipeline's call as a listing, against what it was: a person can read the difference.

DIFFKILN_UPDATE_GOLDEN=1 writes the file anew.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from diffkiln.cli import main

HERE = Path(__file__).parent


def test_listing_of_the_digits_call(digits_bundle, capsys):
    assert main(["inspect", str(digits_bundle), "--program", "32x32-8-steps"]) == 0
    text = re.sub(r"#[0-9a-f]{12}", "#constant", capsys.readouterr().out)  # digests of numbers that libraries compute
    text = re.sub(r"(timestep=\d+)\.\d+", r"\1", text)
    file = HERE / "digits-call.txt"
    if os.environ.get("DIFFKILN_UPDATE_GOLDEN"):
        file.write_text(text)
    assert text == file.read_text()
