"""fuse_qkv: really fused, originals gone, results the same; refused where diffusers would ignore it."""

import pytest
import torch

from diffkiln.errors import IllegalPlan
from tests.passes.plans import both, checked, ghost, placed, real, types
from tests.pipelines import FAMILIES, WARNING_FILTERS

pytestmark = [pytest.mark.filterwarnings(text) for text in WARNING_FILTERS]
DENOISERS = {"sd": "unet", "sdxl": "unet"}


def component(family):
    return DENOISERS.get(family, "transformer")


def fuse(family):
    return {"name": "fuse_qkv", "component": component(family)}


@pytest.mark.parametrize("family", ["flux", "sdxl", "sd", "pixart_sigma", "chroma", "auraflow", "wan", "cogvideox"])
def test_ghost_and_module_come_out_alike_without_the_originals(family):
    shadow, module = both(family, component(family), fuse(family))
    assert types(shadow) == types(module)
    fused = [name for name in types(module) if ".to_qkv." in name or ".to_kv." in name]
    assert fused
    for name in fused:
        path = name[: name.index(".to_")]
        gone = ("to_q", "to_k", "to_v") if ".to_qkv." in name else ("to_k", "to_v")
        assert not any(f"{path}.{original}.weight" in types(module) for original in gone)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_what_is_accepted_gives_the_same_result_and_what_is_refused_has_a_reason(family):
    """The check tells the truth for every family: fused and without the originals, every attention still runs."""
    plan, _ = ghost(family)
    try:
        checked(plan, fuse(family))
    except IllegalPlan as error:
        refusal = str(error)
    else:
        refusal = ""
    if refusal:
        assert type(plan.modules[component(family)]).__name__ in refusal
        return
    module, fused = real(family, component(family)), real(family, component(family))
    (step,) = placed(fuse(family))
    step.step.apply(fused)
    seen = _attention_inputs(family, module)
    assert seen
    for name, (args, kwargs) in seen.items():
        with torch.inference_mode():
            want, got = (part.get_submodule(name)(*args, **kwargs) for part in (module, fused))
        for a, b in zip(_tensors(want), _tensors(got), strict=True):
            torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-5)


def _attention_inputs(family, module):
    """What every attention that can fuse is called with, while the pipeline draws."""
    seen = {}

    def watch(name):
        def hook(_module, args, kwargs):
            seen.setdefault(name, (args, kwargs))

        return hook

    for name, part in module.named_modules():
        if callable(getattr(part, "fuse_projections", None)):
            part.register_forward_pre_hook(watch(name), with_kwargs=True)
    pipe = FAMILIES[family].build()
    setattr(pipe, component(family), module)
    pipe.set_progress_bar_config(disable=True)
    with torch.inference_mode():
        pipe(prompt="a red fox", output_type="latent", **FAMILIES[family].call | {"num_inference_steps": 1})
    for part in module.modules():
        part._forward_pre_hooks.clear()
    return seen


def _tensors(result):
    return [result] if isinstance(result, torch.Tensor) else [item for item in result if item is not None]


@pytest.mark.parametrize("family", ["ltx", "qwen_image", "sana"])
def test_refused_where_diffusers_would_ignore_it(family):
    plan, _ = ghost(family)
    with pytest.raises(IllegalPlan):
        checked(plan, fuse(family))


def test_refused_where_the_fused_processor_would_leave_out_norms():
    """SD 3.5 normalises queries and keys; the processor that diffusers swaps in for fused projections does not."""
    plan, _ = ghost("sd3")
    with pytest.raises(IllegalPlan, match=r"FusedJointAttnProcessor2_0 leaves out transformer_blocks\.0\.attn\.norm_q"):
        checked(plan, fuse("sd3"))


def test_refused_after_quantization():
    plan, _ = ghost("flux")
    quantize = {"name": "quantize", "component": "transformer", "type": "int8_weight_only"}
    with pytest.raises(IllegalPlan, match="must come before quantize"):
        checked(plan, quantize, fuse("flux"))
