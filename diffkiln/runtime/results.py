"""What a call gives its caller: pictures, sound and tensors, by the names that the original pipeline gives them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from diffkiln.errors import CallError
from diffkiln.guards.printable import get_logger
from diffkiln.program import Program
from diffkiln.program.calls import PICTURES
from diffkiln.runtime.images import OWN, convert

log = get_logger(__name__)


class Output(dict[str, Any]):
    """The result of a call: `.images` or `.frames`, `.audios`, as diffusers names it.

    Attributes:
        rate: samples a second of its sound; None where it has none.
    """

    rate: int | None = None

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


def names_of(program: Program) -> tuple[str, ...]:
    """Returns the names of a call's results, in their order."""
    named = program.signature.get("results")
    return tuple(map(str, named)) if isinstance(named, tuple) else (str(program.signature.get("result", "images")),)


def form_of(program: Program, output_type: str) -> str:
    """Returns the form of the results: what is asked for, else what the pipeline gives where nothing is.

    Raises:
        CallError: pictures are asked for, and the call makes none.
    """
    form = program.signature.get("form")
    if output_type == OWN:
        return str(form or "pil")
    if output_type in ("pil", "latent") and form is not None:
        name = names_of(program)[0]
        raise CallError(f"output_type: {output_type!r} is of pictures, and this call gives {name}. Choose 'np' or 'pt'")
    return output_type


def output_of(program: Program, made: Sequence[torch.Tensor], form: str) -> Output:
    """Returns a call's results in a form, by their names. Latents come alone, and are not checked."""
    names = names_of(program)
    if form == "latent":
        return Output({names[0]: made[0]} | dict.fromkeys(names[1:]))
    if any(tensor.dtype == torch.bool and bool(tensor.any()) for tensor in made[1:]):
        log.warning("the safety checker objects to an image, which is black now. Try another prompt or another seed")
    output = Output({name: _converted(name, each, form) for name, each in zip(names, made, strict=True)})
    rate: Any = program.signature.get("rate")
    output.rate = int(rate) if isinstance(rate, int) else None
    return output


def _converted(name: str, made: torch.Tensor, form: str) -> Any:
    if name in PICTURES:
        return convert(made, form)
    if made.dtype == torch.bool:  # truth values, which diffusers gives as a list
        return made.tolist()
    return made.cpu().float().numpy() if form == "np" else made
