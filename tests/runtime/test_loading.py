"""Loading: the order of the gates, what is left behind, and several processes at once."""

from __future__ import annotations

import ast
import json
import logging
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

import diffkiln
from diffkiln.bundle import dump_manifest, open_bundle, sha256_bytes
from diffkiln.errors import DigestMismatch, Incompatible, NativeCodeRefused, VerifyError
from diffkiln.runtime import compatibility, loading, opening

ROOT = Path(loading.__file__).parents[1]


def temporary(path):
    return [item.name for item in path.iterdir() if item.name.startswith("diffkiln")]


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """Where temporary files go, so that what is left can be seen."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


@pytest.fixture
def copy(digits_bundle, tmp_path):
    return shutil.copytree(digits_bundle, tmp_path / "copy")


def damage(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("pattern", ["weights/*/*", "engines/**/*.so", "programs/*.json", "text/*", "spec.json"])
def test_one_flipped_bit_in_a_file_of_any_role_is_found_first(copy, pattern, monkeypatch, elsewhere):
    path = sorted(copy.glob(pattern))[0]
    damage(path)
    monkeypatch.setattr(compatibility.torch, "__version__", "1.0")  # which would be found later
    with pytest.raises(DigestMismatch, match=path.name):
        diffkiln.load(copy)
    assert temporary(elsewhere) == []


def test_the_machine_is_checked_before_native_code_is_asked_for(copy, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "other"))
    monkeypatch.setattr(compatibility, "_cpu_flags", lambda: frozenset())
    with pytest.raises(Incompatible, match="cpu_isa"):
        diffkiln.load(copy)


def test_a_device_that_the_engines_are_not_for_is_refused(digits_bundle):
    with pytest.raises(Incompatible, match="device: found cuda, required cpu"):
        diffkiln.load(digits_bundle, device="cuda")


def test_native_code_of_others_is_refused_and_never_opened(copy, monkeypatch, tmp_path, elsewhere):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "other"))
    monkeypatch.setattr(opening, "engine_class", lambda _: pytest.fail("native code was reached"))
    with pytest.raises(NativeCodeRefused, match="allow_native"):
        diffkiln.load(copy)
    assert temporary(elsewhere) == []


def test_a_failed_self_test_leaves_nothing_behind(digits_bundle, monkeypatch, elsewhere):
    def fail(*_):
        raise VerifyError("differs")

    monkeypatch.setattr(opening, "self_test", fail)
    with pytest.raises(VerifyError):
        diffkiln.load(digits_bundle, check_engines=True)
    assert temporary(elsewhere) == []


@pytest.fixture
def stranger(monkeypatch, tmp_path):
    """A user without any receipt."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "stranger"))


@pytest.fixture
def tried(monkeypatch):
    """The engines that were compared with their replay."""
    paths = []
    monkeypatch.setattr(opening, "self_test", lambda *arguments: paths.append(arguments[-1]))
    return paths


@pytest.mark.usefixtures("stranger")
def test_engines_are_tried_at_the_first_load_alone(digits_bundle, tried):
    diffkiln.load(digits_bundle, allow_native=True).close()
    first = list(tried)
    assert len(first) == 2
    diffkiln.load(digits_bundle, allow_native=True).close()
    assert tried == first
    diffkiln.load(digits_bundle, allow_native=True, check_engines=True).close()
    assert tried == first * 2


@pytest.mark.usefixtures("stranger")
def test_an_engine_that_failed_is_tried_again_at_the_next_load(digits_bundle, monkeypatch):
    def fail(*_):
        raise VerifyError("differs")

    monkeypatch.setattr(opening, "self_test", fail)
    for _ in range(2):
        with pytest.raises(VerifyError):
            diffkiln.load(digits_bundle, allow_native=True)


def test_native_code_is_not_reached_before_all_weights_are_hashed(copy, monkeypatch):
    """Those that no program reads come last."""
    path = next(copy.glob("weights/vae/*unused*"))
    damage(path)
    monkeypatch.setattr(opening, "engine_class", lambda _: pytest.fail("native code was reached"))
    with pytest.raises(DigestMismatch, match=path.name):
        diffkiln.load(copy)


def test_a_wrong_digest_is_told_rather_than_what_fails_beside_the_hashing(copy, monkeypatch):
    damage(sorted(copy.glob("weights/*/*"))[0])

    def fail(_):
        raise Incompatible("no such kernel")

    monkeypatch.setattr(loading, "kernels_of", fail)
    with pytest.raises(DigestMismatch):
        diffkiln.load(copy)


