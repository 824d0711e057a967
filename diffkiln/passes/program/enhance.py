"""Add a model that enlarges or cleans the finished pictures."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field, PrivateAttr, ValidationError
from torch._subclasses.fake_tensor import FakeTensorMode

from diffkiln.errors import Incompatible, Problem, RecordError, SpecError
from diffkiln.interpreter.portable import portable
from diffkiln.interpreter.quiet import quiet_libraries
from diffkiln.models.added import Added
from diffkiln.models.adding import open_added
from diffkiln.models.meta import make_fake
from diffkiln.passes.base import Fact, Outcome, Pass, ProgramPass, Restored, State
from diffkiln.record.components import tracing
from diffkiln.record.keywords import parameters_of
from diffkiln.spec import Conflict, Target, problems_from, refuse
from diffkiln.spec.model import ComponentSource

#: A side of the picture that a model is tried with where the spec leaves the size to the pipeline.
_SIDE = 64
#: Of a larger picture a part tells as much: which sizes a model takes depends on its windows.
_LARGE = 256
#: Options that say where the model is, as a component of a source has them.
_FIELDS = {
    "model": "model",
    "revision": "revision",
    "subfolder": "subfolder",
    "variant": "variant",
    "file": "single_file",
}


def _side(side: int | None) -> int:
    """Returns the side of a picture that a model is tried with: a large one gets less, and as odd as it is."""
    return min(side or _SIDE, _LARGE + (side or 0) % _SIDE)


class Enhance(ProgramPass):
    """Add a model that is given the finished pictures: an upscaler, or one that removes noise.

    It becomes a component of the program like any other, which later passes may name: its weights are packed, cast and
    quantized as others are, and its blocks are compiled. The call gives its pictures in the place of the decoder's, and
    `height` and `width` stay those that the pipeline draws. Models of transformers and diffusers are folders, or
    repositories on the Hub at a commit; upscalers of known architectures are files. Several follow each other under
    names of their own. Latents are given as before.
    """

    name: ClassVar[str] = "enhance"
    summary: ClassVar[str] = "add a model that enlarges or cleans the finished pictures"
    before: ClassVar = {"*": "it adds the component that the others work on"}
    adds: ClassVar[bool] = True
    examples: ClassVar = (
        {"name": "enhance", "model": "swin2sr"},
        {"name": "enhance", "file": "RealESRGAN_x4plus.safetensors", "component": "upscaler"},
    )

    component: str = Field("enhancer", pattern="^[a-z][a-z0-9_]*$", description="Name of the new component.")
    model: Annotated[str, Field(min_length=1)] | None = Field(
        default=None,
        description="Directory of a model of transformers or diffusers, relative to the spec, or a repository on the "
        "Hub.",
    )
    revision: str | None = Field(default=None, description="Commit of the repository, 40 hexadecimal digits.")
    subfolder: str | None = Field(default=None, description="Directory in the model. Absent: the model itself.")
    variant: str | None = Field(default=None, description="Variant of the weight files, such as `fp16`.")
    file: Annotated[str, Field(min_length=1)] | None = Field(
        default=None,
        description="A `.safetensors` file of an upscaler whose architecture is known, relative to the spec.",
    )
    range: Literal["unit", "signed"] | None = Field(
        default=None,
        description="What the model takes and gives: pictures from 0 to 1 (`unit`) or from -1 to 1 (`signed`). Absent: "
        "`signed` for a model of diffusers, `unit` for others.",
    )

    _added: Added | None = PrivateAttr(default=None)

    @classmethod
    def conflicts(cls, given: Mapping[str, Any]) -> Iterator[Conflict]:
        if ("model" in given) == ("file" in given):
            how_many = "both are given" if "model" in given else "neither is given"
            yield (), refuse(f'needs exactly one of "model" and "file", and {how_many}')
            return
        options = {theirs: given[own] for own, theirs in _FIELDS.items() if own in given}
        for path, error in ComponentSource.conflicts(options):
            yield tuple("file" if part == "single_file" else part for part in path), error

    def prepare(self, base: Path, pipeline_class: type) -> Pass:
        form = parameters_of(pipeline_class).get("output_type")
        if form is None or form.default == "pt":  # sound, or a tensor
            reason = f"{pipeline_class.__name__} makes no pictures, so there is nothing to enhance"
            raise SpecError(problems=[Problem("", reason, "Remove it.")])
        ready = self.model_copy()
        options = {theirs: value for own, theirs in _FIELDS.items() if (value := getattr(self, own)) is not None}
        try:
            given = ComponentSource.model_validate(options)
        except ValidationError as error:
            raise SpecError(problems=problems_from(error, ComponentSource, "")) from None
        signed = None if self.range is None else self.range == "signed"
        ready._added = open_added(self.component, given, base, signed)
        return ready

    def added(self) -> Sequence[Added]:
        return [self._added] if self._added else []

    def provides(self) -> Iterable[Fact]:
        return [Fact("added", self.component, self.name)]

    @property
    def rewrites(self) -> bool:
        return True

    def options(self) -> dict[str, Any]:
        """Returns the options as JSON, with a digest instead of a local path."""
        written = {key: value for key, value in super().options().items() if value is not None}
        if self._added is None:
            return written
        facts = {"digest": self._added.digest, "class": self._added.component.kind.__name__}
        kept = {key: value for key, value in written.items() if key not in ("model", "file")}
        field = "file" if self.file is not None else "model"
        return {**kept, field: self.model if self.revision else self._added.digest, **facts}

    def origins(self) -> Iterator[tuple[dict[str, Any], Path]]:
        """Yields the model as `options` states it, with a file of its folder."""
        for each in self.added():
            yield self.options(), each.component.file or each.component.root / "config.json"

    # -- checks --

    def check_module(self, module: torch.nn.Module, state: State, target: Target, where: str) -> Iterable[Problem]:
        sizes = {(_side(variant.get("height")), _side(variant.get("width"))) for variant in state.variants}
        for size in sorted(sizes):
            made = self._tried(module, size)
            if isinstance(made, str):
                hint = "Give a model that makes pictures of pictures, or draw larger ones."
                yield Problem(where, made, hint)

    def run(self, state: State) -> Outcome:
        module = state.modules[self.component]
        height, width = _SIDE, _SIDE
        made = self._tried(module, (height, width))
        note = f"{type(module).__name__} is given the finished pictures"
        if not isinstance(made, str):
            note += f" and makes them {made[0] / height:g} × as large" if made != (height, width) else ""
        return Outcome(state.with_facts(self.provides()), True, (note,))

    def _tried(self, module: torch.nn.Module, size: tuple[int, int]) -> tuple[int, int] | str:
        """Returns the size of what the model makes of a picture of a size; or why it makes none."""
        (added,) = self.added()
        tried, fake = copy.deepcopy(module), FakeTensorMode(allow_non_fake_inputs=True)
        make_fake(tried, fake)
        with fake:
            picture = torch.empty(1, 3, *size)
        try:
            with torch.inference_mode(), quiet_libraries(), portable(), tracing():
                made = added.draw(tried, picture)
        except RecordError as error:
            return str(error)
        return made.shape[-2], made.shape[-1]

    # -- a bundle as diffusers' own pipeline --

    @classmethod
    def check_restore(cls, options: Mapping[str, Any], bundle: Restored) -> None:
        raise Incompatible(
            f"diffusers' pipeline has no place for {options['component']}, which works on its pictures. Load the "
            "bundle without as_diffusers"
        )


PLUGIN = Enhance
