"""Which files a bundle may hold: those that the format knows, and none that another program acts on."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import diffkiln
from diffkiln.bundle import BundleWriter, open_bundle, parse_manifest, sha256_bytes
from diffkiln.bundle.layout import acted_on, misplaced
from diffkiln.bundle.strict_json import loads
from diffkiln.errors import ManifestInvalid
from tests.bundle.making import ENGINE, make

ROLES = ("config", "program", "weights", "native", "doc")
KNOWN = [
    ("spec.json", "config"),
    ("text/tokenizer_2.json", "config"),
    ("pipeline/model_index.json", "config"),
    ("pipeline/tokenizer/sentencepiece.bpe.model", "config"),
    ("pipeline/processor/additional_chat_templates/x.jinja", "config"),
    ("programs/64x64-2-steps.json", "program"),
    ("programs/constants.safetensors", "program"),
    ("weights/transformer/transformer_blocks.0.safetensors", "weights"),
    ("engines/cpu-x86-64-v3/transformer/Block/data/aotinductor/model/engine.so", "native"),
    ("engines/gpu/unet/a-plugins-own_file", "native"),
    ("licences.json", "doc"),
    ("calibration/transformer.json", "doc"),
]
STRANGE = [
    ".git/config",
    ".envrc",
    "pipeline/.git/config.json",
    "pipeline/tokenizer/tokenizer.py",
    "pipeline/tokenizer/vocab.bin",
    "pipeline/vae/model.onnx",
    "pipeline/vae/diffusion_pytorch_model.safetensors",
    "pipeline/HEAD",
    "engines/cpu/.git/config",
    "engines/cpu/x/.gitmodules",
    "engines/cpu/x/HEAD",
    "engines/cpu/x/head",
    "engines/cpu/x/sitecustomize.py",
    "engines/cpu/x/Site.PYC",
    "engines/cpu/x/site.pth",
    "engines/cpu/x/․git/config",  # ONE DOT LEADER, a dot on some file systems
    "engines/model.so",
    "weights/model.so",
    "weights/transformer/model.bin",
    "programs/deeper/x.json",
    "Makefile",
    "conftest.py",
    "package.json",
    "HEAD",
    "licences.json/x",
]


@pytest.mark.parametrize(("path", "role"), KNOWN)
def test_every_place_of_the_format_takes_its_own_role_alone(path: str, role: str) -> None:
    assert [other for other in ROLES if misplaced(path, other) is None] == [role]


@pytest.mark.parametrize("path", STRANGE)
@pytest.mark.parametrize("role", ROLES)
def test_what_the_format_does_not_know_has_no_place(path: str, role: str) -> None:
    assert misplaced(path, role)


@given(st.lists(st.text("ab.HEADpy/git", min_size=1), min_size=1, max_size=4), st.sampled_from(ROLES))
def test_nothing_with_a_place_hides_or_runs(parts: list[str], role: str) -> None:
    path = "/".join(parts)
    if misplaced(path, role) is None:
        names = path.lower().split("/")
        assert not any(name.startswith(".") or name.endswith(".py") or name == "head" for name in names)
    assert acted_on("." + path)


@pytest.mark.parametrize("path", STRANGE)
def test_writer_refuses_what_has_no_place_when_it_is_written(output: Path, path: str) -> None:
    with BundleWriter(output) as writer:
        with pytest.raises(ManifestInvalid, match="has no place in a bundle"):
            writer.write(path, b"", "native")
        writer.path(path).write_bytes(b"")
        with pytest.raises(ManifestInvalid, match="has no place in a bundle"):
            writer.add(path, "native")


def with_files(bundle: Path, files: dict[str, bytes]) -> None:
    """Put files of role native into a bundle, with a manifest to match, as a stranger would."""
    manifest: Any = loads((bundle / "manifest.json").read_bytes(), max_bytes=1 << 20)
    for path, data in files.items():
        (bundle / path).parent.mkdir(parents=True, exist_ok=True)
        (bundle / path).write_bytes(data)
        manifest["files"].append({"path": path, "size": len(data), "sha256": sha256_bytes(data), "role": "native"})
    import rfc8785

    text = rfc8785.dumps(manifest)
    (bundle / "manifest.json").write_bytes(text)
    (bundle / "manifest.sha256").write_text(f"{sha256_bytes(text)}  manifest.json\n")


def repository(prefix: str, marker: Path) -> dict[str, bytes]:
    """A repository of git whose configuration runs a program at `git status`."""
    settings = (
        f'[core]\n\trepositoryformatversion = 0\n\tbare = false\n\tworktree = "/"\n\tfsmonitor = "touch {marker}"\n'
    )
    return {
        f"{prefix}HEAD": b"ref: refs/heads/main\n",
        f"{prefix}config": settings.encode(),
        f"{prefix}objects/x": b"",
        f"{prefix}refs/x": b"",
    }


def git_status(place: Path) -> None:
    environment = {"PATH": os.environ["PATH"], "HOME": str(place), "GIT_CONFIG_NOSYSTEM": "1"}
    subprocess.run(["git", "status"], cwd=place, env=environment, capture_output=True, check=False, timeout=60)


@pytest.mark.parametrize(
    ("prefix", "place"),
    [(".git/", ""), (f"{ENGINE}/.git/", ENGINE), (f"{ENGINE}/", ENGINE)],
    ids=["root", "in", "bare"],
)
def test_bundle_that_is_a_repository_is_refused_since_git_runs_what_it_names(
    made: Path, tmp_path: Path, prefix: str, place: str
) -> None:
    """The same files as a plain folder show that git would run the program."""
    marker = tmp_path / "marker"
    with_files(made, repository(prefix, marker))
    git_status(made / place)
    assert marker.exists()
    with pytest.raises(ManifestInvalid, match=r"which programs such as git act on|takes? the folder for a repository"):
        open_bundle(made)
    with pytest.raises(ManifestInvalid):
        parse_manifest((made / "manifest.json").read_bytes())


def test_engine_of_a_third_party_may_have_files_of_any_other_name(output: Path) -> None:
    make(output)
    names = ["model.plan", "no-suffix", "deep/er/kernel.cubin", "config", "objects/a", "refs/b"]
    with_files(output, {f"{ENGINE}/{name}": b"x" for name in names})
    with open_bundle(output) as bundle:
        bundle.verify().close()


def test_nothing_else_spells_the_path_of_a_file():
    """The places of a bundle's files are said once, in `layout`."""
    spelled = re.compile(
        r"""["'](?:programs|weights|engines|text|pipeline|calibration)/|["'](?:spec|licences|build)\.json["']"""
    )
    root = Path(diffkiln.__file__).parent
    for path in sorted(root.rglob("*.py")):
        code = path.read_text().partition('"""')[2].partition('"""')[2]  # without the module's docstring
        code = re.sub(r'"text/(?:plain|event-stream|html)[^"]*"', "", code)  # types of media
        assert path.name == "layout.py" or not spelled.search(code), path
