"""Pipelines whose shapes follow the prompt's length, recorded at a fixed one: equal to diffusers for every prompt."""

from __future__ import annotations

import copy
import json
from dataclasses import replace

import pytest
import torch
import transformers

import diffkiln
from diffkiln.compiler.compile import _recorded, check
from diffkiln.compiler.verify import Verification, call, close, components
from diffkiln.compiler.verify.reduced import shrunken
from diffkiln.errors import DataDependent, RecordError, VerifyError
from diffkiln.families import bria, cogview4, kandinsky, lumina, mochi, wan, z_image
from diffkiln.families.qwen_image import prompts
from diffkiln.interpreter.layers import repeated_blocks
from diffkiln.interpreter.portable import portable
from diffkiln.interpreter.quiet import quiet_libraries
from diffkiln.record import patches
from diffkiln.record.patches import is_patched, known_patches, of_fixed_length, outdated
from tests.coverage.calls import CALLS
from tests.coverage.calls.measure import spec_of as spec_of_folder
from tests.end_to_end.test_families import spec_of
from tests.exporters.regions import engine_cache
from tests.pipelines import WARNING_FILTERS
from tests.pipelines.tokenizers import WORDS
from tests.portably import as_recorded

pytestmark = [pytest.mark.filterwarnings(text) for text in WARNING_FILTERS]

LENGTH = 224
#: Of 1, 20 and 200 tokens, and one that is cut.
PROMPTS = {count: " ".join((WORDS * 5)[-count:]) for count in (1, 20, 200, 400)}
#: family → the largest difference from diffusers' own call
ROUNDING = {"wan": 0.0, "qwen_image": 1e-5, "lumina2": 1e-5, "z_image": 1e-5}
#: The same of families that only the calls of tests/coverage have.
MORE = {
    "mochi": 2e-5,
    "cogview4": 1e-5,
    "lumina": 1e-5,
    "bria": 1e-5,
    "latte": 1e-5,
    "kandinsky3": 1e-5,
    "bria_fibo": 1e-5,
    "ernie_image": 1e-5,
    "longcat_image": 0.0,
    "hidream": 1e-5,
}
LIMITS = ROUNDING | MORE
#: They take longest, and are for `make test-long`.
SLOW = ("bria_fibo", "cogview4", "ernie_image", "hidream", "kandinsky3", "mochi")


def spec_for(family, root, padding_side=None, **settings):
    """The spec of a family's folder, with these settings of its pipeline, and its tokenizer padding on this side."""
    folder = root / family
    with quiet_libraries():
        pipe = CALLS[family].build()
        pipe.register_to_config(**settings)
        pipe.save_pretrained(folder, safe_serialization=True)
    if padding_side:
        change_tokenizer(folder, padding_side=padding_side)
    return spec_of_folder(CALLS[family], folder)


def change_tokenizer(folder, **settings):
    file = folder / "tokenizer" / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))


def compiled(family, root, passes=(), settings=None, **inputs):
    """diffusers' own pipeline, the compiled one, and the keywords of both."""
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline

    spec = spec_for(family, root, **settings or {})
    call = spec["inputs"]["call"]
    call |= {"max_sequence_length": LENGTH} if "max_sequence_length" in call else {}
    spec["inputs"] |= {"num_inference_steps": 2, "call": call} | inputs
    built = diffkiln.compile(spec | {"passes": list(passes)}, root / "bundle", cache=engine_cache())
    with quiet_libraries(), portable():
        reference = DiffusionPipeline.from_pretrained(spec["source"]["model"])
    reference.set_progress_bar_config(disable=True)
    given = {key: value for key, value in spec["inputs"].items() if key not in ("call", "batch_size")} | call
    return reference, diffkiln.load(built.path), given


def slow_apart(names):
    """Parameters, of which the slow ones run in `make test-more`."""
    return [pytest.param(name, marks=pytest.mark.long) if name in SLOW else name for name in names]


@pytest.fixture(scope="module", params=slow_apart(LIMITS))
def both(request, tmp_path_factory):
    """The family's name, and what `compiled` gives for it."""
    made = compiled(request.param, tmp_path_factory.mktemp(request.param))
    with made[1]:
        yield request.param, *made


