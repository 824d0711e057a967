"""What bundles are, to the bit: ids and manifests, on whatever CPU they are compiled."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from diffkiln.bundle import open_bundle
from diffkiln.cli import main
from tests.pipelines import WARNING_FILTERS
from tests.snapshots.bundles import BUNDLES, portable
from tests.snapshots.golden import same

pytestmark = [pytest.mark.filterwarnings(text) for text in WARNING_FILTERS]


@pytest.mark.parametrize("name", BUNDLES)
def test_bundle_is_what_it_was(name, tmp_path, capsys):
    output = tmp_path / "bundle"
    assert main(["compile", str(BUNDLES[name].save(tmp_path)), "-o", str(output), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    with open_bundle(output) as bundle:
        manifest = bundle.manifest.model_dump(mode="json")
        assert told["id"] == bundle.id
        same(f"bundles/{name}.json", portable(bundle.id, manifest))
    same(f"commands/compile/{name}.json", _on_every_machine(told, output))


def _on_every_machine(told: dict, output: Path) -> dict:
    """What `compile --json` says, without its id, the place, and how long each stage took."""
    assert told.pop("path") == str(output)
    assert all(seconds >= 0 for seconds in told["seconds"].values())
    return {key: list(value) for key, value in told.items() if key != "id"}
