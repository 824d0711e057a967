"""The same spec gives the same bundle, whoever builds it, wherever, with whatever in the cache."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys

from diffkiln.bundle import open_bundle
from tests.conftest import DIGITS


def test_another_process_with_an_empty_cache_in_another_folder_builds_the_same_id(digits_bundle, tmp_path):
    environment = os.environ | {"DIFFKILN_CACHE_DIR": str(tmp_path / "cache"), "TMPDIR": str(tmp_path)}
    command = [
        sys.executable,
        "-m",
        "diffkiln",
        "compile",
        str(DIGITS / "spec.json"),
        "-o",
        str(tmp_path / "again"),
        "--json",
    ]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "cache" / "engines").is_dir()
    with open_bundle(digits_bundle) as first:
        assert json.loads(done.stdout)["id"] == first.id


def test_bundle_names_no_path_and_no_host(digits_bundle):
    paths = [str(DIGITS).encode(), str(digits_bundle.parent).encode()]
    for path in digits_bundle.rglob("*"):
        if path.is_file() and path.name != "build.json":
            data = path.read_bytes()
            assert not any(name in data for name in paths), path
    host = rf"\b{re.escape(os.uname().nodename)}\b"
    for name in ("manifest.json", "spec.json"):
        assert not re.search(host, (digits_bundle / name).read_text())


def test_weights_are_stored_once_and_the_originals_are_gone(digits_bundle):
    with open_bundle(digits_bundle) as bundle:
        rows = [row for rows in bundle.manifest.weights.values() for row in rows]
        sizes = {row.path: row.size for row in bundle.manifest.files}
    stored = sum(row.bytes for row in rows)
    source = sum(file.stat().st_size for file in (DIGITS / "model").rglob("*.safetensors"))
    assert stored <= source * 1.01
    headers = 200 * sum(row.tensors for row in rows)
    assert sum(sizes[row.file] for row in rows) <= stored + headers
    names = b"".join((digits_bundle / row.file).read_bytes() for row in rows if "transformer" in row.file)
    assert b"to_qkv" in names
    assert b"to_q.weight" not in names
