"""The builder: each edit, and random programs that stay valid and give the same whatever is done to them."""

from __future__ import annotations

import ast
import random
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import diffkiln
from diffkiln.errors import VerifyError
from diffkiln.interpreter.aten import Interpreter
from diffkiln.program import (
    CALL,
    NOISE,
    REGION,
    STEP,
    Builder,
    Input,
    Op,
    Program,
    Ref,
    TensorType,
    caller_of,
    fingerprint,
    prune,
    rename,
    split_off,
    verify,
    verify_types,
    weight_in,
)
from tests.program.programs import BLOCK, BODY, F4, MODULE, PIPELINE

WEIGHTS = {f"blocks.{index}.proj.weight": torch.randn(4, 4) for index in (0, 1)} | {"w": torch.randn(2, 4)}
CONSTANTS = {"abc": torch.randn(2, 4), "k": torch.randn(2, 4)}


def line(*ops: Op, outputs: tuple[str, ...] = ()) -> Program:
    """A program of one input, of values that all have one type."""
    names = ["%x", "@w", "#k", *(name for op in ops for name in op.outputs)]
    last = tuple(map(Ref, outputs)) or ops[-1].results
    return Program("line", (Input("%x", F4),), ops, last, dict.fromkeys(names, F4))


def neg(name: str, out: str) -> Op:
    return Op("aten.neg.default", (Ref(name),), (out,))


def add(one: str, two: str, out: str) -> Op:
    return Op("aten.add.Tensor", (Ref(one), Ref(two)), (out,))


def text(program: Program) -> list[str]:
    short = {"aten.linear.default": "linear", "aten.add.Tensor": "add", "aten.neg.default": "neg"}
    return [
        f"{','.join(op.outputs)} = {short.get(op.name, op.name)} {' '.join(ref.name for ref in op.uses)}"
        for op in program.ops
    ]


def gives(program: Program, regions: Mapping[str, Program] | None = None) -> list[torch.Tensor]:
    """What a program gives for the same inputs, weights and constants at each call."""

    def region(op: Op):
        inner, prefix = Interpreter((regions or {})[op.attrs["region"]]), weight_in(op, "")
        return lambda *args: inner(args, WEIGHTS, CONSTANTS, prefix)

    generator = torch.Generator().manual_seed(3)
    inputs = [torch.randn(item.type.shape, generator=generator) for item in program.inputs]
    return list(Interpreter(program, special={REGION: region})(inputs, WEIGHTS, CONSTANTS))


def same(found: list[torch.Tensor], wanted: list[torch.Tensor]) -> bool:
    return len(found) == len(wanted) and all(map(torch.equal, found, wanted))


THREE = line(neg("%x", "%1"), neg("%1", "%2"), neg("%2", "%3"))


def test_operations_are_put_before_a_place_and_at_the_end_in_the_order_they_come():
    edit = Builder(THREE)
    for at, wish in ((1, "%a"), (3, "%end"), (1, "%b"), (0, "%first")):
        edit.insert(at, edit.op("aten.neg.default", (Ref("%x"),), {wish: F4}))
    edit.append(edit.op("aten.neg.default", (Ref("%end"),), {"%last": F4}))
    assert [op.outputs[0] for op in edit.build().ops] == ["%first", "%1", "%a", "%b", "%2", "%3", "%end", "%last"]


def test_a_program_is_not_changed_by_its_edits():
    before = (THREE.ops, dict(THREE.types), THREE.outputs)
    edit = Builder(THREE)
    edit.replace(1)
    edit.replace_uses("%2", edit.add_input("%new", F4))
    edit.build()
    assert (THREE.ops, dict(THREE.types), THREE.outputs) == before


def test_an_operation_is_replaced_by_several_or_by_none():
    edit = Builder(THREE)
    edit.replace(1, edit.op("aten.neg.default", (Ref("%1"),), {"%a": F4}), neg("%a", "%2"))
    assert text(edit.build()) == ["%1 = neg %x", "%a = neg %1", "%2 = neg %a", "%3 = neg %2"]
    edit = Builder(THREE)
    edit.replace(1)
    edit.replace_uses("%2", Ref("%1"))
    assert text(edit.build()) == ["%1 = neg %x", "%3 = neg %1"]


