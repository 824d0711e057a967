"""Every fenced example of README and docs is run: shell and Python for real, JSON through the spec's own models."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import diffkiln
from diffkiln.cli import cli, main
from diffkiln.passes.registry import pass_class, read_passes
from diffkiln.spec import PassEntry, parse_spec
from diffkiln.spec.choices import chooses
from diffkiln.spec.model import Inputs, Runtime, Source, TargetSpec
from diffkiln.spec.quality import Gate
from diffkiln.spec.strict import as_tuple
from diffkiln.spec.tuning import read_tuning
from tests.bundle.keys import make_chain, make_key
from tests.conftest import DIGITS
from tests.docs.examples import DOCUMENTS, NOT_RUN, ROOT, SHOWN, blocks, commands, is_run, values
from tests.docs.servers import Servers
from tests.exporters.regions import engine_cache
from tests.hub.conftest import UPLOAD_WARNING, hub
from tests.hub.server import Server
from tests.pipelines import WARNING_FILTERS

__all__ = ["hub"]

pytestmark = [pytest.mark.filterwarnings(text) for text in (*WARNING_FILTERS, UPLOAD_WARNING)]
#: Documents whose examples build or train for half a minute.
LONGEST = ("evaluate", "recipes", "tune")
RUN = [path for path in DOCUMENTS if any(block.language in ("bash", "python") for block in blocks(path))]


def test_every_fenced_example_has_a_language_that_is_known():
    for document in DOCUMENTS:
        for block in blocks(document):
            known = ("bash", "python", "json", *SHOWN)
            assert block.language in known, f"{document.name}:{block.line}"


def test_every_exception_is_needed_and_they_are_few():
    lines = [line for path in DOCUMENTS for block in blocks(path) for line in block.text.splitlines()]
    assert len(NOT_RUN) <= 8
    for beginning in NOT_RUN:
        assert any(line.startswith(beginning) for line in lines), beginning


def test_no_example_of_a_command_is_left_outside_a_fence():
    for document in DOCUMENTS:
        assert not [line for line in document.read_text().splitlines() if line.startswith(("    diffkiln ", "    $ "))]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.stem)
def test_json_is_what_a_spec_may_say(document):
    for block in blocks(document):
        for value in values(block) if block.language == "json" else ():
            if "spec_version" in value and chooses(value):
                read_tuning(value)
            elif "spec_version" in value:
                read_passes(parse_spec(value).passes)
            elif "name" in value:
                ways = pass_class(value["name"]).ways(value).values() or (value,)
                read_passes([PassEntry.model_validate(way) for way in ways])
            else:
                _read_members(value)


def _read_members(value: dict) -> None:
    """The members of a spec that an example shows."""
    readers = {"source": Source, "runtime": Runtime, "target": TargetSpec, "inputs": Inputs, "quality": Gate}
    for name, member in value.items():
        if name == "passes":
            read_passes([PassEntry.model_validate(item) for item in member])
        else:
            for item in as_tuple(tuple(member) if isinstance(member, list) else member):
                readers[name].model_validate(item)


@pytest.fixture
def world(tmp_path, monkeypatch, hub: Server) -> Path:
    """A folder that holds what the examples name; the Hub is the stand-in, and engines are built once in a run."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for module in ("compiler.compile", "compiler.retarget", "compiler.modules"):
        monkeypatch.setattr(f"diffkiln.{module}.EngineCache", engine_cache)
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    key = make_key(tmp_path, "release")
    chain = make_chain(tmp_path / "chain", "builds@example.org")
    for path, name in ((chain.private, "leaf.pem"), (chain.certificate, "leaf.crt"), (chain.between, "between.crt")):
        shutil.copy(path, tmp_path / name)
    identity = {"kind": "key", "name": "release", "sha256": key.fingerprint}
    policy = {"policy_version": 1, "require_signature": False, "identities": [identity]}
    (tmp_path / "policy.json").write_text(json.dumps(policy))
    for name, mode in (("photo.jpg", "RGB"), ("mask.png", "L")):
        Image.new(mode, (32, 32), "white").save(tmp_path / name)
    return tmp_path


def _spec(**changed) -> dict:
    made = json.loads((DIGITS / "spec.json").read_text()) | {"passes": []} | changed
    made["source"] = {**made["source"], "model": str(DIGITS / "model")}
    return made


def _with_bundle(world: Path, digits: Path) -> None:
    shutil.copytree(digits, world / "bundle")


def _with_spec(world: Path, digits: Path) -> None:
    (world / "spec.json").write_text(json.dumps(_spec()))


def _with_choices(world: Path, digits: Path) -> None:
    first = next(block for block in blocks(ROOT / "docs" / "tune.md") if block.language == "json")
    (world / "choices.json").write_text(first.text)


