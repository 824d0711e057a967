"""Small regions written out by hand, and one engine of each that is built once in a test run.

Set DIFFKILN_TEST_CACHE to a folder to keep engines, and what they share, between runs.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

import torch

from diffkiln.bundle.manifest import TensorSpec
from diffkiln.exporters.aot_inductor.check import AotInductor
from diffkiln.exporters.artefact import Artefact, Lowering
from diffkiln.exporters.base import engine_inputs
from diffkiln.exporters.cache import EngineCache
from diffkiln.exporters.onnx.check import Onnx
from diffkiln.exporters.openvino.check import Openvino
from diffkiln.exporters.tensorrt.check import Tensorrt
from diffkiln.exporters.torch_compile.check import TorchCompile
from diffkiln.interpreter.aten import Interpreter, dtype_of
from diffkiln.program import (
    ATTENTION,
    SDPA,
    Arg,
    DType,
    Input,
    Op,
    Program,
    Ref,
    TensorType,
    refs,
    rename,
    verify,
)
from diffkiln.spec.targets import GPUS, Target

CPU = Target(name="cpu-x86-64-v3", device="cpu", isa="x86-64-v3")
RTX_4090 = GPUS["nvidia-rtx-4090"]


class Writer:
    """Writes a program down; shapes of results are found by running the operations on the meta device."""

    def __init__(self) -> None:
        self.types: dict[str, TensorType] = {}
        self.ops: list[Op] = []
        self.inputs: list[Input] = []

    def value(self, name: str, *shape: int, dtype: str = "float32") -> Ref:
        self.types[name] = TensorType(dtype, shape)
        if name.startswith("%"):
            self.inputs.append(Input(name, self.types[name]))
        return Ref(name)

    def op(self, name: str, *args: Arg, **kwargs: Arg) -> Ref:
        op = Op(f"aten.{name}", args, ("%result",), kwargs)
        used = {ref.name for ref in refs((args, kwargs))}
        one = Program("", tuple(Input(n, self.types[n]) for n in sorted(used)), (op,), (Ref("%result"),), self.types)
        fakes = [
            torch.empty(self.types[n].shape, dtype=dtype_of(self.types[n].dtype), device="meta") for n in sorted(used)
        ]
        (result,) = Interpreter(_as_inputs(one), "meta")(fakes)
        out = f"%{len(self.ops)}"
        self.types[out] = TensorType(str(result.dtype).removeprefix("torch."), tuple(result.shape))
        self.ops.append(Op(op.name, args, (out,), kwargs))
        return Ref(out)

    def program(self, name: str, *outputs: Ref) -> Program:
        program = Program(name, tuple(self.inputs), tuple(self.ops), outputs, self.types)
        verify(program)
        return program


def _as_inputs(program: Program) -> Program:
    """With weights and constants renamed to values, so that they can be passed as inputs."""
    return rename(program, {i.name: "%in_" + i.name[1:] for i in program.inputs})


def block(dim: int = 32, heads: int = 2, tokens: int = 16) -> Program:
    """A transformer block: norm, attention, a gate that is a constant, feed-forward. The second output is a view."""
    w = Writer()
    x = w.value("%x", 1, tokens, dim)
    shapes = {"norm": (dim,), "qkv": (3 * dim, dim), "out": (dim, dim), "up": (4 * dim, dim), "down": (dim, 4 * dim)}
    weight = {name: w.value(f"@{name}.weight", *shape) for name, shape in shapes.items()}
    bias = {name: w.value(f"@{name}.bias", shape[0]) for name, shape in shapes.items()}
    gate = w.value("#gate", tokens, 1)

    h = w.op("layer_norm.default", x, (dim,), weight["norm"], bias["norm"], 1e-5)
    h = w.op("linear.default", h, weight["qkv"], bias["qkv"])
    h = w.op("reshape.default", h, (1, tokens, 3, heads, dim // heads))
    h = w.op("permute.default", h, (2, 0, 3, 1, 4))
    qkv = [w.op("select.int", h, 0, i) for i in range(3)]
    h = w.op("scaled_dot_product_attention.default", *qkv)
    h = w.op("reshape.default", w.op("transpose.int", h, 1, 2), (1, tokens, dim))
    h = w.op("mul.Tensor", w.op("linear.default", h, weight["out"], bias["out"]), gate)
    x = w.op("add.Tensor", x, h)
    h = w.op("gelu.default", w.op("linear.default", x, weight["up"], bias["up"]), approximate="tanh")
    x = w.op("add.Tensor", x, w.op("linear.default", h, weight["down"], bias["down"]))
    return w.program("Block", x, w.op("transpose.int", x, 1, 2))


def block_of_math() -> Program:
    """The same with every score of its attention computed."""
    program = block()
    ops = (replace(op, attrs={"kernel": "native_math"}) if op.name == SDPA else op for op in program.ops)
    return replace(program, name="BlockOfMath", ops=tuple(ops))


def gated() -> Program:
    """A layer and a gate that is a constant: one kernel. The second output is a view."""
    w = Writer()
    x, weight, bias, gate = w.value("%x", 4, 32), w.value("@weight", 24, 32), w.value("@bias", 24), w.value("#gate", 24)
    y = w.op("mul.Tensor", w.op("gelu.default", w.op("linear.default", x, weight, bias)), gate)
    return w.program("Gated", y, w.op("t.default", y))


def attending(kernel: str = "") -> Program:
    """Scaled attention; by the kernel of a package, where one is named, the graph breaks."""
    w = Writer()
    heads = [w.value(f"%{name}", 1, 2, 8, 16) for name in ("query", "key", "value")]
    attended = w.op("scaled_dot_product_attention.default", *heads)
    program = w.program("Attending", w.op("mul.Tensor", attended, w.value("@scale", 16)))
    if not kernel:
        return program
    attrs = {"kernel": kernel, "causal": False, "scale": None}
    ops = (Op(ATTENTION, op.args, op.outputs, {}, attrs) if op.name == SDPA else op for op in program.ops)
    return replace(program, name=f"Attending-{kernel}", ops=tuple(ops))


def attending_by_package() -> Program:
    return attending("flash_2")


def int8_linear() -> Program:
    """A linear layer with its weight in int8 and a scale for each output, as weight-only quantization leaves it."""
    w = Writer()
    x, weight, scale = w.value("%x", 4, 32), w.value("@weight", 24, 32, dtype="int8"), w.value("@scale", 24)
    wide = w.op("to.dtype", w.op("t.default", weight), DType("float32"))
    return w.program("Int8Linear", w.op("mul.Tensor", w.op("mm.default", x, wide), scale))


def total() -> Program:
    """A reduction large enough to be shared out among threads, each with a buffer of its own."""
    w = Writer()
    x = w.value("%x", 512, 256)
    return w.program("Total", w.op("sum.default", w.op("mul.Tensor", x, x)), w.op("amax.default", x))


def in_type(region: Program, dtype: str) -> Program:
    """The region with this type in the place of float32."""
    types = {
        name: replace(kind, dtype=dtype) if kind.dtype == "float32" else kind for name, kind in region.types.items()
    }
    inputs = tuple(replace(item, type=types[item.name]) for item in region.inputs)
    return replace(region, name=f"{region.name}-{dtype}", inputs=inputs, types=types)


def float16_block() -> Program:
    return in_type(block(), "float16")


def bfloat16_block() -> Program:
    return in_type(block(), "bfloat16")


def convolution(channels: int = 8) -> Program:
    """A convolution and a group norm whose weights are inputs, as a VAE has them."""
    w = Writer()
    x, weight = w.value("%x", 1, channels, 8, 8), w.value("@conv.weight", 16, channels, 3, 3)
    bias = w.value("@conv.bias", 16)
    h = w.op("convolution.default", x, weight, bias, (1, 1), (1, 1), (1, 1), False, (0, 0), 1)
    h = w.op("group_norm.default", h, 4, w.value("@norm.weight", 16), w.value("@norm.bias", 16), 1e-5)
    return w.program("Convolution", w.op("silu.default", h))


def heavy_convolution() -> Program:
    """A convolution whose weights are larger than its images, as in the middle of a U-Net."""
    w = Writer()
    x, weight = w.value("%x", 1, 64, 8, 8), w.value("@weight", 64, 64, 3, 3)
    return w.program(
        "HeavyConvolution", w.op("convolution.default", x, weight, None, (1, 1), (1, 1), (1, 1), False, (0, 0), 1)
    )


def attention(tokens: int) -> Program:
    w = Writer()
    x, weight = w.value("%x", 1, tokens, 32), w.value("@qkv", 96, 32)
    h = w.op("reshape.default", w.op("linear.default", x, weight), (1, tokens, 3, 2, 16))
    h = w.op("permute.default", h, (2, 0, 3, 1, 4))
    h = w.op("scaled_dot_product_attention.default", *(w.op("select.int", h, 0, i) for i in range(3)))
    return w.program("Attention", w.op("reshape.default", w.op("transpose.int", h, 1, 2), (1, tokens, 32)))


def float8_linear() -> Program:
    """A linear layer whose weight is kept in float8 and cast for each call, as layerwise casting leaves it."""
    w = Writer()
    x, weight = w.value("%x", 4, 32), w.value("@weight", 24, 32, dtype="float8_e4m3fn")
    wide = w.op("to.dtype", w.op("t.default", weight), DType("float32"))
    return w.program("Float8Linear", w.op("mm.default", x, wide))


def int8_product() -> Program:
    """A product of int8 by int8, as quantized activations compute it."""
    w = Writer()
    x, weight = w.value("%x", 32, 32, dtype="int8"), w.value("@weight", 32, 24, dtype="int8")
    return w.program("Int8Product", w.op("_int_mm.default", x, weight))


def tensors(region: Program, seed: int = 0) -> list[torch.Tensor]:
    """Inputs for a region's engine, of a size that keeps values around one."""
    generator = torch.Generator().manual_seed(seed)

    def draw(type_: TensorType) -> torch.Tensor:
        if type_.dtype == "int8":
            return torch.randint(-127, 128, type_.shape, dtype=torch.int8, generator=generator)
        return torch.randn(type_.shape, generator=generator).mul_(0.3).to(dtype_of(type_.dtype))

    return [draw(type_) for type_ in engine_inputs(region)]


