"""A light program of four processes, in which every operation that they share stands."""

from __future__ import annotations

import torch

from diffkiln.program import (
    ALL_GATHER,
    ALL_TO_ALL,
    FROM_FIRST,
    FROM_ONE,
    OWN,
    SHARD,
    Input,
    Op,
    Program,
    Ref,
    TensorType,
)

MESH = {"guidance": 2, "sequence": 2}
GUIDANCE = {"axis": "guidance", "count": 2}
SEQUENCE = {"axis": "sequence", "count": 2}


def light() -> Program:
    """Two values [1, 4, 8], of which each process takes one along guidance, and a shard along sequence. Gives what all
    have, twice: by tokens, and by channels; what the first process has; and what another one has."""
    whole, part, other = (TensorType("float32", shape) for shape in ((1, 4, 8), (1, 2, 8), (1, 4, 4)))
    types = {"%a": whole, "%b": whole, "%own": whole, "%shard": part, "%double": part, "%heads": other}
    types |= dict.fromkeys(("%s0", "%s1"), part) | dict.fromkeys(("%g0", "%g1", "%all"), whole)
    types |= {"%back": part, "%h": other, "%first": whole, "%one": whole, "%shape": TensorType("bool", (1, 4, 8))}
    types |= {"%positive": types["%shape"]}
    ops = (
        Op(OWN, (Ref("%a"), Ref("%b")), ("%own",), attrs=GUIDANCE),
        Op(SHARD, (Ref("%own"),), ("%shard",), attrs={**SEQUENCE, "dim": 1}),
        Op("aten.mul.Tensor", (Ref("%shard"), 2.0), ("%double",)),
        Op(ALL_TO_ALL, (Ref("%double"),), ("%heads",), attrs={**SEQUENCE, "split": 2, "join": 1}),
        Op("aten.add.Tensor", (Ref("%heads"), 1.0), ("%h",)),
        Op(ALL_TO_ALL, (Ref("%h"),), ("%back",), attrs={**SEQUENCE, "split": 1, "join": 2}),
        Op(ALL_GATHER, (Ref("%back"),), ("%s0", "%s1"), attrs=SEQUENCE),
        Op("aten.cat.default", ((Ref("%s0"), Ref("%s1")), 1), ("%all",)),
        Op(ALL_GATHER, (Ref("%all"),), ("%g0", "%g1"), attrs=GUIDANCE),
        Op(FROM_FIRST, (Ref("%own"),), ("%first",), attrs={"count": 4}),
        Op("aten.gt.Scalar", (Ref("%own"), 0.0), ("%positive",)),
        Op(FROM_ONE, (Ref("%positive"), Ref("%own")), ("%shape", "%one"), attrs={**GUIDANCE, "index": 1}),
    )
    inputs = tuple(Input(name, types[name]) for name in ("%a", "%b"))
    return Program("light", inputs, ops, (Ref("%g0"), Ref("%g1"), Ref("%first"), Ref("%shape"), Ref("%one")), types)


def wanted(value: torch.Tensor) -> list[torch.Tensor]:
    """What it gives for a value and its negative."""
    return [value * 2 + 1, -value * 2 + 1, value, -value > 0, -value]


#: What each process sends in one run: two exchanges of half of [1, 2, 8], one gathering of it, and one of [1, 4, 8].
SENT = 2 * (16 * 4 // 2) + 16 * 4 + 32 * 4
#: What the first one sends besides: [1, 4, 8] to three others.
SENT_BY_FIRST = 3 * 32 * 4
#: What those of index 1 along guidance send besides: a byte and four for each of [1, 4, 8].
SENT_BY_ONE = 32 * 5
#: What each process sends, by rank.
SENT_BY_EACH = [SENT + SENT_BY_FIRST, SENT, SENT + SENT_BY_ONE, SENT + SENT_BY_ONE]
