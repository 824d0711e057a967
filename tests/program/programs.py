"""Small programs of all three levels."""

from __future__ import annotations

from diffkiln.program import CALL, NOISE, REGION, STEP, Device, DType, Input, Module, Op, Program, Ref, TensorType

F4 = TensorType("float32", (2, 4))
I4 = TensorType("int64", (1, 4))

BLOCK = Program(
    "Block",
    (Input("%x", F4),),
    (
        Op("aten.linear.default", (Ref("%x"), Ref("@proj.weight")), ("%1",)),
        Op("aten.add.Tensor", (Ref("%1"), Ref("#abc")), ("%2",), {"alpha": 2}),
    ),
    (Ref("%2"),),
    {"%x": F4, "@proj.weight": TensorType("float32", (4, 4)), "#abc": F4, "%1": F4, "%2": F4},
    signature={"args": (Ref("%x"),), "kwargs": {"flag": True, "none": None}, "result": (Ref("%2"),)},
)
BODY = Program(
    "transformer",
    (Input("%x", F4),),
    (
        Op(REGION, (Ref("%x"),), ("%1",), attrs={"region": "Block", "instance": "blocks.0"}),
        Op(REGION, (Ref("%1"),), ("%2",), attrs={"region": "Block", "instance": "blocks.1"}),
        Op("aten.cat.default", ((Ref("%2"), Ref("%x")), 1), ("%3",)),
        Op("aten.split.Tensor", (Ref("%3"), 4, 1), ("%4", "%5")),
    ),
    (Ref("%5"),),
    {"%x": F4, "%1": F4, "%2": F4, "%3": TensorType("float32", (2, 8)), "%4": F4, "%5": F4},
)
MODULE = Module("transformer", {"transformer": BODY}, {"Block": BLOCK})
TEXT = {
    "tokenizer": "tokenizer",
    "rows": [{"keyword": "prompt", "index": 0, "prefix": "<", "suffix": ">"}],
    "transforms": ["lower"],
    "max_length": 4,
    "padding": "max_length",
    "truncation": True,
}
PIPELINE = Program(
    "call",
    (
        Input("%tokens", I4, {"kind": "tokens", "text": 0, "key": "input_ids"}),
        Input(
            "%guidance_scale",
            TensorType("float64", ()),
            {"kind": "scalar", "keyword": "guidance_scale", "default": 7.5},
        ),
    ),
    (
        Op(NOISE, (), ("%1",), attrs={"shape": [2, 4], "dtype": "float32"}),
        Op(
            "aten.full.default",
            ((2, 4), Ref("%guidance_scale")),
            ("%2",),
            {"dtype": DType("float32"), "device": Device()},
        ),
        Op("aten.mul.Tensor", (Ref("%1"), Ref("%2")), ("%3",)),
        Op(CALL, (Ref("%3"),), ("%4",), attrs={"component": "transformer", "program": "transformer"}),
        Op(STEP, (Ref("%4"),), ("%5",), attrs={"step": 0, "timestep": 999.0}),
    ),
    (Ref("%5"),),
    {"%tokens": I4, "%guidance_scale": TensorType("float64", ()), **dict.fromkeys(("%1", "%2", "%3", "%4", "%5"), F4)},
    texts=(TEXT,),
    signature={"result": "images"},
)
