"""A recording that is wrong is found before anything is built."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from torch import nn

import diffkiln
from diffkiln.compiler.compile import check
from diffkiln.compiler.tokenizers import tokenizers_of
from diffkiln.compiler.verify import Verification, difference, same, shrunken
from diffkiln.compiler.verify import call as calls
from diffkiln.compiler.verify.cases import Lengths, cases_of
from diffkiln.errors import VerifyError
from diffkiln.interpreter.quiet import quiet_libraries
from diffkiln.models.meta import load_module
from diffkiln.program import Op, Ref
from diffkiln.record import patches
from diffkiln.record.components import repeated_blocks
from diffkiln.record.constants import Constants
from diffkiln.record.patches import Patch, fingerprint
from diffkiln.record.pipeline import record
from diffkiln.runtime.text import TextEnd
from tests.conftest import DIGITS
from tests.end_to_end.test_families import spec_of
from tests.pipelines import WARNING_FILTERS

pytestmark = [pytest.mark.filterwarnings(text) for text in WARNING_FILTERS]


@pytest.fixture(scope="module")
def checked(tmp_path_factory):
    return check(spec_of("sd", tmp_path_factory.mktemp("sd")))


@pytest.fixture
def recording(checked):
    with quiet_libraries():
        return record(checked.pipe, checked.requests, Constants())


def verified(checked, recording):
    made = Verification(checked.pipe, recording)
    with quiet_libraries():
        made.check_call(checked.requests[0], recording.calls[0])
    return made


def changed(program, index, **fields):
    ops = list(program.ops)
    ops[index] = replace(ops[index], **fields)
    return replace(program, ops=tuple(ops))


def position(program, name, nth=0):
    return [index for index, op in enumerate(program.ops) if op.name == name][nth]


def test_a_true_recording_passes(checked, recording):
    made = verified(checked, recording)
    with quiet_libraries():
        for name in checked.state.modules:
            made.check_component(name, load_module(checked.source, name))


def test_prompts_that_are_made_to_be_compared_warn_of_no_cut(checked, recording, caplog):
    end = TextEnd(tokenizers_of(recording, checked.pipe))
    (programs,) = recording.calls
    assert len(list(cases_of(programs, checked.requests[0], Lengths(end, programs)))) > 1
    assert not caplog.records


def test_one_wrong_number_in_the_call_is_found(checked, recording):
    call = recording.calls[0]["call"]
    index = position(call, "aten.mul.Tensor", -1)
    op = call.ops[index]
    recording.calls[0]["call"] = changed(call, index, args=(op.args[0], op.args[0]))
    with pytest.raises(VerifyError, match=r"differs from the pipeline's own for prompt='a'"):
        verified(checked, recording)


def test_a_prompt_that_is_changed_another_way_is_found(checked, recording):
    """Transforms that matter for some prompts only: one token would not show it."""
    for name, call in recording.calls[0].items():
        texts = tuple({**text, "transforms": ["collapse_whitespace", "lower"]} for text in call.texts)
        texts = tuple({**text, "max_length": text["max_length"], "truncation_side": "left"} for text in texts)
        recording.calls[0][name] = replace(call, texts=texts)
    with pytest.raises(VerifyError, match="differs from the pipeline's own"):
        verified(checked, recording)


def test_noise_of_another_order_is_found(checked, recording):
    for name in ("call", "call+negative"):
        call = recording.calls[0][name]
        noise = call.ops[position(call, "noise")]
        extra = Op("noise", (), ("%extra",), attrs=noise.attrs)
        types = {**call.types, "%extra": call.types[noise.outputs[0]]}
        recording.calls[0][name] = replace(call, ops=(extra, *call.ops), types=types)
    with pytest.raises(VerifyError):
        verified(checked, recording)


def test_a_wrong_operation_in_a_component_is_found(checked, recording):
    made = verified(checked, recording)
    module = recording.modules["vae"]
    (name, program), *_ = module.programs.items()
    index = next(i for i, op in enumerate(program.ops) if op.name == "aten.silu.default")
    recording.modules["vae"] = replace(module, programs={name: changed(program, index, name="aten.relu.default")})
    with pytest.raises(VerifyError, match=r"component 'vae', program 'vae.decode': output 0 of the replay differs"):
        made.check_component("vae", load_module(checked.source, "vae"))


def test_the_last_bits_of_a_folded_table_are_found(checked, recording):
    made = verified(checked, recording)
    (program,) = recording.modules["unet"].programs.values()
    (key, *_) = (key for key in program.constants if recording.constants.tensors[key].numel() > 1)
    table = recording.constants.tensors[key]
    recording.constants.tensors[key] = torch.nextafter(table, torch.full_like(table, 2.0))
    with pytest.raises(VerifyError, match=r"component 'unet', program 'unet': output 0 of the replay differs"):
        made.check_component("unet", load_module(checked.source, "unet"))


def test_methods_that_counted_prompts_do_not_need_replaced_are_left_alone(checked, recording, monkeypatch):
    module = load_module(checked.source, "unet")

    def doubled(original):
        return lambda *args, **kwargs: (original(*args, **kwargs)[0] * 2,)

    prints = {"forward": fingerprint(type(module).forward)}
    spoiled = Patch(prints, doubled, around=True, uncounted=True)
    monkeypatch.setattr(patches, "known_patches", lambda: (spoiled,))
    with quiet_libraries(), pytest.raises(VerifyError, match="component 'unet'"):
        verified(checked, recording).check_component("unet", module)
    requests = tuple(replace(request, tokens={"prompt": 1}) for request in recording.requests)
    verified(checked, replace(recording, requests=requests)).check_component("unet", module)


def test_large_components_are_verified_as_twins(checked, recording, monkeypatch):
    made = verified(checked, recording)
    monkeypatch.setattr(calls, "WHOLE_UP_TO", 0)
    used = []
    monkeypatch.setattr(calls, "shrunken", lambda *args: used.append(shrunken(*args)) or used[-1])
    with quiet_libraries():
        for name in ("unet", "text_encoder"):
            made.check_component(name, load_module(checked.source, name))
    assert len(used) == 4
    for twin in used:
        kinds = [type(block) for _, block in repeated_blocks(twin)]
        assert len(kinds) == len(set(kinds))


def test_a_twin_shares_weights_and_leaves_the_original_alone():
    class Block(nn.Linear):
        pass

    class Model(nn.Module):
        _repeated_blocks = ("Block",)

        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList(Block(2, 2) for _ in range(4))

    model = Model()
    twin = shrunken(model)
    assert [len(model.blocks), len(twin.blocks)] == [4, 1]
    assert twin.blocks[0].weight is model.blocks[0].weight


def test_equal_means_type_shape_and_every_bit_that_counts():
    a = torch.tensor([1.0, float("nan")])
    assert same(a, a.clone())
    assert not same(a, a.double())
    assert not same(a, a[:1])
    assert not same(a, torch.tensor([1.0, 2.0]))
    assert "1 of 2 values differ, by up to 1.000e+00" in difference(torch.zeros(2), torch.tensor([0.0, 1.0]))
    assert Ref("%x") == Ref("%x")


def test_types_that_do_not_go_together_are_told_with_the_mend(tmp_path):
    """diffusers fails too where only one of two text encoders is cast: its transformer takes both results."""
    spec = json.loads((DIGITS / "spec.json").read_text())
    spec["passes"] = [{"name": "cast", "component": "text_encoder_2", "dtype": "bfloat16"}]
    with pytest.raises(VerifyError, match=r"component 'transformer' .* fails on what .* to the same"):
        diffkiln.compile(spec, tmp_path / "bundle", base=DIGITS)
    assert not (tmp_path / "bundle").exists()
