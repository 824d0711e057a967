"""Bundles of data alone, by their digests whole, whose programs would reach outside of their tensors or take too much.

Each is the smallest program that once did so. What is refused is refused before anything runs.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import diffkiln
from diffkiln import Limits
from diffkiln.errors import CallError, LimitExceeded, ManifestInvalid, VerifyError
from tests.faults.test_loading import rehash

FROZEN = Path(__file__).parents[1] / "frozen" / "0.1.0" / "data" / "bundle"
CALL = "programs/64x64-2-steps.json"
IMAGE = "float32[1,3,64,64]"
DRAW = """
import sys, torch, diffkiln
pipe = diffkiln.load(sys.argv[1], paranoid=True)
image = pipe("a kiln", generator=torch.Generator().manual_seed(7), output_type="pt").images
print(image.double().abs().sum().item(), image.min().item(), image.max().item())
"""

Row = dict[str, Any]


def row(name: str, args: list[Any], *outputs: str, **kwargs: Any) -> Row:
    return {"op": f"aten.{name}", "args": args, "out": list(outputs), **({"kwargs": kwargs} if kwargs else {})}


@pytest.fixture
def hostile(tmp_path: Path) -> Any:
    """A function that puts operations at the end of the frozen bundle's calls, and gives the bundle."""

    def make(*rows: Row, path: str = CALL) -> Path:
        bundle = shutil.copytree(FROZEN, tmp_path / "bundle")
        file = bundle / path
        data = json.loads(file.read_bytes())
        for program in data["programs"].values():
            program["ops"] += rows
            program["outputs"] = [rows[-1]["out"][0].split()[0]]
        file.write_text(json.dumps(data))
        rehash(bundle, path)
        return bundle

    return make


