"""What every spec in the repository means, as its model and its passes read it."""

from __future__ import annotations

import json
from typing import Any

import pytest

from diffkiln.passes.registry import option_models, read_passes
from diffkiln.spec import PassEntry, parse_spec, resolve_targets
from tests.docs.examples import ROOT
from tests.snapshots.golden import GOLDEN, same
from tests.snapshots.specs import every_spec

SPECS = every_spec()


@pytest.mark.parametrize("name", SPECS)
def test_spec_means_what_it_meant(name):
    spec = parse_spec(dict(SPECS[name]))
    same(f"specs/{name}.json", _without_root(_read(spec)))


def test_no_spec_is_gone():
    kept = {path.relative_to(GOLDEN / "specs").as_posix() for path in GOLDEN.glob("specs/*/*.json")}
    assert kept == {f"{name}.json" for name in SPECS}


@pytest.mark.parametrize("name", option_models())
def test_examples_of_a_pass_mean_what_they_meant(name):
    entries = [PassEntry.model_validate(example) for example in option_models()[name].examples]
    same(f"examples_of_passes/{name}.json", _passes(entries))


def _read(spec: Any) -> dict[str, Any]:
    return {
        "spec": spec.model_dump(mode="json"),
        "written": spec.as_json(),
        "targets": [target.name for target in resolve_targets(spec)],
        "variants": len(spec.variants),
        "passes": _passes(spec.passes),
    }


def _passes(entries: Any) -> list[dict[str, Any]]:
    """The passes with all their options, as the registry reads them."""
    return [
        {"where": placed.where, "name": placed.step.name, "options": placed.step.options()}
        for placed in read_passes(entries)
    ]


def _without_root(value: Any) -> Any:
    """A value without the folder that the repository lies in."""
    return json.loads(json.dumps(value).replace(str(ROOT), "ROOT"))
