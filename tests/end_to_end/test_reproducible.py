"""The same spec gives the same bundle, whoever builds it, wherever, with whatever in the cache."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import torch

from diffkiln.bundle import open_bundle
from tests.conftest import DIGITS
from tests.portable import disguises


def _strangers_environment(room: Path) -> dict[str, str]:
    """Another user's: name, home and its directories, caches, time zone, locale, order of hashing; and another CPU."""
    places = {
        name: str(room / name.lower())
        for name in ("HOME", "TMPDIR", "DIFFKILN_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR", "HF_HOME")
    }
    places |= {
        f"XDG_{name}_HOME": f"{room}/home/.{name.lower()}" for name in ("CACHE", "CONFIG", "DATA", "STATE", "RUNTIME")
    }
    for path in places.values():
        Path(path).mkdir(parents=True, exist_ok=True)
    return (
        os.environ
        | places
        | disguises()["avx2"]
        | {
            "USER": "stranger",
            "LOGNAME": "stranger",
            "USERNAME": "stranger",
            "HOSTNAME": "elsewhere",
            "TZ": "Asia/Kathmandu",
            "LC_ALL": "C",
            "LANG": "C",
            "PYTHONHASHSEED": "4711",
            "SOURCE_DATE_EPOCH": "1",
        }
    )


def test_another_user_on_another_cpu_in_another_folder_with_an_empty_cache_builds_the_same_id(digits_bundle, tmp_path):
    source = shutil.copytree(DIGITS, tmp_path / "another" / "place", ignore=shutil.ignore_patterns("*.py"))
    command = [sys.executable, "-m", "diffkiln", "compile", str(source / "spec.json"), "-o", "again", "--json"]
    environment = _strangers_environment(tmp_path)
    done = subprocess.run(
        command, env=environment, cwd=source.parent, umask=0o077, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "diffkiln_cache_dir" / "engines").is_dir()
    with open_bundle(digits_bundle) as first, open_bundle(source.parent / "again") as again:
        assert again.manifest == first.manifest  # what differs, if anything does
        assert json.loads(done.stdout)["id"] == again.id == first.id
    for path in (source.parent / "again").rglob("*"):
        if path.is_file() and path.name != "build.json":
            data = path.read_bytes()
            assert b"stranger" not in data, path
            assert str(tmp_path).encode() not in data, path


def test_requirements_name_the_versions_that_decide_whether_the_bundle_runs(digits_bundle, digits_int8_bundle):
    major, minor = torch.__version__.split(".")[:2]
    for path in (digits_bundle, digits_int8_bundle):
        with open_bundle(path) as bundle:
            requires = bundle.manifest.requires
        assert (requires.python, requires.torch) == (">=3.11", f"=={major}.{minor}.*")
        assert (requires.os, requires.machine, requires.cpu_isa) == ("linux", "x86_64", "x86-64-v3")
        assert requires.glibc is not None
        assert re.fullmatch(
            r"2\.\d+", requires.glibc
        )  # the symbols that the engines ask for, not the builder's library
        assert requires.packages == {}  # int8 weights are replayed without torchao


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