def difference(reference, pipe, given, **keywords):
    """The largest difference of a value, of images in [0, 1]; relative to the largest value where that is above one."""
    with quiet_libraries(), as_recorded():  # what diffusers computes and what is folded have the same bits
        want, got = (
            each(
                generator=torch.Generator().manual_seed(5),
                output_type="pt",
                return_dict=False,
                **given,
                **copy.deepcopy(keywords),
            )[0]
            for each in (reference, pipe)
        )
    assert want.shape == got.shape
    assert want.isfinite().all()
    return float((want - got).abs().max() / want.abs().max().clamp(min=1))


@pytest.mark.parametrize("count", PROMPTS)
def test_equals_diffusers_for_prompts_of_every_length(both, count):
    family, *pair = both
    assert difference(*pair, prompt=PROMPTS[count]) <= LIMITS[family]


@pytest.mark.parametrize("count", PROMPTS)
def test_equals_diffusers_for_negative_prompts_of_every_length(both, count):
    family, *pair = both
    assert difference(*pair, prompt=PROMPTS[20], negative_prompt=PROMPTS[count]) <= LIMITS[family]


def test_equals_diffusers_for_another_guidance(both):
    family, reference, pipe, given = both
    if "guidance_scale" in given:
        given = given | {"guidance_scale": 1.5 * given["guidance_scale"]}
    found = difference(reference, pipe, given, prompt=PROMPTS[20], negative_prompt=PROMPTS[1])
    assert found <= LIMITS[family]


def test_equals_diffusers_for_an_empty_negative_prompt(both):
    family, *pair = both
    assert difference(*pair, prompt=PROMPTS[20], negative_prompt="") <= LIMITS[family]


def test_equals_diffusers_where_an_empty_prompt_is_zeroed(tmp_path):
    """As the last of its batch, for which Mochi zeroes the whole batch, and as the first, for which it does not."""
    reference, pipe, given = compiled("mochi", tmp_path, settings={"force_zeros_for_empty_prompt": True}, batch_size=2)
    with pipe:
        for prompts in ([PROMPTS[200], ""], ["", PROMPTS[20]]):
            assert difference(reference, pipe, given, prompt=prompts, negative_prompt=prompts[::-1]) <= MORE["mochi"]


@pytest.mark.parametrize("family", ["kandinsky3", "bria_fibo", "ernie_image"])
def test_equals_diffusers_without_guidance(family, tmp_path):
    reference, pipe, given = compiled(family, tmp_path, guidance_scale=1.0)
    with pipe:
        for count in (20, 400):
            assert difference(reference, pipe, given, prompt=PROMPTS[count]) <= LIMITS[family]


@pytest.mark.parametrize(
    "family", slow_apart([*ROUNDING, "cogview4", "lumina", "kandinsky3", "bria_fibo", "ernie_image"])
)
def test_equals_diffusers_for_prompts_of_several_lengths_at_once(family, tmp_path):
    """Tokenizers that pad on the left, where they may: prompts that are cut keep their first tokens."""
    repeats = {} if family == "wan" else {"num_images_per_prompt": 2}
    settings = {"padding_side": "left"} if family in ("lumina", "ernie_image") else None
    reference, pipe, given = compiled(family, tmp_path, settings=settings, batch_size=2, **repeats)
    with pipe:
        for prompts in ([PROMPTS[1], PROMPTS[200]], [PROMPTS[400], PROMPTS[20]]):
            found = difference(reference, pipe, given, prompt=prompts, negative_prompt=prompts[::-1])
            assert found <= LIMITS[family]


def test_equals_diffusers_for_quotations(tmp_path):
    """They have other tokens than the same text unquoted: each character its own."""
    reference, pipe, given = compiled("longcat_image", tmp_path)
    quoting = "a sign of 'red fox' that doesn't say \u201cquiet lake\u201d, 'cat"
    with pipe:
        assert difference(reference, pipe, given, prompt=quoting, negative_prompt='"old"') == 0.0
        assert difference(reference, pipe, given, prompt="'" + PROMPTS[200] + "'") == 0.0


