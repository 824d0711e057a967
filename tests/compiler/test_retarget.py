"""A bundle's targets, one more, one fewer: weights stay as they are, and what fits each machine is used."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import diffkiln
from diffkiln.bundle import PARTIAL, dump_partial, has_receipt, open_bundle
from diffkiln.cli import main
from diffkiln.compiler.dry_run import dry_run
from diffkiln.compiler.packing import editing
from diffkiln.compiler.packing.targets import groups_of
from diffkiln.errors import BuildError, ExportError, Incompatible, NativeCodeRefused, VerifyError
from diffkiln.exporters import cache
from diffkiln.exporters.cache import EngineCache, engine_key
from diffkiln.program import Module, Program
from diffkiln.record.pipeline import Recording
from diffkiln.runtime import compatibility
from tests.bundle.making import left_beside, make_for
from tests.conftest import DIGITS
from tests.exporters.regions import CPU, Writer, engine_cache
from tests.pipelines import WARNING_FILTERS
from tests.runtime.test_targets import flags_of

pytestmark = [pytest.mark.filterwarnings(text) for text in WARNING_FILTERS]

V2, V3, V4 = "cpu-x86-64-v2", "cpu-x86-64-v3", "cpu-x86-64-v4"


def borrow(patch: pytest.MonkeyPatch) -> None:
    """Have the engines for v3, which v4 includes, serve as those for v4: real ones take a minute to build."""

    def key(backend, version, lowering, tools):
        borrowed = lowering.target.name == V4
        return engine_key(backend, version, replace(lowering, target=CPU) if borrowed else lowering, tools)

    patch.setattr(cache, "engine_key", key)
    patch.setattr(torch.cpu, "_is_avx512_supported", lambda: True)


@pytest.fixture
def borrowed(monkeypatch: pytest.MonkeyPatch) -> None:
    borrow(monkeypatch)


@pytest.fixture(scope="session")
def three(digits_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The digits example for three levels. The engines for v2 are built here."""
    path = shutil.copytree(digits_bundle, tmp_path_factory.mktemp("three") / "bundle")
    with pytest.MonkeyPatch.context() as patch:
        borrow(patch)
        for target in (V2, V4):
            diffkiln.add_target(path, target, cache=engine_cache())
    return path


@pytest.fixture
def one(digits_bundle: Path, tmp_path: Path) -> Path:
    """A copy of the digits example, for v3 alone."""
    (tmp_path / "here").mkdir()
    return shutil.copytree(digits_bundle, tmp_path / "here" / "bundle")


def weights(bundle: Path) -> dict[str, tuple[int, int, bytes]]:
    """Of each file: inode, time of its last change, content."""
    files = sorted((bundle / "weights").rglob("*.safetensors"))
    return {f.name + f.parent.name: (f.stat().st_ino, f.stat().st_mtime_ns, f.read_bytes()) for f in files}


@pytest.mark.more
def test_one_by_one_gives_the_id_of_all_at_once_and_leaves_the_weights(one: Path, tmp_path: Path, borrowed) -> None:
    before, (old,) = weights(one), {open_bundle(one).id}
    added = diffkiln.add_target(one, V4, cache=engine_cache())
    assert weights(one) == before
    assert has_receipt(added.id)
    assert any(old in notice and "new id" in notice for notice in added.notices)
    spec = json.loads((DIGITS / "spec.json").read_text())
    spec["target"] = [spec["target"], {"device": "cpu", "isa": "x86-64-v4"}]
    at_once = diffkiln.compile(spec, tmp_path / "at-once", base=DIGITS, cache=engine_cache())
    assert at_once.id == added.id
    stripped = diffkiln.strip(one, V4)
    assert stripped.id == old
    assert weights(one) == before
    assert left_beside(one) == []
    edits = json.loads((one / "build.json").read_text())["edits"]
    assert [edit["what"] for edit in edits] == [f"engines for {V4} added", f"engines for {V4} removed"]


def test_three_targets_hold_the_weights_once(three: Path, digits_bundle: Path) -> None:
    with open_bundle(three) as bundle, bundle.verify(), open_bundle(digits_bundle) as first:
        assert bundle.targets == (V3, V2, V4)
        assert bundle.manifest.weights == first.manifest.weights
        assert bundle.manifest.requires.cpu_isa == "x86-64-v2"
        assert bundle.manifest.runtime["targets"] == {name: name.removeprefix("cpu-") for name in (V2, V3, V4)}
        rows = [{row.path: row.sha256 for row in b.manifest.files if row.role == "weights"} for b in (bundle, first)]
    assert rows[0] == rows[1]
    assert [entry["isa"] for entry in json.loads((three / "spec.json").read_text())["target"]] == [
        "x86-64-v3",
        "x86-64-v2",
        "x86-64-v4",
    ]


