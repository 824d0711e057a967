"""What results take: counted by hand."""

from __future__ import annotations

from diffkiln.program import REGION, Op, Program, Ref, TensorType
from diffkiln.program.ir import Input
from diffkiln.program.memory import memory_of, peak_memory

KILO = TensorType("float32", (256,))
HALF = TensorType("float16", (256,))


def relu(given: str, result: str) -> Op:
    return Op("aten.relu.default", (Ref(given),), (result,))


def program(*ops: Op, outputs: tuple[str, ...], types: dict[str, TensorType] | None = None) -> Program:
    named = {"%x": KILO, **{name: KILO for op in ops for name in op.outputs}, **(types or {})}
    return Program("p", (Input("%x", KILO),), ops, tuple(map(Ref, outputs)), named)


def test_a_result_is_freed_after_its_last_use() -> None:
    line = program(relu("%x", "%0"), relu("%0", "%1"), relu("%1", "%2"), outputs=("%2",))
    assert list(memory_of(line)) == [1024, 2048, 2048]


def test_what_is_returned_stays_until_the_end() -> None:
    line = program(relu("%x", "%0"), relu("%x", "%1"), relu("%1", "%2"), outputs=("%0", "%2"))
    assert list(memory_of(line)) == [1024, 2048, 3072]


def test_views_take_nothing_and_keep_what_they_show() -> None:
    view = Op("aten.view.default", (Ref("%0"), (16, 16)), ("%1",))
    square = {name: TensorType("float32", (16, 16)) for name in ("%1", "%2", "%3")}
    line = program(relu("%x", "%0"), view, relu("%1", "%2"), relu("%2", "%3"), outputs=("%3",), types=square)
    assert list(memory_of(line)) == [1024, 1024, 2048, 2048]


def test_a_cast_takes_memory_where_the_type_changes() -> None:
    def cast(dtype: str) -> Op:
        return Op("aten.to.dtype", (Ref("%0"), dtype), ("%1",))

    changed = program(relu("%x", "%0"), cast("float16"), outputs=("%1",), types={"%1": HALF})
    same = program(relu("%x", "%0"), cast("float32"), outputs=("%1",))
    assert list(memory_of(changed)) == [1024, 1536]
    assert list(memory_of(same)) == [1024, 1024]


def test_what_a_call_takes_inside_holds_its_results_already() -> None:
    call = Op(REGION, (Ref("%0"),), ("%1",), attrs={"region": "block", "instance": "blocks.0"})
    line = program(relu("%x", "%0"), call, outputs=("%1",))
    assert list(memory_of(line, lambda op: 1024 if op.name == REGION else 0)) == [1024, 2048]
    assert list(memory_of(line, lambda op: 5000 if op.name == REGION else 0)) == [1024, 6024]


def test_the_peak_names_its_operation() -> None:
    line = program(relu("%x", "%0"), relu("%0", "%1"), relu("%1", "%2"), outputs=("%2",))
    peak = peak_memory(line)
    assert (peak.nbytes, peak.where) == (2048, "program 'p', operation 1 (aten.relu.default)")


def test_a_program_without_operations_takes_nothing() -> None:
    assert peak_memory(program(outputs=("%x",))).nbytes == 0
