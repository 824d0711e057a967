"""quantize: every backend and type, chosen by patterns, mapped to components."""

import re

import pytest
import torch

from diffkiln.errors import IllegalPlan, SpecError
from diffkiln.passes import manager
from diffkiln.passes.model.quantize import Quantize
from diffkiln.passes.registry import pass_class
from diffkiln.passes.variants import constant
from tests.passes.plans import A100, CPU, H200, both, checked, ghost, placed, real, types

INT8 = {"name": "quantize", "component": "transformer", "type": "int8_weight_only"}


def _entry(backend, kind, **options):
    return {"name": "quantize", "component": "transformer", "backend": backend, "type": kind, **options}


#: What the specs say, how many of the float32 bytes the layers take, and what is lost, as relative L2 of their results.
TYPES = {
    "int8_weight_only": (_entry("torchao", "int8_weight_only"), 0.27, 0.02),
    "int8_dynamic": (_entry("torchao", "int8_dynamic"), 0.27, 0.03),
    "int4_weight_only": (_entry("torchao", "int4_weight_only", group_size=16), 0.19, 0.15),
    "float8_weight_only": (_entry("torchao", "float8_weight_only"), 0.27, 0.05),
    "float8_dynamic": (_entry("torchao", "float8_dynamic"), 0.27, 0.06),
    "float8_dynamic, per tensor": (_entry("torchao", "float8_dynamic", granularity="per_tensor"), 0.27, 0.06),
    "bitsandbytes int8": (_entry("bitsandbytes", "int8"), 0.27, 0.02),
    "nf4": (_entry("bitsandbytes", "nf4"), 0.16, 0.15),
    "nf4, double": (_entry("bitsandbytes", "nf4", double_quant=True), 0.16, 0.15),
    "fp4": (_entry("bitsandbytes", "fp4"), 0.16, 0.2),
    "quanto int8": (_entry("quanto", "int8"), 0.27, 0.02),
}


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
@pytest.mark.parametrize("kind", TYPES)
def test_ghost_and_module_come_out_alike(kind, dtype):
    first = [{"name": "cast", "component": "transformer", "dtype": dtype}] if dtype else []
    shadow, module = both("flux", "transformer", *first, TYPES[kind][0])
    assert types(shadow) == types(module)
    assert {torch.int8, torch.uint8, torch.float8_e4m3fn} & {dtype for _, dtype in types(module).values()}


@pytest.mark.parametrize("kind", TYPES)
def test_quantized_layers_take_as_few_bytes_as_promised(kind):
    """Scales included; the layers are as wide as those of real models are at least."""
    from torch import nn

    from diffkiln.models.weights import weights_of

    module = nn.Sequential(nn.Linear(256, 512, bias=False), nn.Linear(512, 256, bias=False)).requires_grad_(False)
    before = sum(tensor.nbytes for _, tensor in weights_of(module))
    (item,) = placed(TYPES[kind][0])
    item.step.apply(module)
    after = sum(tensor.numel() * tensor.itemsize for _, tensor in weights_of(module))
    assert after <= TYPES[kind][1] * before


@pytest.mark.parametrize("kind", TYPES)
def test_values_are_close_to_the_originals(kind):
    entry, _, limit = TYPES[kind]
    before = real("flux", "transformer")
    _, module = both("flux", "transformer", entry)
    for name, layer in module.named_modules():
        if isinstance(layer, torch.nn.Linear):
            x = torch.randn(4, layer.in_features, generator=torch.Generator().manual_seed(0))
            want, got = before.get_submodule(name)(x), layer(x)
            assert (want - got).norm() <= limit * want.norm() + 1e-6, name


