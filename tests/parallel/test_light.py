"""Operations that processes share: in threads, and in four real processes that are delayed, killed, or disagree."""

from __future__ import annotations

import time
from dataclasses import replace

import pytest
import torch

from diffkiln.errors import ManifestInvalid, PeerLost, VerifyError
from diffkiln.interpreter.aten import Interpreter
from diffkiln.program import ALL_GATHER, Mesh, Module, program_from_json, program_to_json, verify, verify_module
from diffkiln.program.exchange import sent
from diffkiln.program.inference import infer_types
from diffkiln.program.ir import EXCHANGES
from diffkiln.runtime.processes import Group, Pretended, check_mesh, shared_operations
from diffkiln.runtime.processes.threads import in_threads
from diffkiln.runtime.processes.watch import name_of
from tests.parallel.processes import end, ended, start
from tests.parallel.programs import MESH, SENT, SENT_BY_EACH, SENT_BY_FIRST, SENT_BY_ONE, light, wanted


def test_a_mesh_names_the_processes_along_each_axis():
    mesh = Mesh({"guidance": 2, "sequence": 4})
    assert (mesh.size, str(mesh)) == (8, "guidance 2 x sequence 4")
    assert mesh.peers(6, "sequence") == (4, 5, 6, 7)
    assert mesh.peers(6, "guidance") == (2, 6)
    assert (mesh.index(6, "guidance"), mesh.index(6, "sequence")) == (1, 2)
    three = Mesh({"guidance": 2, "layers": 3})
    assert (three.size, str(three), three.peers(4, "layers"), three.index(4, "layers")) == (
        6, "guidance 2 x layers 3", (3, 4, 5), 1,
    )  # fmt: skip
    assert name_of(mesh, 6) == "process 6 (guidance 1, sequence 2)"


def test_the_program_is_well_formed_and_comes_back_from_json():
    program = light()
    verify_module(Module("net", {"light": program}))
    infer_types(program)
    assert program_from_json(program_to_json(program)).ops == program.ops


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"axis": "time"}, "lacks a proper .*axis"),
        ({"count": 1}, "lacks a proper .*count"),
        ({"count": 3}, "takes 1 values and gives 3"),
        ({"count": True}, "lacks a proper .*count"),
    ],
)
def test_a_malformed_operation_is_refused(change, reason):
    program = light()
    ops = list(program.ops)
    at = next(index for index, op in enumerate(ops) if op.name == ALL_GATHER)
    ops[at] = type(ops[at])(ALL_GATHER, ops[at].args, ops[at].outputs, attrs={**ops[at].attrs, **change})
    changed = type(program)(program.name, program.inputs, tuple(ops), program.outputs, program.types)
    with pytest.raises(VerifyError, match=reason):
        verify(changed, regions={})


def test_what_no_process_of_the_axis_gives_is_refused():
    program = light()
    last = program.ops[-1]
    changed = replace(program, ops=(*program.ops[:-1], replace(last, attrs={**last.attrs, "index": 2})))
    with pytest.raises(VerifyError, match="there is no process 2 of 2"):
        verify(changed, regions={})


def test_a_region_holds_nothing_that_processes_share():
    with pytest.raises(VerifyError, match="a region is one process's own"):
        verify(light())


def test_a_wrong_type_is_found():
    program = light()
    types = {**program.types, "%shard": program.types["%a"], "%double": program.types["%a"]}
    with pytest.raises(VerifyError, match="%shard is declared as"):
        infer_types(type(program)(program.name, program.inputs, program.ops, program.outputs, types))


def test_a_program_of_another_mesh_is_refused():
    check_mesh(Mesh(MESH), [light()])
    for mesh in (None, Mesh({"guidance": 2}), Mesh({"guidance": 2, "sequence": 4})):
        with pytest.raises(ManifestInvalid, match=r"shares %\w+ among 2 processes along"):
            check_mesh(mesh, [light()])


def test_threads_compute_what_one_process_would_and_send_what_is_predicted():
    value = torch.randn(1, 4, 8)

    def run(group: Group) -> int:
        found = Interpreter(light(), special=shared_operations(group))([value, -value])
        assert all(map(torch.equal, found, wanted(value)))
        return group.sent

    assert in_threads(Mesh(MESH), run) == SENT_BY_EACH
    assert sum(sent(op, light()) for op in light().ops if op.name in EXCHANGES) == SENT + SENT_BY_FIRST + SENT_BY_ONE


def test_an_error_in_one_thread_ends_the_others():
    def run(group: Group) -> None:
        if group.rank == 2:
            raise KeyError("its own")
        group.gather(torch.zeros(1), "guidance")

    with pytest.raises(KeyError, match="its own"):
        in_threads(Mesh(MESH), run)


def test_one_process_can_stand_for_all_where_types_alone_matter():
    group = Pretended(Mesh(MESH), 0)
    found = Interpreter(light(), special=shared_operations(group), paranoid=True)([torch.zeros(1, 4, 8)] * 2)
    assert [tuple(item.shape) for item in found] == [(1, 4, 8)] * 5


@pytest.mark.more
def test_200_runs_with_random_delays_end():
    for rank, (code, output, errors) in enumerate(ended(start(4, "tests.parallel.light", "200"))):
        assert code == 0, errors
        assert output == f"sent {200 * SENT_BY_EACH[rank]}\n"


@pytest.mark.more
@pytest.mark.parametrize(
    ("fate", "reason"), [("killed", "ended while 4 processes"), ("failing", "a callback went wrong")]
)
def test_a_process_that_ends_in_the_middle_ends_the_others_by_name(fate, reason):
    processes = start(4, "tests.parallel.light", "200", fate)
    try:
        started = time.monotonic()
        while all(process.poll() is None for process in processes) and time.monotonic() < started + 120:
            time.sleep(0.05)
        first = time.monotonic()
        for process in processes[:3]:
            _, errors = process.communicate(timeout=10)
            assert process.returncode == PeerLost.exit_code
            assert "process 3 (guidance 1, sequence 1)" in errors
            assert reason in errors
        assert time.monotonic() - first < 10
    finally:
        end(processes)


@pytest.mark.more
def test_processes_that_are_asked_for_different_things_say_so():
    for code, _, errors in ended(start(4, "tests.parallel.light", "1", "other-call")):
        assert code == 1
        assert "process 3 of 4 was called with other arguments than process 0" in errors