def holding(region: Program, seed: int = 0, target: Target = RTX_4090, **options: object) -> Lowering:
    """The region with an engine that holds its weights."""
    weights = dict(zip(region.weights, tensors(region, seed)[len(region.inputs) :], strict=False))
    return Lowering(region, target, options={"weights": "engine", **options}, weights=weights)


def interpreted(region: Program, flat: list[torch.Tensor]) -> list[torch.Tensor]:
    """What the region gives, operation by operation."""
    values = iter(flat)
    inputs = [next(values) for _ in region.inputs]
    weights = {name: next(values) for name in region.weights}
    return Interpreter(region)(inputs, weights, {key: next(values) for key in region.constants})


def stated(specs: tuple[TensorSpec, ...]) -> list[tuple[str, tuple[int, ...], tuple[int, ...]]]:
    return [(spec.dtype, spec.shape, spec.stride) for spec in specs]


@cache
def engine_cache() -> EngineCache:
    """The cache that the whole test run shares."""
    return EngineCache(Path(os.environ["DIFFKILN_TEST_CACHE"]))


@cache
def built(make: Callable[[], Program]) -> tuple[Program, Artefact]:
    region = make()
    return region, AotInductor().export(Lowering(region, CPU), engine_cache())


@cache
def built_tensorrt(make: Callable[[], Program]) -> tuple[Program, Artefact]:
    region = make()
    return region, Tensorrt().export(Lowering(region, RTX_4090), engine_cache())


@cache
def built_onnx(make: Callable[[], Program]) -> tuple[Program, Artefact]:
    region = make()
    return region, Onnx().export(Lowering(region, CPU), engine_cache())


@cache
def built_openvino(make: Callable[[], Program], weights: str = "engine") -> tuple[Program, Artefact]:
    """The region's engine; where it holds them, its weights and constants are those of `tensors`."""
    region = make()
    return region, Openvino().export(given(region, weights=weights), engine_cache())


def given(region: Program, target: Target = CPU, **options: object) -> Lowering:
    """The region with the weights and constants of `tensors`."""
    flat = iter(tensors(region)[len(region.inputs) :])
    weights = {name: next(flat) for name in region.weights}
    return Lowering(region, target, {key: next(flat) for key in region.constants}, options, weights=weights)


@cache
def built_jit(make: Callable[[], Program]) -> tuple[Program, Artefact]:
    region = make()
    options = {} if all(op.is_aten for op in region.ops) else {"fullgraph": False}
    return region, TorchCompile().export(Lowering(region, CPU, options=options), engine_cache())