@pytest.mark.parametrize("kind", TYPES)
def test_rows_of_zeros_stay_zeros(kind):
    layer = torch.nn.Linear(64, 32, bias=False).requires_grad_(False)
    layer.weight[3:7] = 0
    module = torch.nn.Sequential(layer)
    (item,) = placed(TYPES[kind][0])
    item.step.apply(module)
    x = torch.randn(1, 8, 64)
    x[:, 2] = 0
    with torch.inference_mode():
        found = module(x)
    assert found.isfinite().all()
    assert not found[:, :, 3:7].any()
    assert not found[:, 2].any()


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_four_bits_are_unpacked_as_bitsandbytes_does(kind, double):
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    layer = torch.nn.Linear(128, 130, bias=False).requires_grad_(False)
    packed, state = quantize_4bit(layer.weight, blocksize=64, compress_statistics=double, quant_type=kind)
    wanted = dequantize_4bit(packed, state)
    (item,) = placed(_entry("bitsandbytes", kind, double_quant=double))
    item.step.apply(torch.nn.Sequential(layer))
    assert torch.equal(layer.weight, wanted)


def test_four_bits_of_rows_that_are_no_multiple_of_a_block():
    """bitsandbytes 0.50's own kernel for CPUs loses three times as much there: it begins a block with each row."""
    layer = torch.nn.Linear(96, 130, bias=False).requires_grad_(False)
    before = layer.weight.clone()
    (item,) = placed(_entry("bitsandbytes", "nf4"))
    item.step.apply(torch.nn.Sequential(layer))
    assert (layer.weight - before).norm() <= 0.1 * before.norm()


@pytest.mark.parametrize("backend", ["bitsandbytes", "quanto"])
def test_a_backend_that_is_not_installed_names_the_extra(monkeypatch, backend):
    monkeypatch.setattr("diffkiln.passes.model.quantize.base.find_spec", lambda _: None)
    plan = ghost("flux")
    with pytest.raises(IllegalPlan, match=rf"is not installed\. pip install 'diffkiln\[{backend}\]'") as caught:
        checked(plan, _entry(backend, "int8"))
    assert caught.value.problems[0].where == "$.passes[0].backend"


@pytest.mark.parametrize(("target", "legal"), [(H200, True), (A100, False), (CPU, True)])
def test_float8_dynamic_needs_sm_8_9(target, legal):
    entry = TYPES["float8_dynamic, per tensor"][0]
    plan = ghost("flux")
    if legal:
        checked(plan, entry, target=target)
        return
    with pytest.raises(IllegalPlan, match=r"needs SM 8\.9 or later, and nvidia-a100-80gb-sxm has SM 8\.0") as caught:
        checked(plan, entry, target=target)
    assert "float8_weight_only" in caught.value.problems[0].hint


def test_float8_dynamic_per_row_is_for_bfloat16_on_a_gpu():
    entry = TYPES["float8_dynamic"][0]
    with pytest.raises(IllegalPlan, match="per_row is for bfloat16 weights"):
        checked(ghost("flux"), entry, target=H200)
    checked(ghost("flux"), {"name": "cast", "component": "transformer", "dtype": "bfloat16"}, entry, target=H200)


def test_bitsandbytes_layers_are_not_compiled_and_the_reason_is_told():
    compile_ = {"name": "compile", "component": "transformer"}
    with pytest.raises(IllegalPlan, match=r"\$\.passes\[1\]: compile cannot follow quantize: bitsandbytes"):
        checked(ghost("flux"), TYPES["nf4"][0], compile_)
    checked(ghost("flux"), TYPES["quanto int8"][0], compile_)


def test_several_types_in_one_component_take_turns():
    first = _entry("bitsandbytes", "nf4", include=["transformer_blocks.*"])
    shadow, module = both("flux", "transformer", first, INT8)
    assert types(shadow) == types(module)
    names = set(types(module))
    assert any(name.startswith("transformer_blocks.0.") and name.endswith("weight_table") for name in names)
    assert any(name.startswith("single_transformer_blocks.0.") and name.endswith("weight.qdata") for name in names)
    with pytest.raises(IllegalPlan, match="quantized already, by an earlier quantize"):
        checked(ghost("flux"), INT8, first)


