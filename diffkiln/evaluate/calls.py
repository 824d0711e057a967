"""Describes the call of a bundle's first variant: the keywords that it fixes, and stand-ins for a caller's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from diffkiln.bundle import Bundle, strict_json
from diffkiln.errors import ManifestInvalid
from diffkiln.guards.limits import active
from diffkiln.program import Program, program_from_json
from diffkiln.program.calls import PICTURES, text_keywords
from diffkiln.runtime.results import names_of

_NEEDED = ("prompt", "negative_prompt")


@dataclass(frozen=True)
class Call:
    """The call of a bundle's first variant.

    Attributes:
        texts: the keywords that take a text.
        batch: the number of prompts of one call.
        fixed: the keywords that the variant fixes, by their values.
        declared: the keywords that take images and tensors, by their sizes or shapes.
        result: the name of what the call gives, such as "images" or "frames"; "" where no program tells it.
        picture: height and width of its pictures, which an added model may have enlarged; none where nothing tells it.
    """

    texts: tuple[str, ...] = ()
    batch: int = 1
    fixed: Mapping[str, Any] = field(default_factory=dict)
    declared: Mapping[str, Any] = field(default_factory=dict)
    result: str = "images"
    picture: tuple[int, ...] = ()

    @property
    def makes_pictures(self) -> bool:
        """Returns True if the call gives images or frames."""
        return self.result in PICTURES or not self.result

    @property
    def size(self) -> dict[str, Any]:
        """Returns the sizes that pictures must share to be compared."""
        return {name: self.fixed.get(name) for name in ("height", "width", "num_frames")}

    def as_json(self) -> dict[str, Any]:
        """Returns the fields by their names; `Call(**fields)` is an equal call."""
        return asdict(self)


def call_of(bundle: Bundle) -> Call:
    """Returns the call of a bundle's first variant.

    Raises:
        IntegrityError: the bundle's program is malformed.
    """
    variant = bundle.manifest.pipeline.variants[0]
    fixed = {name: value for name, value in variant.fixed.items() if not _is_declared(value)}
    declared = {name: value for name, value in variant.fixed.items() if _is_declared(value)}
    kept = {name: value for name, value in fixed.items() if value is not None and name not in _NEEDED}
    program = _program(bundle, variant.programs.get("call"))
    if program is None:  # it runs as diffusers, which knows what it takes
        return Call(("prompt",), _whole(fixed.get("batch_size")), kept, declared, "")
    kept |= {name: fixed[name] for name in _NEEDED if fixed.get(name) is not None}  # prompts that the spec fixes
    rows = [row for text in program.texts for row in text["rows"]]
    batch = max((row["index"] + 1 for row in rows if "index" in row), default=1)
    texts = [keyword for keyword in text_keywords([program]) if keyword in _NEEDED or "prompt" not in keyword]
    result = names_of(program)[0]
    sides = program.types[program.outputs[0].name].shape[-2:] if result in PICTURES else ()
    return Call(tuple(texts), batch, kept, declared, result, sides)


def keywords_of(call: Call, prompts: Sequence[str], seeds: Sequence[int]) -> dict[str, Any]:
    """Returns the keywords of one call, with images and tensors of noise where the call takes any.

    Args:
        call: what is fixed and what is taken.
        prompts: as many as the call's batch.
        seeds: as many, of the noise of each.
    """
    import torch

    given: dict[str, Any] = dict(call.fixed)
    for keyword in call.texts:
        given[keyword] = (prompts[0] if call.batch == 1 else list(prompts)) if keyword != "negative_prompt" else ""
    if "negative_prompt" in call.texts and call.batch > 1:
        given["negative_prompt"] = [""] * call.batch
    given |= {keyword: _noise(value) for keyword, value in call.declared.items()}
    generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
    given["generator"] = generators[0] if call.batch == 1 else generators
    return given


def _whole(value: Any) -> int:
    return value if isinstance(value, int) else 1


def _is_declared(value: Any) -> bool:
    """Returns True for what stands in the place of an image (its size) or of a tensor (its shape)."""
    first = value[0] if isinstance(value, list | tuple) and value else value
    return isinstance(first, Mapping) and ("shape" in first or set(first) == {"height", "width"})


def _noise(value: Any) -> Any:
    """Returns an image or a tensor of noise, the same at each call; a list of them for a list."""
    if isinstance(value, list | tuple):
        return [_noise(item) for item in value]
    import numpy as np
    import torch
    from PIL import Image

    if "shape" in value:
        made = torch.randn(value["shape"], generator=torch.Generator().manual_seed(0))
        return made.to(getattr(torch, value.get("dtype", "float32")))
    pixels = np.random.default_rng(0).integers(0, 256, (value["height"], value["width"], 3), np.uint8)
    return Image.fromarray(pixels)


def _program(bundle: Bundle, path: str | None) -> Program | None:
    if path is None:
        return None
    with bundle.verify(roles={"program"}) as verified:
        try:
            return program_from_json(
                strict_json.loads(verified.read(path), max_bytes=active().json_bytes)["programs"]["call"]
            )
        except (strict_json.StrictJSONError, KeyError, TypeError):
            raise ManifestInvalid(f"{path!r} holds no program of a call") from None
