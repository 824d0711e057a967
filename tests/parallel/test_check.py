"""What `check` says of a spec for several processes, and what a load refuses of a bundle for them."""

from __future__ import annotations

import json

import pytest

from diffkiln.cli import main
from diffkiln.errors import ManifestInvalid
from diffkiln.program import CALL, FROM_FIRST, Input, Mesh, Op, Program, Ref, TensorType
from diffkiln.runtime.checking import without
from diffkiln.runtime.processes import check_mesh
from tests.parallel.specs import shared

TYPE = TensorType("float32", (2,))


def program(op: Op) -> Program:
    return Program("call", (Input("%in", TYPE),), (op,), (Ref("%out"),), {"%in": TYPE, "%out": TYPE})


@pytest.fixture
def said(families, tmp_path, capsys):
    """What `check` prints of a FLUX-like pipeline whose tokens two GPUs share."""
    made = shared(families, "flux", {"sequence": 2, "first": ["text_encoder"]}, 1)
    made["target"] = {"device": "cuda", "gpu": "nvidia-h100-sxm", "parallel": made["target"]["parallel"]}
    file = tmp_path / "spec.json"
    file.write_text(json.dumps(made))

    def run(*more: str) -> str:
        assert main(["check", str(file), *more]) == 0
        return " ".join(capsys.readouterr().out.split())

    return run


@pytest.mark.filterwarnings("ignore")
def test_check_says_what_processes_send_and_hold_and_the_least_time(said):
    text = said()
    assert "each process sends" in text
    assert "the first process holds" in text
    assert "nvidia-h100-sxm: at least" in text
    found = json.loads(said("--json"))
    (sent,), (held,), (least,) = (
        [calls["call"] for calls in found[name].values()]
        for name in ("bytes_sent_in_each_step", "bytes_of_weights", "least_seconds")
    )
    assert sent[0] > 0
    assert held["first"] - held["others"] == found["components"]["text_encoder"]["bytes"]
    times = least["nvidia-h100-sxm"]
    assert 0 < times["exchanging"] < times["together"]
    assert times["alone"] > 0


def test_what_the_first_process_gives_is_for_all_of_the_mesh():
    given = program(Op(FROM_FIRST, (Ref("%in"),), ("%out",), attrs={"count": 4}))
    check_mesh(Mesh({"guidance": 2, "sequence": 2}), [given])
    with pytest.raises(ManifestInvalid, match="shares %out among 4 processes, and the manifest names 2"):
        check_mesh(Mesh({"sequence": 2}), [given])


def test_a_call_that_every_process_makes_needs_the_component_everywhere():
    call = program(Op(CALL, (Ref("%in"),), ("%out",), attrs={"component": "vae", "program": "vae.decode"}))
    assert without({"text_encoder"}, {}, [call]) == {}
    with pytest.raises(ManifestInvalid, match="runs vae in every process, and the manifest says that the first one"):
        without({"vae"}, {}, [call])