def test_a_name_that_is_taken_gets_a_number():
    edit = Builder(THREE)
    ops = [edit.op("aten.neg.default", (Ref("%x"),), {wish: F4}) for wish in ("%1", "%1", "%new", "%x")]
    assert [op.outputs[0] for op in ops] == ["%1.2", "%1.3", "%new", "%x.2"]
    assert edit.add_input("%x", F4) == Ref("%x.3")


def test_uses_are_replaced_everywhere_and_through_one_another():
    edit = Builder(line(neg("%x", "%1"), neg("%x", "%2"), add("%1", "%2", "%3"), outputs=("%3", "%1")))
    edit.replace_uses("%1", Ref("%2"))
    edit.replace_uses("%2", Ref("%x"))
    edit.replace_uses("%x", Ref("%1"))  # which is %x by now
    built = edit.build()
    assert built.ops[2].args == (Ref("%x"), Ref("%x"))
    assert built.outputs == (Ref("%3"), Ref("%x"))
    assert edit.current(add("%1", "%2", "%9")).args == (Ref("%x"), Ref("%x"))


def test_a_result_that_is_renamed_leaves_its_name_to_another():
    edit = Builder(THREE)
    edit.rename_result(0, "%1", "%1.unread")
    edit.insert(1, add("%x", "%x", "%1"))
    assert text(edit.build())[:3] == ["%1.unread = neg %x", "%1 = add %x %x", "%2 = neg %1"]


def test_inputs_constants_and_outputs_are_added_with_their_types():
    edit = Builder(THREE, name="more")
    source = edit.add_input("%kept", F4)
    total = edit.op("aten.add.Tensor", (source, edit.constant("k", F4)), {"%total": F4})
    edit.append(total)
    edit.add_outputs(*total.results)
    built = edit.build()
    assert (built.name, built.constants, built.outputs) == ("more", ("k",), (Ref("%3"), Ref("%total")))
    assert built.types["#k"] == built.types["%kept"] == F4
    assert "@w" not in built.types


def test_every_operation_is_mapped():
    doubled = Builder(THREE).map(lambda op: replace(op, name="aten.abs.default")).build()
    assert [op.name for op in doubled.ops] == ["aten.abs.default"] * 3


@pytest.mark.parametrize(
    ("op", "message"),
    [
        (neg("%later", "%a"), "has no type"),
        (neg("%3", "%1"), "used before it is defined"),
        (neg("%x", "%2"), "defined twice"),
        (Op("aten.system.default", (), ()), "closed list"),
        (Op(REGION, (Ref("%x"),), (), attrs={"region": "Block"}), "lacks a proper"),
        (Op(NOISE, (Ref("%x"),), (), attrs={"shape": [1], "dtype": "float32"}), "takes 0 values"),
    ],
)
def test_what_is_left_malformed_is_refused(op, message):
    edit = Builder(THREE)
    edit.insert(0, op)
    with pytest.raises(VerifyError, match=message):
        edit.build()


def test_what_it_calls_need_not_be_there_yet():
    attrs = {"component": "net", "program": "net.keeping"}
    edit = Builder(PIPELINE).map(lambda op: replace(op, attrs=attrs) if op.name == CALL else op)
    assert edit.build().ops[3].attrs == attrs


def test_regions_are_inlined_with_the_weights_of_their_instances():
    edit = Builder(BODY)
    edit.inline(0, BLOCK)
    edit.inline(1, BLOCK)
    inlined = edit.build()
    verify(inlined)
    assert inlined.weights == ("blocks.0.proj.weight", "blocks.1.proj.weight")
    assert inlined.constants == ("abc",)
    assert text(inlined)[:4] == [
        "%0.1 = linear %x @blocks.0.proj.weight",
        "%0.2 = add %0.1 #abc",
        "%1.1 = linear %0.2 @blocks.1.proj.weight",
        "%1.2 = add %1.1 #abc",
    ]
    assert same(gives(inlined), gives(BODY, MODULE.regions))


def test_a_component_is_inlined_with_weights_that_name_it():
    edit = Builder(PIPELINE)
    edit.inline(3, replace(BLOCK, name="transformer"))
    inlined = edit.build()
    assert inlined.weights == ("transformer/proj.weight",)
    assert [op.name for op in inlined.ops if op.name in (CALL, STEP)] == [STEP]