def test_each_machine_draws_with_the_engines_of_its_level(three: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from diffkiln.bundle import Verified

    opened: list[str] = []
    copies = Verified.native_copy
    monkeypatch.setattr(Verified, "native_copy", lambda self, path: (opened.append(path), copies(self, path))[1])
    images = []
    for level in ("x86-64-v2", "x86-64-v3"):
        monkeypatch.setattr(compatibility, "_cpu_flags", lambda level=level: flags_of(level))
        with diffkiln.load(three) as pipe:
            images.append(pipe("seven", generator=torch.Generator().manual_seed(7), output_type="pt").images)
        assert opened
        assert all(path.startswith(f"engines/cpu-{level}/") for path in opened)
        opened.clear()
    torch.testing.assert_close(*images, atol=1e-3, rtol=0)


def test_inspect_says_which_target_is_used_here_and_why(three: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(compatibility, "_cpu_flags", lambda: flags_of("x86-64-v3"))
    assert main(["inspect", str(three)]) == 0
    told = capsys.readouterr().out
    told = " ".join(told.split())  # as it stands before it is wrapped
    assert f"{V3} is used here: its x86-64-v3 is this CPU's own level" in told
    assert f"{V2} is not used here: fits too" in told
    assert f"{V4} is not used here: cpu_isa: found a CPU without avx512bw" in told
    monkeypatch.setattr(compatibility, "_cpu_flags", lambda: frozenset())
    assert main(["inspect", str(three), "--json"]) == 0
    choice = json.loads(capsys.readouterr().out)["choice"]
    assert choice["target"] is None
    assert all(f"target {name}:" in choice["why"] for name in (V2, V3, V4))


def test_commands_add_and_strip_in_place_and_elsewhere(one: Path, borrowed, monkeypatch, capsys) -> None:
    monkeypatch.setenv("DIFFKILN_CACHE_DIR", str(engine_cache().root))
    other = one.parent / "other"
    assert main(["compile", "--add-target", V4, str(one), "-o", str(other)]) == 0
    with open_bundle(other) as bundle, bundle.verify():
        assert bundle.targets == (V3, V4)
        assert capsys.readouterr().out.strip() == f"{other}  {bundle.id}"
    assert main(["strip", str(other), "--target", V3, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    with open_bundle(other) as bundle, bundle.verify():
        assert bundle.targets == (V4,)
        assert told["id"] == bundle.id
        assert bundle.manifest.requires.cpu_isa == "x86-64-v4"
    assert main(["strip", str(other), "--target", V4, "-o", str(one)]) == 2
    assert "pass --force" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["compile", "--add-target", "cpu-x86-64-v5"], 2, "there is no target 'cpu-x86-64-v5'. Did you mean"),
        (["compile", "--add-target", V3], 2, f"engines for {V3} already. It has them for {V3}"),
        (["compile", "--add-target", "nvidia-l4"], 3, "nvidia-l4: its device is cuda, and the bundle runs on cpu"),
        (["strip", "--target", V2], 2, f"no engines for '{V2}'. It has them for {V3}"),
        (["strip", "--target", V3], 2, "Keep one target"),
        (["retune"], 3, "engines for a CPU are not tuned"),
        (["compile"], 2, "--output"),
    ],
)
def test_what_cannot_be_done_is_said_and_the_bundle_stays(one: Path, capsys, arguments, code, words) -> None:
    before = open_bundle(one).id
    assert main([*arguments, str(one)]) == code
    error = capsys.readouterr().err
    assert words in error
    assert "Traceback" not in error
    assert open_bundle(one).id == before
    assert left_beside(one) == []


def test_a_bundle_that_was_pulled_in_part_is_refused(three: Path, tmp_path: Path) -> None:
    part = shutil.copytree(three, tmp_path / "part")
    shutil.rmtree(part / "engines" / V4)
    (part / PARTIAL).write_bytes(dump_partial([V2, V3]))
    with pytest.raises(diffkiln.errors.SpecError, match="Pull it again with --all-targets"):
        diffkiln.strip(part, V2)


def test_a_bundle_without_engines_has_no_targets(tmp_path: Path) -> None:
    make_for(tmp_path / "bundle", ())
    with pytest.raises(diffkiln.errors.SpecError, match="add `compile` to its spec"):
        diffkiln.add_target(tmp_path / "bundle", V4)
    assert main(["inspect", str(tmp_path / "bundle")]) == 0


def test_native_code_of_others_gets_no_receipt_by_being_kept(three: Path, tmp_path: Path, monkeypatch) -> None:
    theirs = shutil.copytree(three, tmp_path / "theirs")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "other"))
    built = diffkiln.strip(theirs, V4)
    assert not has_receipt(built.id)
    assert any("no receipt" in notice for notice in built.notices)
    with pytest.raises(NativeCodeRefused):
        diffkiln.load(theirs)


