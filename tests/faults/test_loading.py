"""Faults of FAULTS.md while a bundle is loaded that no other test provokes through the whole of `load`."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import diffkiln
from diffkiln.bundle import SIGNATURE, sha256_bytes, sign_bundle, sign_with_key
from diffkiln.errors import DigestMismatch, NativeCodeRefused, SignatureInvalid, SignerRefused
from tests.bundle.keys import Key, make_key


@pytest.fixture
def copy(digits_bundle: Path, tmp_path: Path) -> Path:
    return shutil.copytree(digits_bundle, tmp_path / "copy")


@pytest.fixture
def key(tmp_path: Path) -> Key:
    return make_key(tmp_path, "release")


def rehash(bundle: Path, changed: str) -> None:
    """Write the manifest that goes with a file that was changed, as whoever changed it would."""
    manifest = json.loads((bundle / "manifest.json").read_bytes())
    data = (bundle / changed).read_bytes()
    for row in manifest["files"]:
        if row["path"] == changed:
            row.update(size=len(data), sha256=sha256_bytes(data))
    text = json.dumps(manifest).encode()
    (bundle / "manifest.json").write_bytes(text)
    (bundle / "manifest.sha256").write_text(f"{sha256_bytes(text)}  manifest.json\n")


def policy_of(path: Path, key: Key, require: bool = False) -> Path:
    pinned = {"kind": "key", "name": "release", "sha256": key.fingerprint}
    path.write_text(json.dumps({"policy_version": 1, "require_signature": require, "identities": [pinned]}))
    path.chmod(0o600)
    return path


def sign(bundle: Path, key: Key) -> None:
    sign_bundle(bundle, lambda manifest: sign_with_key(manifest, key.private))


@pytest.fixture
def marked(copy: Path, tmp_path: Path) -> tuple[Path, Path]:
    """A bundle whose engine leaves a marker when it is loaded, with a manifest to match; and the marker."""
    marker = tmp_path / "marker"
    source = tmp_path / "evil.c"
    function = f'static void run(void) {{ open("{marker}", O_CREAT, 0600); }}'
    source.write_text(f"#include <fcntl.h>\n__attribute__((constructor)) {function}\n")
    library = sorted(copy.glob("engines/**/*.so"))[0]
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", str(library), str(source)], check=True)
    rehash(copy, library.relative_to(copy).as_posix())
    return copy, marker


def test_native_code_that_was_put_in_place_of_ours_is_never_run(marked: tuple[Path, Path]) -> None:
    """16, 30: built here by this user, but the id is another one now. With leave the marker shows that it would run."""
    bundle, marker = marked
    with pytest.raises(NativeCodeRefused, match="no receipt"):
        diffkiln.load(bundle)
    assert not marker.exists()
    code = "import sys, diffkiln; diffkiln.load(sys.argv[1], allow_native=True)"
    done = subprocess.run([sys.executable, "-c", code, str(bundle)], capture_output=True, check=False)
    assert done.returncode != 0  # it is no engine
    assert marker.exists()


def test_a_manifest_edited_under_a_signature_is_refused_before_anything_runs(
    marked: tuple[Path, Path], key: Key, tmp_path: Path
) -> None:
    """15: the signature is that of the bundle as it was."""
    bundle, marker = marked
    sign(bundle, key)
    library = sorted(bundle.glob("engines/**/*.so"))[0]
    with library.open("ab") as file:
        file.write(b"\0")
    rehash(bundle, library.relative_to(bundle).as_posix())
    with pytest.raises(SignatureInvalid):
        diffkiln.load(bundle, policy=policy_of(tmp_path / "policy.json", key), allow_native=True)
    assert not marker.exists()


def test_only_the_pinned_identity_opens_native_code(copy: Path, key: Key, tmp_path: Path, monkeypatch: Any) -> None:
    """31"""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "another user"))
    sign(copy, make_key(tmp_path, "other"))
    for require, error in ((False, NativeCodeRefused), (True, SignerRefused)):
        with pytest.raises(
            error, match=rf"signed by key sha256:.*; pinned are 'release' \(key sha256:{key.fingerprint}"
        ):
            diffkiln.load(copy, policy=policy_of(tmp_path / "policy.json", key, require))
    (copy / SIGNATURE).unlink()
    sign(copy, key)
    with diffkiln.load(copy, policy=policy_of(tmp_path / "policy.json", key, True)) as pipe:
        assert pipe.executor.engines


_MEMORY = """
import os, resource, sys, tempfile
import diffkiln, torch
from diffkiln.runtime.loading import load
from pathlib import Path

def left():
    return sum(name.startswith("diffkiln") for name in os.listdir(tempfile.gettempdir()))

load(sys.argv[1]).close()
descriptors = len(os.listdir("/proc/self/fd"))
soft, hard = resource.getrlimit(resource.RLIMIT_AS)
failed = 0
for allowed in (0, 2**18, 2**20, 2**21, 2**22, 2**23, 2**24):
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + allowed, hard))
    try:
        load(sys.argv[1]).close()
    except Exception:
        failed += 1
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
    assert left() == 0
    assert len(os.listdir("/proc/self/fd")) == descriptors
with load(sys.argv[1]) as pipe:
    assert pipe("seven").images
print(failed)
"""


def test_a_load_that_runs_out_of_memory_gives_everything_back(digits_bundle: Path, tmp_path: Path) -> None:
    """38, 39: the address space is limited for real, to a little more than is taken."""
    place = tmp_path / "temporary"
    place.mkdir()
    command = [sys.executable, "-c", _MEMORY, str(digits_bundle)]
    done = subprocess.run(command, env=os.environ | {"TMPDIR": str(place)}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 0


def test_a_bundle_that_is_changed_between_two_loads_is_found_by_the_second(copy: Path, monkeypatch: Any) -> None:
    """14, with the receipt of an earlier load: a bit of the weights is flipped, and the time of the file set back."""
    monkeypatch.setattr("diffkiln.bundle.hashed.SETTLED_NS", -(10**12))
    hashed: list[int] = []
    diffkiln.load(copy, allow_native=True).close()
    diffkiln.load(copy, allow_native=True, progress=hashed.append).close()
    weights = max(copy.glob("weights/*/*"), key=lambda path: path.stat().st_size)
    assert sum(hashed) < weights.stat().st_size
    status = weights.stat()
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    with weights.open("r+b") as file:
        file.write(data)
    os.utime(weights, ns=(status.st_atime_ns, status.st_mtime_ns))
    with pytest.raises(DigestMismatch, match=weights.name):
        diffkiln.load(copy, allow_native=True)
