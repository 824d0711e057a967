"""compile_module: one module, called as it was, by engines."""

import copy

import pytest
import torch
from torch import nn

import diffkiln
from diffkiln.errors import BuildError, CallError, DataDependent, Incompatible, SpecError
from tests.exporters.regions import engine_cache
from tests.pipelines import WARNING_FILTERS

pytestmark = [pytest.mark.filterwarnings(text) for text in WARNING_FILTERS]


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(8), nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, hidden_states, scale):
        return hidden_states + scale * self.down(nn.functional.gelu(self.up(self.norm(hidden_states))))


class Net(nn.Module):
    _repeated_blocks = ("Block",)

    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(4, 8)
        self.blocks = nn.ModuleList(Block() for _ in range(3))

    def forward(self, hidden_states, scale, return_dict=True):
        values = self.embed(hidden_states)
        for block in self.blocks:
            values = block(values, scale)
        return {"sample": values} if return_dict else (values,)


@pytest.fixture(scope="module")
def example():
    torch.manual_seed(0)
    return Net().requires_grad_(False), {"hidden_states": torch.randn(2, 6, 4), "scale": torch.ones(1)}


@pytest.fixture(scope="module")
def compiled(example):
    module, kwargs = example
    return diffkiln.compile_module(copy.deepcopy(module), kwargs, cache=engine_cache())


def close(found, wanted):
    return float((found - wanted).norm() / wanted.norm()) <= 1e-4


def test_gives_what_the_module_gives(example, compiled):
    module, kwargs = example
    assert set(compiled.regions) == {"Block"}
    other = kwargs | {"hidden_states": torch.randn_like(kwargs["hidden_states"])}
    with torch.inference_mode():
        for given in (kwargs, other):
            wanted = module(**given)
            found = compiled(**given)
            assert found.keys() == wanted.keys()
            assert close(found["sample"], wanted["sample"])


def test_weights_may_change_without_compiling_again(example, compiled):
    module, kwargs = example
    with torch.inference_mode():
        for parameter in compiled.module.parameters():
            parameter.mul_(1.25)
        found = compiled(**kwargs)["sample"]
        assert not close(found, module(**kwargs)["sample"])
        assert close(found, compiled.module(**kwargs)["sample"])


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (
            lambda kwargs: {"hidden_states": kwargs["hidden_states"][:, 1:]},
            r"hidden_states: float32\[2,5,4\] found, float32\[2,6,4\] req",
        ),
        (lambda kwargs: {"hidden_states": kwargs["hidden_states"].double()}, "hidden_states: float64"),
        (lambda kwargs: {"scale": 1.0}, r"scale: 1.0 found, float32\[1\] required"),
        (lambda kwargs: {"other": 1}, "other: given, and the example has none"),
    ],
)
def test_other_arguments_are_refused_by_name(example, compiled, change, reason):
    kwargs = example[1]
    with pytest.raises(CallError, match=reason):
        compiled(**kwargs | change(kwargs))


@pytest.mark.parametrize(
    ("options", "reason"),
    [({"target": "cpu-x86-64-v5"}, "cpu-x86-64-v4"), ({"scope": "block"}, "blocks, between, whole")],
)
def test_unknown_words_are_refused_with_what_there_is(example, options, reason):
    with pytest.raises(SpecError, match=reason):
        diffkiln.compile_module(*example, **options)


def test_engines_for_a_gpu_that_is_not_there_are_built_and_saved_and_not_called(example, tmp_path, monkeypatch):
    monkeypatch.setattr("diffkiln.compiler.modules.capability", lambda: None)
    module, kwargs = example
    built = diffkiln.compile_module(module, kwargs, target="rtx 4090", backend="tensorrt", cache=engine_cache())
    assert set(built.artefacts) == {"Block"}
    with pytest.raises(Incompatible, match=r"gpu: found none that torch .*, required sm_89 \(nvidia-rtx-4090\)"):
        built(**kwargs)
    built.save(tmp_path / "engines")
    saved = {path.name for path in (tmp_path / "engines" / "Block").iterdir()}
    assert saved == {"engine.trt", "engine.onnx", "engine.json", "layers.json"}
    with pytest.raises(BuildError, match="cannot be saved"):
        built.save(tmp_path / "engines")


def test_whole_module_is_one_engine(example):
    module, kwargs = example
    compiled = diffkiln.compile_module(module, kwargs | {"return_dict": False}, scope="whole", cache=engine_cache())
    assert list(compiled.regions) == ["module"]
    with torch.inference_mode():
        assert close(compiled(**kwargs, return_dict=False)[0], module(**kwargs)["sample"])


class Chooser(nn.Module):
    """Takes the rows that a mask names, which no program can if the mask may be another at each call."""

    def __init__(self):
        super().__init__()
        self.up = nn.Linear(4, 8)

    def forward(self, hidden_states, mask):
        return self.up(hidden_states[mask])


def test_fixed_keywords_may_decide_shapes():
    torch.manual_seed(0)
    module, kwargs = Chooser().requires_grad_(False), {"hidden_states": torch.randn(3, 4), "mask": torch.eye(3)[0] < 1}
    with pytest.raises(DataDependent):
        diffkiln.compile_module(module, kwargs, scope="whole", cache=engine_cache())
    compiled = diffkiln.compile_module(
        module, kwargs, scope="whole", fixed=("mask",), backend="onnx", cache=engine_cache()
    )
    with torch.inference_mode():
        assert close(compiled(**kwargs), module(**kwargs))
    with pytest.raises(CallError, match="mask: other values"):
        compiled(**kwargs | {"mask": ~kwargs["mask"]})


def test_an_unknown_fixed_keyword_is_refused(example):
    with pytest.raises(SpecError, match=r"no 'scales'.*scale"):
        diffkiln.compile_module(*example, fixed=("scales",))