def _with_inpainting(world: Path, digits: Path) -> None:
    inputs = {"height": 32, "width": 32, "num_inference_steps": 2, "call": {"image": {}, "mask_image": {}}}
    made = _spec(source={"model": "", "pipeline": "FluxInpaintPipeline"}, inputs=inputs)
    diffkiln.compile(made, world / "bundle")


def _with_edits(world: Path, digits: Path) -> None:
    _with_bundle(world, digits)
    image_to_image = json.loads((DIGITS / "spec-image-to-image.json").read_text())
    changed = {name: image_to_image[name] for name in ("source", "inputs")}
    diffkiln.compile(_spec(runtime={}, **changed), world / "edits")


def _with_adapters(world: Path, digits: Path) -> None:
    _with_bundle(world, digits)
    (world / "loras").mkdir()
    layer, drawn = "transformer.transformer_blocks.0.attn.to_q", torch.full((4, 96), 0.01)
    factors = {f"{layer}.lora_A.weight": drawn, f"{layer}.lora_B.weight": drawn.T.contiguous()}
    for name in ("style", "detail", "loras/style"):
        save_file(factors, world / f"{name}.safetensors")
    key = "lora_unet_double_blocks_0_img_attn_qkv"
    whole = {f"{key}.lora_down.weight": drawn, f"{key}.lora_up.weight": torch.full((288, 4), 0.01)}
    save_file(whole | {f"{key}.alpha": torch.tensor(4.0)}, world / "kohya.safetensors")


#: What a document takes for granted, beside what every world has. README makes everything itself.
GIVEN = {
    "adapters": _with_adapters,
    "bundle": _with_bundle,
    "commands": _with_bundle,
    "evaluate": _with_bundle,
    "processes": _with_bundle,
    "programs": _with_bundle,
    "recipes": _with_bundle,
    "hub": _with_bundle,
    "targets": _with_bundle,
    "schedules": _with_spec,
    "serving": _with_edits,
    "spec": _with_inpainting,
    "threads": _with_bundle,
    "tune": _with_choices,
}


def _names(world: Path) -> dict:
    """What the examples in Python name and do not make."""
    module = torch.nn.Sequential(torch.nn.Linear(4, 4))

    class Timed(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = module

        def forward(self, hidden_states: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
            return self.body(hidden_states) * timestep

    names = {"diffkiln": diffkiln, "torch": torch, "module": Timed().eval().requires_grad_(False)}
    names |= {"x": torch.rand(2, 4), "y": torch.rand(2, 4), "t": torch.rand(1)}
    names |= {"picture": Image.new("RGB", (32, 32)), "mask": Image.new("L", (32, 32), "white")}
    if (world / "bundle").exists():
        names["pipe"] = diffkiln.load(world / "bundle")
    return names


@pytest.mark.slow
@pytest.mark.parametrize(
    "document",
    [pytest.param(path, marks=pytest.mark.more) if path.stem in LONGEST else path for path in RUN],
    ids=lambda path: path.stem,
)
def test_shell_and_python_run(document, world, hub: Server, digits_bundle, monkeypatch):
    GIVEN.get(document.stem, lambda *_: None)(world, digits_bundle)
    names = _names(world)
    with Servers() as servers:
        for block in blocks(document):
            where, text = f"{document.name}:{block.line}", servers.at_real_ports(block.text)
            if block.language == "bash":
                for command in filter(is_run, commands(replace(block, text=text))):
                    assert servers.start(command) or _shell(command) == 0, f"{where}: {command}"
            elif block.language == "python" and is_run(text):
                _alias(hub, text)
                exec(compile(text, where, "exec"), names)
    for value in names.values():
        if isinstance(value, diffkiln.runtime.pipeline.CompiledPipeline):
            value.close()


def _shell(command: str) -> int:
    """diffkiln's own commands in this process, which has torch already; everything else in a shell."""
    words = shlex.split(command, comments=True)
    if words[0] == "diffkiln":
        return main(words[1:])
    return subprocess.run(["bash", "-euc", command], check=False).returncode


def _alias(hub: Server, text: str) -> None:
    """The commit that the example names is the one that was pushed."""
    from diffkiln.hub import parse_address

    for address in (word.strip('"()') for word in text.split() if "hf://" in word):
        address = address[address.index("hf://") :]
        repo, commit = parse_address(address)
        hub.repositories[repo].commits[commit] = hub.repositories[repo].files


def test_every_command_is_in_an_example_or_in_the_table_of_commands():
    text = (ROOT / "docs" / "commands.md").read_text()
    assert all(f"`{name}" in text for name in cli.commands)