def test_a_mapping_gives_each_component_its_own():
    mapping = {
        "transformer": {"type": "int8_weight_only"},
        "text_encoder_2": {"backend": "bitsandbytes", "type": "nf4"},
    }
    steps = checked(ghost("flux"), {"name": "quantize", "mapping": mapping})
    assert [(item.step.component, item.step.type, item.where) for item in steps] == [
        ("transformer", "int8_weight_only", "$.passes[0].mapping.transformer"),
        ("text_encoder_2", "nf4", "$.passes[0].mapping.text_encoder_2"),
    ]


@pytest.mark.parametrize(
    ("entry", "where"),
    [
        ({"mapping": {}}, "$.passes[0].mapping"),
        ({"mapping": {"vae": {"type": "int9"}}}, "$.passes[0].mapping.vae.type"),
        ({"mapping": {"vae": {"type": "nf4"}}}, "$.passes[0].mapping.vae.type"),
        ({"mapping": {"vae": {"component": "vae", "type": "nf4"}}}, "$.passes[0].mapping.vae.component"),
        ({"component": "vae", "mapping": {"vae": {"type": "int8_dynamic"}}}, "$.passes[0].component"),
        ({"component": "vae", "type": "int8", "backend": "torchao"}, "$.passes[0].type"),
        ({"component": "vae", "type": "int8_dynamic", "group_size": 32}, "$.passes[0].group_size"),
        ({"component": "vae", "type": "int8_dynamic", "double_quant": True}, "$.passes[0].double_quant"),
    ],
)
def test_wrong_options_are_named_by_their_place(entry, where):
    with pytest.raises(SpecError) as caught:
        placed({"name": "quantize", **entry})
    assert where in [problem.where for problem in caught.value.problems]


def test_layers_that_a_type_cannot_hold_stay_and_are_counted():
    plan = ghost("flux")
    entry = _entry("torchao", "int4_weight_only", group_size=64)
    wide = [
        part.in_features % 64 == 0
        for part in plan.modules["transformer"].modules()
        if isinstance(part, torch.nn.Linear)
    ]
    plan, report = manager.run(plan, checked(plan, entry))
    assert report[0].notes[0].startswith(f"{sum(wide)} linear layers")
    assert report[0].notes[1].startswith(f"{len(wide) - sum(wide)} linear layers")
    assert "int4_weight_only does not hold their shapes" in report[0].notes[1]


def test_notes_say_what_each_pattern_touches():
    plan = ghost("flux")
    module = real("flux", "transformer")
    norms = [part.weight.numel() for name, part in module.named_modules() if "norm" in name and _linear(part)]
    _, report = manager.run(plan, checked(plan, INT8 | {"exclude": ["*norm*"]}))
    assert f"exclude *norm*: {len(norms)} linear layers, {sum(norms)} weights" in report[0].notes


def _linear(part):
    return isinstance(part, torch.nn.Linear)


def test_patterns_choose_layers():
    _, module = both(
        "flux", "transformer", INT8 | {"include": ["transformer_blocks.*"], "exclude": ["*norm*", "*.ff.*"]}
    )
    quantized = {name.removesuffix(".weight.qdata") for name in types(module) if name.endswith(".qdata")}
    assert quantized
    assert all(name.startswith("transformer_blocks.") for name in quantized)
    assert not any("norm" in name or ".ff." in name for name in quantized)


def test_norms_convolutions_and_embeddings_stay():
    _, module = both("flux", "transformer", INT8)
    left = {name for name, (_, dtype) in types(module).items() if name.endswith(".weight") and dtype == torch.float32}
    assert left == {
        f"{name}.weight"
        for name, part in module.named_modules()
        if hasattr(part, "weight") and part.weight is not None and not isinstance(part, torch.nn.Linear)
    }


def test_pattern_that_matches_nothing_is_refused_by_its_place():
    plan = ghost("flux")
    with pytest.raises(IllegalPlan, match=r"\$\.passes\[0\]\.exclude\[1\].*nrom"):
        checked(plan, INT8 | {"exclude": ["*norm*", "*nrom*"]})


