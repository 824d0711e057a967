"""`diffkiln inspect --bom`: a CycloneDX document of what a bundle was made from."""

from __future__ import annotations

import json

import pytest

from diffkiln.bundle import BundleWriter, open_bundle
from diffkiln.cli import main
from tests.bundle.making import CONTENT, fill, manifest_of

MODEL = {
    "of": "base model",
    "model": "owner/name",
    "revision": "0" * 40,
    "digest": "sha256:00",
    "license": "apache-2.0",
}
ADAPTERS = [
    {"of": "adapter", "component": "unet", "digest": "sha256:11", "license": "other", "license_name": "theirs",
     "license_link": "https://example.org"},
    {"of": "adapter", "component": "unet", "digest": "sha256:22", "license": None},
]  # fmt: skip


def bundle(path, licences=None):
    with BundleWriter(path) as writer:
        fill(writer)
        if licences is not None:
            writer.write("licences.json", licences, "doc")
        writer.publish(manifest_of)
    return path


def test_sources_licences_packages_and_files_are_listed(tmp_path, capsys):
    path = bundle(tmp_path / "bundle", json.dumps([MODEL, *ADAPTERS]).encode())
    assert main(["inspect", str(path), "--bom"]) == 0
    text = capsys.readouterr().out
    assert main(["inspect", str(path), "--bom"]) == 0
    assert capsys.readouterr().out == text
    bom = json.loads(text)
    assert (bom["bomFormat"], bom["specVersion"]) == ("CycloneDX", "1.6")
    with open_bundle(path) as opened:
        assert bom["metadata"]["component"]["hashes"] == [{"alg": "SHA-256", "content": opened.id}]
    spdx = {"license": {"id": "Apache-2.0"}}
    named = {"license": {"name": "theirs", "url": "https://example.org"}}
    assert bom["metadata"]["component"]["licenses"] == [spdx, named]
    parts = {item["bom-ref"]: item for item in bom["components"]}
    assert parts["source:0"]["name"] == "owner/name"
    assert [parts[f"source:{index}"].get("licenses") for index in range(3)] == [[spdx], [named], None]
    assert parts["package:torch"]["purl"] == "pkg:pypi/torch"
    files = {f"file:{name}" for name, (role, _) in CONTENT.items() if role in ("weights", "native")}
    assert {ref for ref in parts if ref.startswith("file:")} == files
    assert {row["ref"] for row in bom["dependencies"]} == {*parts, bom["metadata"]["component"]["bom-ref"]}


def test_a_bundle_that_states_no_licences_has_a_bom_too(tmp_path, capsys):
    assert main(["inspect", str(bundle(tmp_path / "bundle")), "--bom"]) == 0
    assert "licenses" not in json.loads(capsys.readouterr().out)["metadata"]["component"]


@pytest.mark.parametrize("data", [b"", b"{}", b"[1]", b'[{"of": "x"}]', b"[" * 10_000])
def test_licences_of_another_shape_are_an_error(tmp_path, data, capsys):
    assert main(["inspect", str(bundle(tmp_path / "bundle", data)), "--bom"]) == 6
    assert "licences.json" in capsys.readouterr().err