def test_progress_counts_every_byte_that_is_hashed_once(copy):
    counts = []
    diffkiln.load(copy, progress=counts.append).close()
    with open_bundle(copy) as bundle:
        assert sum(counts) == sum(row.size for row in bundle.files)


def test_closing_leaves_nothing_behind(digits_bundle, elsewhere):
    with diffkiln.load(digits_bundle) as pipe:
        assert pipe("seven").images
        assert temporary(elsewhere)
    assert temporary(elsewhere) == []


def rewritten(copy: Path, change) -> Path:
    """The bundle with a manifest that was changed and hashed again, as its owner could."""
    with open_bundle(copy) as bundle:
        data = dump_manifest(change(bundle.manifest))
    (copy / "manifest.json").write_bytes(data)
    (copy / "manifest.sha256").write_text(f"{sha256_bytes(data)}  manifest.json\n")
    return copy


def allow_eager(manifest):
    return manifest.model_copy(update={"runtime": dict(manifest.runtime) | {"on_incompatible": "eager"}})


def test_eager_where_the_spec_allows_it_replays_and_says_so(copy, digits_bundle, monkeypatch, caplog):
    eager = rewritten(copy, allow_eager)
    with diffkiln.load(digits_bundle) as pipe:
        want = pipe("seven", generator=torch.Generator().manual_seed(1), output_type="pt").images
    monkeypatch.setattr(compatibility, "_cpu_flags", lambda: frozenset())
    with caplog.at_level(logging.WARNING, "diffkiln"), diffkiln.load(eager) as pipe:
        got = pipe("seven", generator=torch.Generator().manual_seed(1), output_type="pt").images
        assert pipe.executor.engines == {}
    assert "running without engines" in caplog.text
    torch.testing.assert_close(got, want, atol=1 / 255, rtol=0)


def test_changed_operator_schemas_are_refused(digits_bundle, monkeypatch):
    read = loading.read_json

    def changed(verified, path):
        data = read(verified, path)
        if path == loading.SCHEMAS:
            data["aten.add.Tensor"] = "aten::add.Tensor(Tensor a) -> Tensor"
        return data

    monkeypatch.setattr(loading, "read_json", changed)
    with pytest.raises(Incompatible, match=r"aten\.add\.Tensor: found .* required aten::add\.Tensor\(Tensor a\)"):
        diffkiln.load(digits_bundle)


def test_eight_processes_load_at_once(digits_bundle):
    code = "import sys, diffkiln\nwith diffkiln.load(sys.argv[1]) as pipe: print(len(pipe.executor.engines))"
    running = [
        subprocess.Popen([sys.executable, "-c", code, str(digits_bundle)], stdout=subprocess.PIPE, text=True)
        for _ in range(8)
    ]
    assert [process.communicate(timeout=300)[0].strip() for process in running] == ["2"] * 8


def test_native_code_is_loaded_in_one_place_only():
    """Files are handed out by `native_copy` to `_open` alone, and torch's loaders stand in one file."""
    calls: dict[str, set[str]] = {}
    for path in ROOT.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute):
                calls.setdefault(node.attr, set()).add(path.relative_to(ROOT).as_posix())
    assert calls["native_copy"] == {"runtime/opening.py"}
    assert calls["AOTIModelPackageLoader"] == {"runtime/engines/aot_inductor.py"}
    assert {path for path in calls["CDLL"] if path.startswith("runtime/")} == calls["AOTIModelPackageLoader"]
    assert calls["AOTIModelPackageLoader"] <= calls["RTLD_NOLOAD"], "what torch has loaded is asked for, nothing else"
    for name in ("load_library", "aoti_load_package"):
        assert not any(path.startswith("runtime/") for path in calls.get(name, ()))


def test_the_runtime_never_unpickles():
    for path in (ROOT / "runtime").rglob("*.py"):
        words = path.read_text()
        assert not re.search(r"\bimport \w*pickle|\bpickle\.|Unpickler|allow_pickle=True", words), path
        assert "torch.load(" not in words, path
        assert "trust_remote_code" not in words, path


def test_manifest_of_the_bundle_is_canonical(digits_bundle):
    data = (digits_bundle / "manifest.json").read_bytes()
    with open_bundle(digits_bundle) as bundle:
        assert dump_manifest(bundle.manifest) == data
    assert json.loads(data)["format"]["major"] == 1