def test_a_program_that_gives_its_own_input_is_inlined():
    edit = Builder(
        THREE, ops=(Op(REGION, (Ref("%x"),), ("%1",), attrs={"region": "R", "instance": ""}), *THREE.ops[1:])
    )
    edit.inline(0, Program("R", (Input("%in", F4),), (), (Ref("%in"),), {"%in": F4}))
    assert text(edit.build()) == ["%2 = neg %x", "%3 = neg %2"]


def test_runs_that_compute_the_same_are_outlined_as_equal_programs():
    program = line(
        add("%x", "@w", "%1"), neg("%1", "%2"), Op("aten.abs.default", (Ref("%2"),), ("%3",)),
        add("%3", "#k", "%4"), neg("%4", "%5"), outputs=("%5", "%2"),
    )  # fmt: skip
    regions: dict[str, Program] = {}

    def call(region: Program):
        name = fingerprint(region)
        regions[name] = replace(region, name=name)
        return REGION, {"region": name, "instance": ""}

    edit = Builder(program)
    edit.outline([0, 1], call)
    edit.outline([3, 4], call)
    outlined = edit.build()
    verify(outlined, regions=regions)
    verify_types(outlined, regions)
    (region,) = regions.values()
    assert [item.name for item in region.inputs] == ["%in.0", "%in.1"]
    assert not region.weights
    assert not region.constants
    assert [op.name for op in outlined.ops] == [REGION, "aten.abs.default", REGION]
    assert [[ref.name for ref in op.uses] for op in outlined.ops] == [["%x", "@w"], ["%2"], ["%3", "#k"]]
    assert same(gives(outlined, regions), gives(program))


def test_what_is_split_off_takes_computed_values_and_gives_what_others_read():
    program = line(add("%x", "@w", "%1"), neg("%1", "%2"), neg("%2", "%3"), add("%2", "%3", "%4"))
    part = split_off(program, [1, 2])
    assert ([item.name for item in part.inputs], part.outputs) == (["%1"], (Ref("%2"), Ref("%3")))
    assert part.types.keys() == {"%1", "%2", "%3"}
    head = split_off(program, [0])
    assert (head.weights, [item.name for item in head.inputs]) == (("w",), ["%x"])
    assert split_off(program, [1], (Ref("%1"),)).outputs == (Ref("%1"),)


def test_dead_operations_go_and_the_types_of_what_they_used():
    program = line(neg("%x", "%1"), add("%1", "@w", "%2"), add("%2", "#k", "%3"), outputs=("%1",))
    assert prune(program).ops == program.ops[:1]
    assert prune(program).types.keys() == {"%x", "%1"}
    assert [op.name for op in prune(replace(PIPELINE, outputs=())).ops if not op.is_aten] == [NOISE, CALL, STEP]


def test_the_caller_of_a_program_takes_and_gives_what_it_does():
    region = replace(BODY, name="whole")
    caller = caller_of(region)
    verify_types(caller, {"whole": region})
    assert ([op.name for op in caller.ops], caller.inputs) == ([REGION], region.inputs)
    assert caller.outputs == (Ref("%result.0"),)


#: What makes programs: the recorder, the reader, and the sizes that programs of one family share.
MAKERS = {"record/tape.py", "program/serial.py", "program/sizes.py", "program/builder.py"}


def test_nothing_else_writes_operations_or_types_into_a_program():
    root = Path(diffkiln.__file__).parent
    found: set[str] = set()
    for file in root.rglob("*.py"):
        if root / "exporters" in file.parents:  # an example to compile
            continue
        for node in ast.walk(ast.parse(file.read_text())):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Name)):
                continue
            fields = {keyword.arg for keyword in node.keywords}
            if node.func.id == "Program" or (node.func.id == "replace" and fields & {"ops", "types"}):
                found.add(file.relative_to(root).as_posix())
    assert found <= MAKERS


# -- random programs --