@pytest.mark.parametrize("family", slow_apart(["bria_fibo", "ernie_image"]))
def test_equals_diffusers_for_empty_prompts(family, tmp_path):
    """Both of a batch, and one beside another: FIBO makes it as long as that."""
    reference, pipe, given = compiled(family, tmp_path, batch_size=2)
    with pipe:
        for prompts in (["", ""], ["", PROMPTS[20]], [PROMPTS[400], ""]):
            found = difference(reference, pipe, given, prompt=prompts, negative_prompt=prompts[::-1])
            assert found <= LIMITS[family]


def only(monkeypatch, *known):
    """There are no other patches than these."""
    monkeypatch.setattr(patches, "known_patches", lambda: known)


def known(name, patches):
    """The patch of a pipeline's class."""
    return next(patch for patch in patches if name in patch.known_in.split())


def unzeroed(pipe, prompt, device=None, max_sequence_length=512, **_):
    """Wan's patch without its point: what the text encoder gives for the padding stays."""
    tokens = pipe.tokenizer(
        prompt, padding="max_length", max_length=max_sequence_length, truncation=True, return_tensors="pt"
    )
    return pipe.text_encoder(tokens.input_ids, tokens.attention_mask).last_hidden_state


def test_a_patch_of_a_call_that_is_wrong_is_found(tmp_path, monkeypatch):
    patch = known("WanPipeline", wan.PLUGIN.patches)
    only(monkeypatch, replace(patch, replacement=unzeroed, around=False))
    with pytest.raises(VerifyError, match="the recorded call of WanPipeline differs from the pipeline's own"):
        diffkiln.compile(spec_of("wan", tmp_path), tmp_path / "bundle")


def test_a_mask_that_counts_the_padding_is_found(tmp_path, monkeypatch):
    def ones(*args, **kwargs):
        embeds, mask = right(*args, **kwargs)
        return embeds, torch.ones_like(mask)

    patch = known("QwenImagePipeline", prompts.PATCHES)
    right = patch.replacement
    only(monkeypatch, replace(patch, replacement=ones))
    with pytest.raises(VerifyError, match="the recorded call of QwenImagePipeline differs"):
        diffkiln.compile(spec_of("qwen_image", tmp_path), tmp_path / "bundle")