@pytest.mark.parametrize("field", ["include", "exclude"])
def test_pattern_that_names_what_holds_layers_is_refused_with_the_mend(field):
    """`*.attn` alone would exclude nothing: patterns are compared with the names of layers, not with their parents'."""
    plan = ghost("flux")
    with pytest.raises(IllegalPlan, match=rf'{field}\[0\]: the pattern .* Did you mean "\*\.attn\.\*"') as caught:
        checked(plan, INT8 | {field: ["*.attn"]})
    assert caught.value.problems[0].where == f"$.passes[0].{field}[0]"
    checked(plan, INT8 | {field: ["*.attn.*"]})


def test_what_is_no_linear_layer_may_be_excluded():
    plan = ghost("sdxl")
    checked(plan, INT8 | {"component": "unet", "exclude": ["*norm*"]})


def test_a_layer_that_shares_its_weight_stays():
    module = torch.nn.ModuleDict({"embed": torch.nn.Embedding(64, 32), "inner": torch.nn.Linear(32, 32)})
    module["head"] = torch.nn.Linear(32, 64, bias=False)
    module["head"].weight = module["embed"].weight
    (item,) = placed(INT8)
    assert not list(item.step.check_module(module, None, None, "$"))
    assert item.step.apply(module)[0].startswith("1 linear layers, 1024 weights")
    assert module["head"].weight is module["embed"].weight
    assert list(item.step.model_copy(update={"include": ("head",)}).check_module(module, None, None, "$"))


def test_nothing_left_to_quantize_is_refused():
    plan = ghost("flux")
    with pytest.raises(IllegalPlan, match="no linear layer"):
        checked(plan, INT8 | {"exclude": ["*"]})


def test_notes_say_how_much_was_quantized():
    plan = ghost("flux")
    _, report = manager.run(plan, checked(plan, INT8))
    layers = sum(isinstance(part, torch.nn.Linear) for part in real("flux", "transformer").modules())
    assert report[0].notes[0].startswith(f"{layers} linear layers, ")


KINDS = pass_class("quantize").variants()
FOREIGN = [
    (called, option)
    for called, model in KINDS.items()
    for option in sorted({name for other in KINDS.values() for name in other.own_fields()} - {*model.own_fields()})
]


@pytest.mark.parametrize(("called", "option"), FOREIGN, ids="-".join)
def test_every_option_of_every_other_type_is_refused_by_name(called, option):
    entry = _entry(*(constant(KINDS[called], field) for field in KINDS[called].discriminators))
    assert isinstance(placed(entry)[0].step, KINDS[called])
    with pytest.raises(SpecError) as caught:
        placed(entry | {option: True})
    (problem,) = caught.value.problems
    assert (problem.where, problem.reason) == (f"$.passes[0].{option}", f"{called} has no option {option}")
    assert problem.hint.startswith("It has include, exclude")


@pytest.mark.parametrize(
    ("options", "where", "told"),
    [
        ({"backend": "torcho", "type": "int8"}, "backend", "no backend 'torcho'. Did you mean \"torchao\"?"),
        ({"backend": "quanto"}, "type", "this field is missing. Add it: Type of the quantized weights"),
        ({"backend": "quanto", "type": "int9"}, "type", "no type 'int9'. Did you mean \"int8\"?"),
        (
            {"type": "nf4"},
            "type",
            'nf4 is not a type of torchao. Set "backend": "bitsandbytes", or choose one of int8_',
        ),
        ({"type": ["nf4"]}, "type", 'must be text, not ["nf4"]'),
    ],
)
def test_an_unknown_type_is_refused_with_the_nearest(options, where, told):
    with pytest.raises(SpecError, match=re.escape(told)) as caught:
        placed({"name": "quantize", "component": "transformer", **options})
    assert [problem.where for problem in caught.value.problems] == [f"$.passes[0].{where}"]


def test_types_are_quantize():
    assert all(issubclass(model, Quantize) for model in KINDS.values())
    assert len(KINDS) == 9