def program_of(rng: random.Random, size: int) -> Program:
    """A random program of one type, two of whose operations give two values."""
    known = ["%x", "%y", "@w", "#k"]
    ops: list[Op] = []
    types = dict.fromkeys(known, F4)
    for index in range(size):
        name, count = rng.choice([("neg.default", 1), ("abs.default", 1), ("add.Tensor", 2), ("mul.Tensor", 2)])
        ops.append(Op(f"aten.{name}", tuple(Ref(rng.choice(known[-6:])) for _ in range(count)), (f"%{index}",)))
        if rng.random() < 0.2:
            halves = (f"%{index}.a", f"%{index}.b")
            ops.append(Op("aten.chunk.default", (Ref(f"%{index}"), 2), halves))
            ops.append(Op("aten.cat.default", (tuple(map(Ref, reversed(halves))),), (f"%{index}.c",)))
            types |= dict.fromkeys(halves, TensorType("float32", (1, 4)))
            known.append(f"%{index}.c")
        known.append(f"%{index}")
    made = {name: F4 for op in ops for name in op.outputs if name not in types}
    outputs = tuple(Ref(name) for name in rng.sample(list(made), 2)) + ops[-1].results
    return Program("random", (Input("%x", F4), Input("%y", F4)), tuple(ops), outputs, types | made)


def with_detours(rng: random.Random, program: Program) -> Program:
    """Some values are negated twice before others use them; some operations are done again in another place."""
    edit = Builder(program)
    for at in rng.sample(range(len(program.ops)), len(program.ops) // 3):
        name = rng.choice(program.ops[at].outputs)
        there = edit.op("aten.neg.default", (Ref(name),), {f"{name}.there": program.types[name]})
        back = edit.op("aten.neg.default", there.results, {f"{name}.there": program.types[name]})
        edit.replace_uses(name, back.results[0])
        edit.rename_result(at, name, f"{name}.first")
        edit.insert(at + 1, replace(there, args=(Ref(f"{name}.first"),)), back)
    return edit.build()


def with_regions(rng: random.Random, program: Program) -> tuple[Program, dict[str, Program]]:
    """Random runs of it are regions."""
    regions: dict[str, Program] = {}

    def call(region: Program):
        verify(region)
        regions.setdefault(fingerprint(region), region)
        return REGION, {"region": fingerprint(region), "instance": ""}

    edit, at = Builder(program), 0
    while at < len(program.ops):
        run = range(at, min(at + rng.randint(1, 4), len(program.ops)))
        if rng.random() < 0.6:
            edit.outline(run, call)
        at = run.stop
    return edit.build(), regions


@pytest.mark.parametrize("seed", range(40))
def test_random_programs_stay_valid_and_give_the_same(seed):
    rng = random.Random(seed)
    program = program_of(rng, rng.randint(3, 20))
    verify(program)
    wanted = gives(program)
    assert same(gives(prune(program)), wanted)

    detoured = with_detours(rng, program)
    verify(detoured)
    assert same(gives(detoured), wanted)

    outlined, regions = with_regions(rng, program)
    verify(outlined, regions=regions)
    verify_types(outlined, regions)
    assert same(gives(outlined, regions), wanted)

    edit = Builder(outlined)
    for at, op in enumerate(outlined.ops):
        if op.name == REGION:
            edit.inline(at, regions[op.attrs["region"]])
    inlined = edit.build()
    verify(inlined)
    assert [op.name for op in inlined.ops] == [op.name for op in program.ops]
    assert same(gives(inlined), wanted)

    names = {name: f"%v{index}" for index, name in enumerate(rng.sample(list(program.makers()), 3))} | {"%x": "%first"}
    renamed = rename(program, names)
    verify(renamed)
    assert same(gives(renamed), wanted)


@pytest.mark.parametrize("seed", range(40))
def test_random_pieces_give_together_what_the_whole_gives(seed):
    rng = random.Random(seed)
    program = program_of(rng, rng.randint(3, 20))
    cut = rng.randint(1, len(program.ops) - 1)
    values = dict(zip(["%x", "%y"], (torch.randn(2, 4) for _ in range(2)), strict=True))
    wanted = Interpreter(program)(list(values.values()), WEIGHTS, CONSTANTS)
    for places in (range(cut), range(cut, len(program.ops))):
        part = split_off(program, places)
        given = [values[item.name] for item in part.inputs]
        values |= dict(
            zip((ref.name for ref in part.outputs), Interpreter(part)(given, WEIGHTS, CONSTANTS), strict=True)
        )
    assert same([values[ref.name] for ref in program.outputs], list(wanted))