def drawn(bundle: Path, **environment: str) -> list[float]:
    """The sum, least and greatest value of the picture that another process draws."""
    command = [sys.executable, "-c", DRAW, str(bundle)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    return [float(word) for word in done.stdout.split()]


def ints(values: list[int], dtype: str, name: str) -> list[Row]:
    """Operations that make a tensor of these integers without a constant."""
    rows = []
    for index, value in enumerate(values):
        kind = {"dtype": {"dtype": dtype}}
        rows.append(row("full.default", [[1], value], f"%{name}{index} {dtype}[1]", **kind))
    parts = [f"%{name}{index}" for index in range(len(values))]
    return [*rows, row("cat.default", [parts, 0], f"%{name} {dtype}[{len(values)}]")]


def as_image(name: str, type_: str) -> list[Row]:
    """Operations that make a picture of one number of a tensor."""
    dtype, _, _ = type_.partition("[")
    return [
        row("sum.default", [name], f"%total {'int64' if dtype.startswith('int') else dtype}[]"),
        row("to.dtype", ["%total", {"dtype": "float32"}], "%number float32[]"),
        row("zeros.default", [[1, 3, 64, 64]], f"%black {IMAGE}"),
        row("add.Tensor", ["%black", "%number"], f"%made {IMAGE}"),
    ]


_Z = row("zeros.default", [[16]], "%z float32[16]")
_X = row("zeros.default", [[1, 4, 2]], "%x float32[1,4,2]")
_ONE = row("zeros.default", [[1]], "%m float32[1]")
_BIG = row("zeros.default", [[1, 3, 8, 8]], "%i float32[1,3,8,8]")

REFUSED: dict[str, list[Row]] = {
    "strides_beyond_the_tensor": [
        _Z,
        row("as_strided.default", ["%z", [1, 3, 64, 64], [2**40, 2**40, 2**40, 1], 0], f"%e {IMAGE}"),
    ],
    "small_strides_beyond_the_tensor": [
        _Z,
        row("as_strided.default", ["%z", [1, 3, 64, 64], [0, 4096, 64, 1], 0], f"%e {IMAGE}"),
    ],
    "an_offset_beyond_the_tensor": [_Z, row("as_strided.default", ["%z", [4], [1], 13], "%e float32[4]")],
    "a_write_through_strides_beyond_the_tensor": [
        _Z,
        row("as_strided_scatter.default", ["%z", "%z", [16], [2], 0], "%e float32[16]"),
    ],
    "reshape_alias_with_another_number_of_elements": [
        _Z,
        row("_reshape_alias.default", ["%z", [1, 3, 64, 64], [2**40, 2**40, 2**40, 1]], f"%e {IMAGE}"),
    ],
    "native_batch_norm": [
        _X,
        _ONE,
        row(
            "native_batch_norm.default",
            ["%x", None, None, "%m", "%m", True, 0.1, 1e-5],
            "%e float32[1,4,2]",
            "%f float32[4]",
            "%g float32[4]",
        ),
    ],
    "batch_norm_in_training": [
        _X,
        row("zeros.default", [[4]], "%c float32[4]"),
        row("batch_norm.default", ["%x", None, None, "%c", "%c", True, 0.1, 1e-5, False], "%e float32[1,4,2]"),
    ],
    "batch_norm_with_too_few_statistics": [
        _X,
        _ONE,
        row("batch_norm.default", ["%x", None, None, "%m", "%m", False, 0.1, 1e-5, False], "%e float32[1,4,2]"),
    ],
    "instance_norm_that_keeps_statistics": [
        row("zeros.default", [[1, 4, 2]], "%x float32[1,4,2]"),
        row("zeros.default", [[4]], "%c float32[4]"),
        row("instance_norm.default", ["%x", None, None, "%c", "%c", True, 0.1, 1e-5, False], "%e float32[1,4,2]"),
    ],
    "repeats_that_torch_adds_up_itself": [
        *ints([2**22, 1 - 2**22], "int64", "r"),
        row("repeat_interleave.Tensor", ["%r"], "%e int64[1]", output_size=1),
    ],
    "a_scale_that_is_not_the_ratio_of_the_sizes": [
        _BIG,
        row("_upsample_bicubic2d_aa.default", ["%i", [64, 64], False, 1e-12, 1e-12], f"%e {IMAGE}"),
    ],
    "a_scale_for_the_nearest_pixel": [
        _BIG,
        row("upsample_nearest2d.default", ["%i", [64, 64], 1e-300, 1e-300], f"%e {IMAGE}"),
    ],
    "bytes_viewed_as_booleans": [
        row("full.default", [[4], 2], "%b uint8[4]", dtype={"dtype": "uint8"}),
        row("view.dtype", ["%b", {"dtype": "bool"}], "%e bool[4]"),
    ],
    "a_sparse_layout": [row("zeros.default", [[4]], "%e float32[4]", layout={"layout": "sparse_coo"})],
    "a_dtype_that_is_none": [row("zeros.default", [[4]], "%e float32[4]", dtype={"dtype": "load"})],
    "pinned_memory": [row("zeros.default", [[4]], "%e float32[4]", pin_memory=True)],
    "a_type_that_is_not_the_results": [row("zeros.default", [[16]], f"%e {IMAGE}")],
    "one_result_with_two_names": [row("zeros.default", [[4]], "%e float32[4]", "%f float32[4]")],
    "an_operator_that_draws": [row("bernoulli.default", ["%z"], "%e float32[16]")],
    "arguments_that_it_has_not": [row("neg.default", ["%z", 1], "%e float32[16]")],
}


@pytest.mark.parametrize("name", REFUSED)
def test_refuses_before_anything_runs(hostile, name) -> None:
    first = () if any(item["out"] == ["%z float32[16]"] for item in REFUSED[name]) else (_Z,)
    bundle = hostile(*first, *REFUSED[name])
    with pytest.raises((VerifyError, ManifestInvalid)) as refusal:
        diffkiln.load(bundle)
    assert len(str(refusal.value).split()) <= 60


RUN: dict[str, list[Row]] = {
    "the_smallest_integer_by_minus_one": [
        *ints([-(2**31)], "int32", "a"),
        *ints([-1], "int32", "b"),
        row("div.Tensor_mode", ["%a", "%b"], "%q int32[1]", rounding_mode={"str": "trunc"}),
        row("floor_divide.default", ["%a", "%b"], "%p int32[1]"),
        row("remainder.Tensor", ["%a", "%b"], "%s int32[1]"),
        row("fmod.Tensor", ["%a", "%b"], "%t int32[1]"),
        row("fmod.Scalar", ["%a", -1], "%u int32[1]"),
        row("cat.default", [["%q", "%p", "%s", "%t", "%u"], 0], "%e int32[5]"),
        *as_image("%e", "int32[5]"),
    ],
    "counts_that_do_not_add_up": [
        *ints([2**22, 1 - 2**22], "int64", "r"),
        row("zeros.default", [[2]], "%w float32[2]"),
        row("repeat_interleave.self_Tensor", ["%w", "%r", 0], "%e float32[1]", output_size=1),
        *as_image("%e", "float32[1]"),
    ],
    "memory_as_it_was_found": [
        row("empty.memory_format", [[1, 3, 64, 64]], f"%a {IMAGE}", memory_format={"memory_format": "channels_last"}),
        row("empty_like.default", ["%a"], f"%b {IMAGE}"),
        row("new_empty.default", ["%b", [1, 3, 64, 64]], f"%c {IMAGE}"),
        row("new_empty_strided.default", ["%c", [1, 3, 64, 64], [0, 0, 0, 0]], f"%d {IMAGE}"),
        row("_reshape_alias.default", ["%d", [3, 64, 64], [4096, 64, 1]], "%f float32[3,64,64]"),
        row("_unsafe_view.default", ["%f", [1, 3, 64, 64]], f"%e {IMAGE}"),
    ],
}


@pytest.mark.parametrize("name", RUN)
def test_runs_to_its_end(hostile, name) -> None:
    """Values that no type shows: the process lives, and nothing of its memory is in the picture."""
    total, least, greatest = drawn(hostile(*RUN[name]))
    assert least == greatest  # one colour
    if name == "memory_as_it_was_found":
        assert total == 0


def test_index_beyond_its_tensor_is_an_error_of_ours(hostile) -> None:
    bundle = hostile(
        *ints([2**40], "int64", "r"),
        _Z,
        row("index_select.default", ["%z", 0, "%r"], "%e float32[1]"),
        *as_image("%e", "float32[1]"),
    )
    with diffkiln.load(bundle) as pipe, pytest.raises(CallError, match=r"aten\.index_select\.default to %e failed"):
        pipe("a kiln")


def test_types_are_inferred_before_eight_gigabytes_are_taken(hostile) -> None:
    bundle = hostile(row("zeros.default", [[2**31]], "%e float32[2147483648]"), *as_image("%e", "float32[]"))
    with pytest.raises(LimitExceeded, match=r"memory_bytes is 8,\d{3},\d{3},\d{3}, and 1,073,741,824 is allowed"):
        diffkiln.load(bundle, limits=Limits(memory_bytes=2**30))


def test_more_memory_than_the_machine_has_is_refused_by_default(hostile) -> None:
    bundle = hostile(row("zeros.default", [[2**38]], f"%e float32[{2**38}]"), *as_image("%e", "float32[]"))
    with pytest.raises(LimitExceeded, match=r"raise the limit: limits=Limits\(memory_bytes="):
        diffkiln.load(bundle)


def test_three_hundred_thousand_operations_are_refused_in_bounded_time(hostile) -> None:
    chain = [row("neg.default", [f"%n{i}" if i else "%z"], f"%n{i + 1} float32[16]") for i in range(300_000)]
    bundle = hostile(_Z, *chain, *as_image(f"%n{len(chain)}", "float32[16]"))
    started = time.process_time()
    with pytest.raises(LimitExceeded, match="operations"):
        diffkiln.load(bundle)
    assert time.process_time() - started < 60


def test_call_ends_after_the_seconds_that_the_user_allows(hostile) -> None:
    rows = [row("zeros.default", [[512, 512]], "%a0 float32[512,512]")]
    rows += [row("mm.default", [f"%a{i}", f"%a{i}"], f"%a{i + 1} float32[512,512]") for i in range(20_000)]
    bundle = hostile(*rows, *as_image("%a20000", "float32[512,512]"))
    started = time.monotonic()
    with diffkiln.load(bundle, limits=Limits(seconds=1.0)) as pipe, pytest.raises(LimitExceeded, match="seconds"):
        pipe("a kiln")
    assert time.monotonic() - started < 60


def test_more_variants_than_allowed_are_refused(tmp_path) -> None:
    bundle = shutil.copytree(FROZEN, tmp_path / "bundle")
    with pytest.raises(LimitExceeded, match="variants is 1, and 0 is allowed"):
        diffkiln.load(bundle, limits=Limits(variants=0))


@pytest.mark.parametrize(("kind", "match"), [("weights", "the weight"), ("constants", "the constant")])
def test_types_of_files_are_compared_with_the_declared_ones(tmp_path, kind, match) -> None:
    bundle = shutil.copytree(FROZEN, tmp_path / "bundle")
    path = CALL if kind == "constants" else "programs/transformer.json"
    data = json.loads((bundle / path).read_bytes())
    tables = [program[kind] for program in data["programs"].values() if program[kind]]
    name, declared = next(iter(tables[0].items()))
    for table in tables:
        table[name] = declared.replace("float32", "float64") if "float32" in declared else "float64[1]"
    (bundle / path).write_text(json.dumps(data))
    rehash(bundle, path)
    with pytest.raises((ManifestInvalid, VerifyError)):
        diffkiln.load(bundle)


def test_limits_of_the_load_hold_for_the_calls(tmp_path) -> None:
    with diffkiln.load(FROZEN, limits=Limits(text_chars=5)) as pipe, pytest.raises(LimitExceeded, match="text_chars"):
        pipe("a kiln at night")
    with diffkiln.load(FROZEN) as pipe:
        assert pipe("a kiln at night").images


def in_the_place_of_another(bundle: Path, **changed: Any) -> Path:
    """Gives the frozen bundle a program that runs in the place of its call, with some fields of its own."""
    data = json.loads((bundle / CALL).read_bytes())
    data["programs"]["few"] = data["programs"]["call"] | {"name": "few", "slots": 0, "instead_of": "call"} | changed
    (bundle / CALL).write_text(json.dumps(data))
    manifest = json.loads((bundle / "manifest.json").read_bytes())
    manifest["pipeline"]["variants"][0]["programs"]["few"] = CALL
    (bundle / "manifest.json").write_text(json.dumps(manifest))
    rehash(bundle, CALL)
    return bundle


@pytest.mark.parametrize(
    "change",
    ["other", "inputs", "signature", "texts"],
)
def test_a_program_in_the_place_of_another_takes_and_gives_what_that_does(change, tmp_path):
    """A caller's inputs are made for the other one: of another type they would be taken for what they are not."""
    bundle = shutil.copytree(FROZEN, tmp_path / "bundle")
    with diffkiln.load(in_the_place_of_another(bundle)) as pipe:
        assert list(pipe.variants[0].narrowed(pipe.variants[0].programs["call"])) == [0]
    call = json.loads((bundle / CALL).read_bytes())["programs"]["call"]
    longer = [{**call["inputs"][0], "source": {**call["inputs"][0]["source"], "key": "attention_mask"}}]
    changed = {
        "other": {"instead_of": "none"},
        "inputs": {"inputs": [*longer, *call["inputs"][1:]]},
        "signature": {"signature": {"result": {"str": "frames"}}},
        "texts": {"texts": [{**text, "max_length": 31} for text in call["texts"]]},
    }[change]
    with pytest.raises(ManifestInvalid, match="'few' runs in the place of"):
        diffkiln.load(in_the_place_of_another(bundle, **changed))
