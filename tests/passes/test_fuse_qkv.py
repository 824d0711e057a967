"""fuse_qkv: really fused, originals gone, results the same; refused where diffusers would ignore it."""

import copy
from functools import cache

import pytest
import torch

from diffkiln.errors import IllegalPlan
from diffkiln.passes.base import State
from diffkiln.passes.model.fuse_qkv import FuseQKV
from tests import coverage
from tests.passes.plans import CPU, both, checked, ghost, placed, real, types
from tests.pipelines import FAMILIES, WARNING_FILTERS

pytestmark = [pytest.mark.filterwarnings(text) for text in WARNING_FILTERS]
FUSE = {"name": "fuse_qkv", "component": "transformer"}
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


CASES = [*((family, component(family)) for family in sorted(FAMILIES)), ("sd", "vae"), ("flux2", "vae"), ("wan", "vae")]


@pytest.mark.parametrize(("family", "name"), CASES)
def test_check_tells_what_fusing_really_does(family, name):
    """Tried with diffusers' own method: accepted is what works, and works the same without the originals."""
    module = real(family, name)
    run = cache(lambda: _recorded_call(family, name))
    plan = ghost(family)
    step = {"name": "fuse_qkv", "component": name}
    if _what_diffusers_does(module, lambda module: run()(module)) != "works":
        with pytest.raises(IllegalPlan, match=type(module).__name__):
            checked(plan, step)
        return
    checked(plan, step)
    fused = copy.deepcopy(module)
    (item,) = placed(step)
    item.step.apply(fused)
    assert _difference(run()(module), run()(fused)) <= 1e-5


def _what_diffusers_does(module, run):
    if not callable(getattr(module, "fuse_qkv_projections", None)):
        return "no way to fuse"
    fused = copy.deepcopy(module)
    fused.fuse_qkv_projections()
    made = dict(fused.named_parameters()).keys() - dict(module.named_parameters()).keys()
    if not made:
        return "nothing fused"
    if _difference(run(module), run(fused)) > 1e-5:
        return "another result"
    for name in made:
        fused.get_parameter(name).data.fill_(float("nan"))
    return "works" if run(fused).isnan().any() else "ignored"


def _recorded_call(family, name):
    """A function that calls a module of this class as the pipeline called its own."""
    calls = []
    method = "decode" if name == "vae" else "forward"

    def listening(*args, **kwargs):
        calls.append((args, kwargs))
        return original(*args, **kwargs)

    pipe = FAMILIES[family].build()
    original = getattr(pipe.components[name], method)
    setattr(pipe.components[name], method, listening)
    end = "pt" if name == "vae" else "latent"
    with torch.inference_mode():
        pipe(prompt="a red fox", output_type=end, **FAMILIES[family].call | {"num_inference_steps": 1})
    args, kwargs = calls[0]

    def run(module):
        with torch.no_grad():
            result = getattr(module, method)(*args, **kwargs)
        result = getattr(result, "sample", result)
        while not isinstance(result, torch.Tensor):
            result = result[0]
        return result

    return run


def _difference(want, got):
    """Relative L2; NaN counts as different."""
    found = float((got - want).norm() / want.norm())
    return found if found == found else float("inf")


def _seeded(module):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for weight in module.eval().requires_grad_(False).parameters():
            weight.copy_(torch.randn_like(weight) / 4)
    return module


def _checks(module):
    """Raises IllegalPlan if the module may not be fused."""
    checked(State("Pipeline", {"transformer": copy.deepcopy(module).to("meta")}), FUSE)


def _sd3(**options):
    from diffusers import SD3Transformer2DModel

    sizes = {"sample_size": 8, "num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 16}
    widths = {"caption_projection_dim": 32, "joint_attention_dim": 32, "pooled_projection_dim": 16}
    return _seeded(SD3Transformer2DModel(**sizes, **widths, pos_embed_max_size=16, **options))


def _call_sd3(module):
    draw = torch.Generator().manual_seed(1)
    latents, text, pooled = (torch.randn(*shape, generator=draw) for shape in [(2, 16, 8, 8), (2, 7, 32), (2, 16)])
    return module(latents, text, pooled, torch.tensor([500.0, 500.0])).sample


def test_sd3_without_norms_is_fused():
    module = _sd3()
    _checks(module)
    fused = copy.deepcopy(module)
    placed(FUSE)[0].step.apply(fused)
    assert fused.transformer_blocks[0].attn.to_q is None
    assert _difference(_call_sd3(module), _call_sd3(fused)) <= 1e-5


def test_refused_where_the_fused_processor_would_read_a_text_that_is_not_there():
    module = _sd3(dual_attention_layers=(0,))
    with pytest.raises(IllegalPlan, match=r"reads a text stream, which transformer_blocks\.0\.attn2 lacks"):
        _checks(module)
    module.fuse_qkv_projections()
    with pytest.raises(AttributeError):
        _call_sd3(module)


def test_refused_where_diffusers_raises_for_added_projections():
    from diffusers import UNet2DConditionModel

    module = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 8),
        down_block_types=("SimpleCrossAttnDownBlock2D", "DownBlock2D"),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        up_block_types=("UpBlock2D", "SimpleCrossAttnUpBlock2D"),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=4,
        cross_attention_dim=8,
    )
    with pytest.raises(IllegalPlan, match="diffusers refuses AttnAddedKVProcessor"):
        _checks(module)
    with pytest.raises(ValueError, match="not supported"):
        module.fuse_qkv_projections()


def test_an_attention_whose_processor_ignores_fused_projections_keeps_its_own():
    class Own:
        def __call__(self, attn, hidden_states, **kwargs):
            return attn.to_q(hidden_states) + attn.to_k(hidden_states) + attn.to_v(hidden_states)

    module = real("flux", "transformer")
    other = module.single_transformer_blocks[0].attn
    other.processor = Own()
    (item,) = placed(FUSE)
    assert item.step.apply(module) == ["3 attentions fused, originals deleted"]
    assert other.to_q is not None
    assert not hasattr(other, "to_qkv")
    assert module.single_transformer_blocks[1].attn.to_q is None


def test_after_a_cast_ghost_and_module_still_come_out_alike():
    shadow, module = both(
        "flux", "transformer", {"name": "cast", "component": "transformer", "dtype": "bfloat16"}, FUSE
    )
    assert types(shadow) == types(module)
    assert {dtype for _, dtype in types(module).values()} == {torch.bfloat16}


def test_refused_where_the_fused_processor_would_leave_out_norms():
    """SD 3.5 normalises queries and keys; the processor that diffusers swaps in for fused projections does not."""
    plan = ghost("sd3")
    with pytest.raises(IllegalPlan, match=r"FusedJointAttnProcessor2_0 leaves out transformer_blocks\.0\.attn\.norm_q"):
        checked(plan, fuse("sd3"))


def test_refused_for_grouped_queries():
    """DreamLite has fewer heads of keys than of queries; diffusers' fused processor divides by three."""
    module, _ = coverage.CASES["DreamLiteUNetModel"].built()
    problems = list(FuseQKV(component="unet").check_module(module, None, CPU, ""))
    assert "takes keys for as wide as queries" in problems[0].reason


def test_refused_after_quantization():
    plan = ghost("flux")
    quantize = {"name": "quantize", "component": "transformer", "type": "int8_weight_only"}
    with pytest.raises(IllegalPlan, match="must come before quantize"):
        checked(plan, quantize, fuse("flux"))
