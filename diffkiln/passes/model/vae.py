"""Decode in slices or tiles."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field

from diffkiln.errors import Problem
from diffkiln.interpreter.layers import decode_in_parts, parts_problem, tile_side, tile_unit
from diffkiln.passes.base import ModelPass, State
from diffkiln.program import CALL, Program
from diffkiln.record.pipeline import Recording
from diffkiln.spec import Conflict, Target, refuse

AUTO = "auto"
#: Sides of tiles that are tried, in pixels of the image, the largest first: what is cut least differs least.
SIDES = (2048, 1536, 1024, 768, 512, 384, 256, 192, 128, 96, 64, 32)


class VAE(ModelPass):
    """Decode the images of a batch one after the other (`slicing`), or each in overlapping tiles (`tiling`).

    Both need less memory at once, and are diffusers' own. Tiles are blended where they overlap, so an image differs a
    little from one that is decoded as a whole. The program has a fixed number of tiles. With `auto` the build plans the
    memory of the calls, and takes the largest tiles that fit, or none.
    """

    name: ClassVar[str] = "vae"
    summary: ClassVar[str] = "decode images in slices or tiles, which needs less memory"
    examples: ClassVar = ({"name": "vae", "component": "vae", "tiling": True, "tile": 512},)

    slicing: bool = Field(False, description="Decode the images of a batch one by one.")
    tiling: bool | Literal["auto"] = Field(
        False,
        description="Decode each image in overlapping tiles. auto: the largest that fit the memory, or none.",
    )
    tile: int | None = Field(None, ge=8, description="Side of a tile in pixels of the image.")

    @classmethod
    def conflicts(cls, given: Mapping[str, Any]) -> Iterator[Conflict]:
        if not given.get("slicing") and not given.get("tiling"):
            yield ("tiling",), refuse("neither slicing nor tiling is asked for", "Set one of them to true")
        if "tile" in given and not given.get("tiling"):
            yield ("tile",), refuse("says nothing without tiling", "Remove it")
        if "tile" in given and given.get("tiling") == AUTO:
            yield ("tile",), refuse("the memory decides it", 'Remove it, or write "tiling": true')

    @classmethod
    def within_memory(cls, options: Mapping[str, Any]) -> Mapping[str, Mapping[str, Any]]:
        if options.get("tiling") != AUTO:
            return {}
        tiles = {f"tiles of {side} pixels": {**options, "tiling": True, "tile": side} for side in SIDES}
        return {"no tiles": options, **tiles, "tiles of the decoder's own size": {**options, "tiling": True}}

    @property
    def tiled(self) -> bool:
        """Returns True if images are decoded in tiles; what the memory would decide is none until it did."""
        return self.tiling is True

    @property
    def decodes(self) -> Literal["", "one", "tiles"]:
        if self.tiled:
            return "tiles"
        return "one" if self.slicing else ""

    def check_module(self, module: torch.nn.Module, state: State, target: Target, where: str) -> Iterable[Problem]:
        if reason := parts_problem(module, self.slicing, bool(self.tiling), self.tile):
            yield Problem(where, reason, "Remove it.")
            return
        fits = tile_unit(module)
        if self.tile is not None and self.tile % fits:
            reason = f"tiles of {self.tile} pixels do not overlap by whole latents"
            yield Problem(f"{where}.tile", reason, f"Choose a multiple of {fits}.")
            return
        side = tile_side(module, self.tile)
        sides = [max(v.get("height") or 0, v.get("width") or 0) for v in state.variants]
        if self.tiled and side is not None and all(0 < largest <= side for largest in sides):
            reason = f"no variant is larger than a tile of {side} pixels, so there would be one tile"
            yield Problem(f"{where}.tiling", reason, "Set a smaller tile, or remove it.")
        many = ("batch_size", "num_images_per_prompt", "num_videos_per_prompt")
        batches = [math.prod(v.get(name) or 1 for name in many) for v in state.variants]
        if self.slicing and all(batch == 1 for batch in batches):
            yield Problem(f"{where}.slicing", "every variant draws one image at a time", "Remove it.")

    def rewrite(self, recording: Recording) -> tuple[Recording, Sequence[str]]:
        """Returns the recording unchanged, after it has checked that the tiles fit together.

        Raises:
            ValueError: the tiles do not fit together: diffusers would give images of another size.
        """
        for fixed, programs in zip(recording.fixed, recording.calls, strict=True):
            for call in programs.values():
                wanted = (fixed.get("height"), fixed.get("width"))
                given = next((size for size in self._decoded(call) if size != wanted), None)
                if None not in wanted and given is not None:
                    raise ValueError(
                        f"tiles of {self.tile} pixels overlap so that diffusers gives {given[0]} × {given[1]} in the "
                        f"place of {wanted[0]} × {wanted[1]}. Choose a multiple of 32, or leave tile out"
                    )
        return recording, ()

    def _decoded(self, call: Program) -> Iterator[tuple[int, ...]]:
        """Yields the sizes of what the component decodes."""
        decodes = (op for op in call.ops if op.name == CALL and op.attrs["component"] == self.component)
        for op in decodes:
            if op.attrs["program"].partition("-")[0] == f"{self.component}.decode":
                yield call.types[op.outputs[0]].shape[-2:]

    def apply(self, module: torch.nn.Module) -> Sequence[str]:
        notes = decode_in_parts(module, self.slicing, self.tiled, self.tile)
        return [*notes, "no tiles, unless the memory needs them"] if self.tiling == AUTO else notes

    @classmethod
    def restore(cls, module: torch.nn.Module, options: Mapping[str, Any]) -> None:
        decode_in_parts(module, options["slicing"], options["tiling"] is True, options["tile"])


PLUGIN = VAE