def test_a_component_that_sees_the_padding_is_found(tmp_path, monkeypatch):
    """What diffusers' own code does with a mask is believed no more than our own."""
    from diffusers.models.transformers import transformer_qwenimage

    unmasked = lambda embeds, _mask: (embeds.shape[1], None, None)  # noqa: E731
    monkeypatch.setattr(transformer_qwenimage, "compute_text_seq_len_from_mask", unmasked)
    with pytest.raises(VerifyError, match="component 'transformer' at a fixed length: output 0 differs"):
        diffkiln.compile(spec_of("qwen_image", tmp_path), tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()


def test_a_position_that_is_off_by_one_is_found(tmp_path, monkeypatch):
    right = lumina._image_ids
    monkeypatch.setattr(lumina, "_image_ids", lambda lengths, *size: right(lengths + 1, *size))
    with pytest.raises(VerifyError, match="component 'transformer' at a fixed length: output 0 differs"):
        diffkiln.compile(spec_of("lumina2", tmp_path), tmp_path / "bundle")


def test_another_multiple_of_the_length_is_found(tmp_path, monkeypatch):
    monkeypatch.setattr(z_image, "_MULTIPLE", 16)
    with pytest.raises(VerifyError, match="component 'transformer' at a fixed length: output 0 differs"):
        diffkiln.compile(spec_of("z_image", tmp_path), tmp_path / "bundle")


def test_another_multiple_of_the_longest_prompt_is_found(tmp_path, monkeypatch):
    monkeypatch.setattr(cogview4, "_MULTIPLE", 8)
    with pytest.raises(VerifyError, match="the recorded call of CogView4Pipeline differs"):
        diffkiln.compile(spec_for("cogview4", tmp_path), tmp_path / "bundle")


def test_a_mean_over_the_padding_is_found(tmp_path, monkeypatch):
    def mean_of_all(self, x, context, context_mask):
        return x + self.attention(context.mean(dim=1, keepdim=True), context, context_mask).squeeze(1)

    *others, pool, _ = kandinsky.PLUGIN.patches
    only(monkeypatch, *others, replace(pool, replacement=mean_of_all))
    with pytest.raises(VerifyError, match="component 'unet' at a fixed length: output 0 differs"):
        diffkiln.compile(spec_for("kandinsky3", tmp_path), tmp_path / "bundle")


def test_a_token_of_the_padding_that_counts_is_found(tmp_path, monkeypatch):
    def all_count(*args, **kwargs):
        embeds, layers, none = right(*args, **kwargs)
        return torch.cat([embeds[..., :-1], torch.ones_like(embeds[..., :1])], dim=-1), layers, none

    *_, embeds, _, forward = bria.PLUGIN.patches
    right = embeds.replacement
    only(monkeypatch, replace(embeds, replacement=all_count), forward)
    with pytest.raises(VerifyError, match="the recorded call of BriaFiboPipeline differs"):
        diffkiln.compile(spec_for("bria_fibo", tmp_path), tmp_path / "bundle")


def test_attention_to_the_padding_is_found(tmp_path, monkeypatch):
    """Of a processor, too, which is not a component and no module."""

    def unmasked(self, attn, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb=None):
        seen = torch.ones_like(attention_mask)
        return mochi._attend(self, attn, hidden_states, encoder_hidden_states, seen, image_rotary_emb)

    embeds, attend = mochi.PLUGIN.patches
    only(monkeypatch, embeds, replace(attend, replacement=unmasked))
    with pytest.raises(VerifyError, match="component 'transformer' at a fixed length: output 0 differs"):
        diffkiln.compile(spec_for("mochi", tmp_path), tmp_path / "bundle")


@pytest.mark.parametrize("family", ["qwen_image", "lumina2", "z_image", "cogview4", "mochi"])
def test_large_components_in_other_types_are_verified_too(family, tmp_path, monkeypatch):
    """As twins; lengths are compared in float32, so that what bfloat16 and int8 activations round does not count."""
    check = Verification.check_component
    monkeypatch.setattr(call, "WHOLE_UP_TO", 0)
    monkeypatch.setattr(Verification, "check_component", lambda *args: args[1] == "vae" or check(*args))
    compared, twins = [], []
    monkeypatch.setattr(components, "close", lambda want, got: compared.append(want.dtype) or close(want, got))
    monkeypatch.setattr(call, "shrunken", lambda *args: twins.append(shrunken(*args)) or twins[-1])
    spec = spec_for(family, tmp_path)
    spec["source"]["dtype"] = "bfloat16"
    spec["passes"] = [{"name": "quantize", "mapping": {"transformer": {"type": "int8_dynamic"}}}]
    diffkiln.compile(spec, tmp_path / "bundle")
    assert set(compared) == {torch.float32}
    lists = {"qwen_image": set(), "lumina2": {3}, "z_image": {3}, "cogview4": {1}, "mochi": {1}}
    kept = [[name.rpartition(".")[0] for name, _ in repeated_blocks(twin)] for twin in twins if is_patched(twin)]
    assert {len(names) for names in kept} == {len(set(names)) for names in kept} == lists[family]


@pytest.mark.parametrize("family", ["qwen_image", "z_image", "mochi", "bria", "bria_fibo", "cogview4"])
def test_a_tokenizer_that_pads_on_the_other_side_is_refused(family, tmp_path):
    side = "right" if family == "cogview4" else "left"
    spec = spec_for(family, tmp_path, padding_side=side)
    with pytest.raises(RecordError, match=f"pads on the {side}"):
        diffkiln.compile(spec, tmp_path / "bundle")


@pytest.mark.parametrize(
    ("setting", "told"),
    [({"model_max_length": 10**30}, 'Set "model_max_length"'), ({"pad_token": None}, 'Set "pad_token"')],
)
def test_a_tokenizer_that_gives_no_length_is_refused(setting, told, tmp_path):
    spec = spec_for("ernie_image", tmp_path)
    change_tokenizer(tmp_path / "ernie_image", **setting)
    with pytest.raises(RecordError, match=told):
        diffkiln.compile(spec, tmp_path / "bundle")


def test_prompts_that_a_language_model_writes_are_refused(tmp_path):
    with quiet_libraries():
        pipe = CALLS["ernie_image"].build()
        config = pipe.text_encoder.config
        pipe.register_modules(pe=transformers.MistralForCausalLM(config), pe_tokenizer=pipe.tokenizer)
        pipe.save_pretrained(tmp_path / "model", safe_serialization=True)
    spec = spec_of_folder(CALLS["ernie_image"], tmp_path / "model")
    del spec["inputs"]["call"]["use_pe"]
    with pytest.raises(RecordError, match=r'Set "use_pe" to false in inputs\.call'):
        diffkiln.compile(spec, tmp_path / "bundle")
    spec = spec_for("longcat_image", tmp_path)
    del spec["inputs"]["call"]["enable_prompt_rewrite"]
    with pytest.raises(RecordError, match=r'Set "enable_prompt_rewrite" to false in inputs\.call'):
        diffkiln.compile(spec, tmp_path / "bundle")


def test_a_family_that_has_no_fixed_length_is_refused_with_the_reason(tmp_path):
    told = "as many tokens as the longest prompt has, without a mask.*cut by the characters.*on_unrecordable"
    with pytest.raises(DataDependent, match=told):
        diffkiln.compile(spec_for("kandinsky5_video", tmp_path), tmp_path / "bundle")


def test_another_text_of_a_method_that_is_refused_is_not_said_to_be_recorded(monkeypatch):
    only(monkeypatch, *(replace(patch, prints={patch.method: "another"}) for patch in known_patches()))
    assert "Kandinsky5" not in outdated(CALLS["kandinsky5_video"].build())
    told = outdated(CALLS["longcat_image"].build())
    assert "diffusers' LongCatImagePipeline._encode_prompt" in told
    assert "rewire_prompt" not in told


def test_components_of_fixed_length_are_named():
    expected = {"wan": set(), "qwen_image": {"text_encoder", "transformer"}, "lumina2": {"transformer"}}
    expected |= {
        "mochi": set(),
        "cogview4": {"text_encoder", "transformer"},
        "bria": {"text_encoder"},
        "kandinsky3": {"unet"},
    }
    for family, names in expected.items():
        assert of_fixed_length(CALLS[family].build(), {"max_sequence_length": LENGTH}) == names


def test_engines_that_do_not_fit_diffusers_own_call_are_told(tmp_path):
    told = []
    with quiet_libraries():
        for family in ("wan", "z_image"):
            spec = spec_of(family, tmp_path) | {"passes": [{"name": "compile", "component": "transformer"}]}
            told += [notice for notice in _recorded(check(spec)).notices if "the engines" in notice]
    assert len(told) == 1
    assert "the engines of transformer are for prompts padded to a fixed length" in told[0]


def test_another_text_of_the_method_is_refused_and_told(tmp_path, monkeypatch):
    only(monkeypatch, *(replace(patch, prints={patch.method: "another"}) for patch in known_patches()))
    told = r"another version of diffusers' WanPipeline\._get_t5_prompt_embeds.*on_unrecordable"
    with pytest.raises(DataDependent, match=told):
        diffkiln.compile(spec_of("wan", tmp_path), tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_prompt_that_is_cut_keeps_its_first_tokens(side):
    ids = torch.tensor([[7, 8, 9, 10], [5, 6, 0, 0]] if side == "right" else [[7, 8, 9, 10], [0, 0, 5, 6]])
    kept, mask = lumina._cut(ids, ids.ne(0).long(), torch.tensor(3), side, pad_id=0)
    expected = [[7, 8, 9, 0], [5, 6, 0, 0]] if side == "right" else [[0, 7, 8, 9], [0, 0, 5, 6]]
    assert kept.tolist() == expected
    assert mask.tolist() == kept.ne(0).long().tolist()


def test_close_means_type_shape_and_rounding_of_the_largest():
    a = torch.tensor([100.0, 1.0])
    assert close(a, a + torch.tensor([0.0, 5e-4]))
    assert not close(a, a + torch.tensor([0.0, 5e-3]))
    assert not close(a, a.double())
    assert not close(a, a[:1])
    for broken in (float("nan"), float("inf")):
        assert not close(a, torch.tensor([100.0, broken]))
        assert not close(torch.tensor([100.0, broken]), a)
