"""Which of two branches of a step has the prompt: found by what their arguments depend on."""

from __future__ import annotations

from collections.abc import Sequence

from diffkiln.program import STEP, Builder, Ref
from diffkiln.record.keywords import PROMPTS

#: Operators that read nothing of their argument but its shape and type: SDXL's negative embeddings are such zeros.
_READ_NO_VALUES = frozenset(
    f"aten.{name}.default"
    for name in ("zeros_like", "ones_like", "full_like", "empty_like", "new_zeros", "new_ones", "new_full", "new_empty")
)


def prompt_branch(call_sites: Sequence[Sequence[Ref]], edit: Builder) -> int | None:
    """Returns the branch, 0 or 1, whose own arguments depend on the prompt where the other's do not; None if there is
    none.

    What both branches are given, such as the latents, is not looked at, and what comes from an earlier step through its
    latents neither.

    Args:
        branches: the arguments of both, in the same order.
        edit: of the call.
    """
    own = [
        [arg for arg, other in zip(branch, call_sites[1 - index], strict=True) if arg != other]
        for index, branch in enumerate(call_sites)
    ]
    reads = [_reads_prompt(args, edit) for args in own]
    return reads.index(True) if reads.count(True) == 1 else None


def _reads_prompt(args: Sequence[Ref], edit: Builder) -> bool:
    call, made = edit.program, edit.makers
    tokens = {item.name: item.source["text"] for item in call.inputs if item.source.get("kind") == "tokens"}
    prompts = {
        index for index, text in enumerate(call.texts) if any(row.get("keyword") in PROMPTS for row in text["rows"])
    }
    waiting, seen = [ref.name for ref in args], set[str]()
    while waiting:
        name = waiting.pop()
        if tokens.get(name) in prompts:
            return True
        if name in seen or name not in made or made[name].name in (STEP, *_READ_NO_VALUES):
            continue
        seen.add(name)
        waiting += [ref.name for ref in made[name].uses]
    return False