def test_too_little_disk_and_another_torch_are_found_before_the_compile(one: Path, monkeypatch, borrowed) -> None:
    monkeypatch.setattr(editing.EnginesPacker, "family", lambda *_: pytest.fail("the compile began"))
    with monkeypatch.context() as patch:
        patch.setattr("diffkiln.bundle.writer.free_bytes", lambda _: 1000)
        with pytest.raises(BuildError, match=r"bytes are needed and 1000 are free"):
            diffkiln.add_target(one, V4)
    monkeypatch.setattr(compatibility.torch, "__version__", "2.99.0")
    with pytest.raises(Incompatible, match=r"torch: found 2\.99\.0"):
        diffkiln.add_target(one, V4)


def test_neither_diffusers_nor_the_source_is_needed(one: Path) -> None:
    code = """
import sys
for name in ("diffusers", "transformers", "accelerate", "torchao"):
    sys.modules[name] = None
from diffkiln.compiler.packing import editing
from diffkiln.compiler.packed import Packed
def built(*_):
    print("compiles")
    return Packed()
editing.EnginesPacker.family = built
import diffkiln
try:
    diffkiln.add_target(sys.argv[1], "cpu-x86-64-v2")
except diffkiln.DiffkilnError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code, str(one)], capture_output=True, text=True, check=False)
    assert done.stdout.splitlines()[:2] == ["compiles", "compiles"], done.stderr


def test_regions_that_share_an_engine_are_lowered_together_again(three: Path) -> None:
    def region(name: str, tokens: int) -> Program:
        w = Writer()
        return w.program(name, w.op("relu.default", w.op("mul.Tensor", w.value("%x", tokens, 4), w.value("@w", 4))))

    small, large = region("Block", 16), region("Block-2", 24)
    modules = {"transformer": Module("transformer", {}, {p.name: p for p in (small, large)})}
    with open_bundle(three) as bundle:
        row = bundle.manifest.engines[0].model_copy(update={"component": "transformer", "path": "engines/x"})
        rows = tuple(row.model_copy(update={"region": name}) for name in ("Block", "Block-2"))
        (group,) = groups_of(bundle.manifest.model_copy(update={"engines": rows}), modules)
    assert group.regions == ("Block", "Block-2")
    assert group.family(modules["transformer"]).ranges


def test_for_a_gpu_the_calls_run_dry_before_anything_is_built(one: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def ran(recording: Recording, graphs: str | None) -> None:
        dry_run(recording, graphs)
        raise VerifyError(f"{len(recording.calls)} variant, graphs: {graphs}")

    for name in ("_check_buildable", "check_target"):  # this torch cannot build for a GPU
        monkeypatch.setattr(editing, name, lambda *_, **__: None)
    monkeypatch.setattr(editing, "dry_run", ran)
    with pytest.raises(VerifyError, match="1 variant, graphs: None"):
        diffkiln.add_target(one, "nvidia-l4", cache=engine_cache())


KILLER = """
import os, shutil, signal, sys
from pathlib import Path
import pytest
from diffkiln.compiler import retarget
from diffkiln.bundle import open_bundle
from diffkiln.compiler.packing import engines
from tests.killing import NAMES, killed_before
from tests.compiler.test_retarget import V4, borrow, engine_cache
saved, place = Path(sys.argv[1]), Path(sys.argv[2])
borrow(pytest.MonkeyPatch())
engines._try_out = lambda *_: {}
os.fsync = lambda _: None
def killed_at(step):
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir()
    shutil.copytree(saved, place / "bundle")
    work = lambda: retarget.add_target(place / "bundle", V4, cache=engine_cache())
    return killed_before(step, (*NAMES, "link"), work) == signal.SIGKILL
step, killed = 0, True
while killed:
    killed = killed_at(step)
    with open_bundle(place / "bundle") as bundle:
        bundle.verify().close()
        print(bundle.id, flush=True)
    step += 37
"""


def test_sigkill_while_a_target_is_added_leaves_a_bundle_that_loads(one: Path, tmp_path: Path, borrowed) -> None:
    old = open_bundle(one).id
    command = [sys.executable, "-c", KILLER, str(one), str(tmp_path / "killed")]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, capture_output=True, text=True, cwd=root, check=False)
    assert done.returncode == 0, done.stderr
    found = done.stdout.split()
    new = diffkiln.add_target(one, V4, cache=engine_cache()).id
    assert len(found) > 2
    assert set(found) == {old, new}
    assert found[-1] == new


def test_a_region_that_does_not_export_is_told_with_its_class_its_line_and_the_mend(tmp_path, monkeypatch) -> None:
    def stop(*_, **__):
        raise RuntimeError("no such shape")

    monkeypatch.setattr(torch.export, "export", stop)
    with pytest.raises(ExportError) as caught:
        diffkiln.compile(DIGITS / "spec.json", tmp_path / "bundle", cache=EngineCache(tmp_path / "empty"))
    message = str(caught.value)
    assert "transformer: FluxTransformerBlock (diffusers.models.transformers.transformer_flux, " in message
    assert "transformer_flux.py, line " in message
    assert "no such shape" in message
    assert "Leave the component out of `compile`" in message
