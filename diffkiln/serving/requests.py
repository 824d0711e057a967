"""The bodies of requests, as models made for what a bundle offers: they check requests and are the OpenAPI document."""

from __future__ import annotations

import re
import secrets
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    create_model,
    model_validator,
)

from diffkiln.bundle.strict_json import StrictJSONError, loads
from diffkiln.guards.printable import printable
from diffkiln.runtime.adapters.scales import MOST as MOST_SCALE
from diffkiln.serving.loras import MOST, NAME
from diffkiln.serving.offer import Offer
from diffkiln.serving.orders import Order
from diffkiln.serving.refusals import Refusal
from diffkiln.serving.settings import Settings

#: Seeds are what JSON can hold exactly, with room for those of the other images.
MAX_SEED = 2**53 - 1_000
#: Pictures of steps before the last that a request may ask for: as many as OpenAI's API gives.
MOST_PREVIEWS = 3
#: The path that answers with videos themselves; `/v1/videos` answers with a job.
ANSWERED_VIDEOS = "/v1/videos/generations"
#: Fields that say how the images of an answer come, which a job's answer has none of.
_ANSWERED = ("n", "response_format", "stream", "partial_images")
_DEPTH = 8
#: What validators are told of a request that came as a form.
_FORM = "form"
_WHOLE = re.compile(r"-?[0-9]{1,19}(\.0*)?")


class ErrorText(BaseModel):
    """The fault of a request."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """An answer that is an error."""

    error: ErrorText


class Item(BaseModel):
    """One image or video."""

    b64_json: str | None = Field(None, description="The file in base64.")
    url: str | None = Field(None, description="The file as a data: URL.")
    seed: int = Field(description="Draws the same image again.")


class Answer(BaseModel):
    """Images or videos, in the order of their seeds."""

    created: int = Field(description="Seconds since 1970.")
    data: list[Item]
    output_format: str
    size: str | None = Field(None, description="Width and height in pixels.")


class Model(BaseModel):
    """A bundle."""

    id: str
    object: Literal["model"] = "model"
    created: int = 0
    owned_by: str = "diffkiln"
    bundle: str = Field(description="The bundle's id: the SHA-256 of its manifest.")
    pipeline: str = Field(description="The class of diffusers that it was compiled from.")
    sizes: list[str]
    num_inference_steps: list[int]
    batches: list[int] = Field(description="Prompts that one call may hold.")
    loras: list[str] = Field(description="Adapters that requests may ask for, by `lora`.")


class Models(BaseModel):
    """The bundles that are served."""

    object: Literal["list"] = "list"
    data: list[Model]


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, protected_namespaces=())


class _JobBody(_Body):
    """A request for a job, which has one result and is asked for it later."""

    @model_validator(mode="before")
    @classmethod
    def _check_answer(cls, given: Any) -> Any:
        names = given if isinstance(given, dict) else {}
        if name := next((name for name in _ANSWERED if name in names), ""):
            raise ValueError(f"{name}: a job does not take it. POST {ANSWERED_VIDEOS} answers with the video itself")
        if "seconds" in names:
            raise ValueError(
                "seconds: a bundle's videos have a number of frames that is fixed. Leave it out; choose fps"
            )
        return given


class _AnsweredBody(_Body):
    """A request that is answered with its results."""

    model_config = ConfigDict(
        json_schema_extra={
            "if": {"required": ["partial_images"], "properties": {"partial_images": {"type": "integer", "minimum": 1}}},
            "then": {"required": ["stream"], "properties": {"stream": {"const": True}}},
        }
    )


def body_for(offers: Sequence[Offer], settings: Settings, name: str, job: bool = False) -> type[BaseModel]:
    """Returns the model of a request to these bundles, with the sizes and steps that they have.

    Args:
        offers: Bundles that this kind of request can ask for.
        settings: How many images and characters are allowed.
        name: Of the model, in the OpenAPI document.
        job: Whether the answer is a job, whose result is fetched later.
    """
    videos = any(offer.videos for offer in offers)
    text: Any = Annotated[str, Field(max_length=settings.prompt_chars)]
    fields: dict[str, Any] = {
        "prompt": (text, Field(description="What to draw.")),
        "model": _choice([offer.name for offer in offers], "The bundle; one of /v1/models."),
        "n": _whole(1, settings.images, "How many to make."),
        "size": _choice(["auto", *_all(offer.sizes for offer in offers)], "Width x height, as compiled."),
        "seed": _whole(0, MAX_SEED, "Of the first image; the next ones have those after it. Random, if absent."),
        "response_format": _choice(["b64_json", "url"], "`url` gives a data: URL."),
        "stream": (bool | None, Field(None, description="Answer with server-sent events, one for each step.")),
        "partial_images": _whole(0, MOST_PREVIEWS, "Previews of each image on its way, as events; with `stream`."),
        "user": (text | None, Field(None, description="Accepted for OpenAI's clients, and not used.")),
    }
    if videos:
        fields["output_format"] = _choice(["mp4", "gif", "webp"], "Format of the file.")
        fps: Any = Annotated[float, Field(ge=1, le=240)]
        fields["fps"] = (fps | None, Field(None, description="Frames a second."))
    else:
        fields["output_format"] = _choice(["png", "jpeg", "webp"], "Format of the file.")
        fields["quality"] = _choice(["auto"], "Accepted for OpenAI's clients: the bundle has one.")
        fields["output_compression"] = _whole(1, 100, "Quality of jpeg and webp, in percent.")
    if steps := _all(offer.steps for offer in offers):
        kind: Any = Annotated[_literal(steps), BeforeValidator(_as_whole)]
        fields["num_inference_steps"] = (kind | None, Field(None, description="As compiled."))
    if any(offer.negative for offer in offers):
        fields["negative_prompt"] = (text | None, Field(None, description="What not to draw."))
    if any(offer.scales for offer in offers):
        above = [offer.scale_above for offer in offers]
        known = [scale for scale in above if scale is not None]
        least: Any = {"gt": min(known)} if len(known) == len(above) else {"ge": -1_000}
        scale: Any = Annotated[float, Field(le=1_000, **least)]
        fields["guidance_scale"] = (scale | None, Field(None, description="How closely to follow the prompt."))
    if settings.loras is not None:
        fields["lora"] = _mix()
    if job:
        fields = {key: field for key, field in fields.items() if key not in _ANSWERED}
    return create_model(name, __base__=_JobBody if job else _AnsweredBody, **fields)


def read_json(body: type[BaseModel], data: bytes) -> Any:
    """Returns a request that came as JSON. Raises `Refusal` with the first thing that is wrong."""
    try:
        table = loads(data, max_bytes=max(len(data), 1), max_depth=_DEPTH)
        return body.model_validate(table, strict=True)
    except StrictJSONError as error:
        raise Refusal(400, f"the body: {error}") from None
    except ValidationError as error:
        raise _refused(error) from None


def read_form(body: type[BaseModel], fields: Mapping[str, str]) -> Any:
    """Returns a request that came as a form, whose values are text. Raises `Refusal`."""
    try:
        return body.model_validate_strings(fields, strict=False, context=_FORM)
    except ValidationError as error:
        raise _refused(error) from None


def order_of(request: Any, offer: Offer, identity: str, images: Mapping[str, tuple[Any, ...]]) -> Order:
    """Returns what a checked request asks of one bundle.

    Args:
        request: An instance of what `body_for` gives.
        offer: Of the bundle that the request names.
        identity: Of the request, for the log.
        images: Keyword → images.
    """
    given = request.model_dump(exclude_none=True)
    asked: dict[str, Any] = {name: given[name] for name in ("num_inference_steps", "guidance_scale") if name in given}
    if (size := given.get("size", "auto")) != "auto":
        asked["width"], asked["height"] = map(int, size.split("x"))
    seed = given.get("seed")
    return Order(
        request=identity,
        prompts={name: given[name] for name in ("prompt", "negative_prompt") if name in given},
        asked=asked,
        images=images,
        count=given.get("n", 1),
        seed=secrets.randbelow(MAX_SEED) if seed is None else seed,
        ending=given.get("output_format", "mp4" if offer.videos else "png"),
        quality=given.get("output_compression", 95),
        fps=given.get("fps", 16.0),
        watched=given.get("stream", False),
        previews=given.get("partial_images", 0),
        lora={name: scale for name, scale in given.get("lora", {}).items() if scale},
    )


def model_of(offer: Offer, loras: Sequence[str] = ()) -> Model:
    """Returns what `/v1/models` says of a bundle, and of the adapters in the server's folder."""
    return Model(
        id=offer.name,
        bundle=offer.bundle_id,
        pipeline=offer.class_name,
        sizes=list(offer.sizes),
        num_inference_steps=list(offer.steps),
        batches=sorted({variant.batch_size for variant in offer.variants}),
        loras=list(loras),
    )


def _whole(least: int, most: int, text: str) -> Any:
    whole: Any = Annotated[int, Field(ge=least, le=most), BeforeValidator(_as_whole)]
    return whole | None, Field(None, description=text)


def _as_whole(value: Any, info: ValidationInfo) -> Any:
    """Reads an integer: in JSON Schema 8.0 is one, and in a form every number is text."""
    if isinstance(value, str) and info.context == _FORM and _WHOLE.fullmatch(value):
        return int(value.partition(".")[0])
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _mix() -> Any:
    """Returns the field of adapters with their scales; in a form it is JSON."""
    scale: Any = Annotated[float, Field(ge=-MOST_SCALE, le=MOST_SCALE)]
    name: Any = Annotated[str, Field(pattern=f"^{NAME.pattern}$")]
    mix: Any = Annotated[dict[name, scale], Field(max_length=MOST), BeforeValidator(_as_mix)]
    return mix | None, Field(None, description='Adapters with their scales, such as {"style": 0.8}.')


def _as_mix(value: Any, info: ValidationInfo) -> Any:
    """Reads the adapters of a form, where they are JSON and every number is text to pydantic."""
    if not isinstance(value, str) or info.context != _FORM:
        return value
    try:
        table = loads(value.encode(), max_bytes=len(value.encode()) or 1, max_depth=2)
    except StrictJSONError as error:
        raise ValueError(str(error)) from None
    plain = isinstance(table, dict) and all(type(scale) in (int, float) for scale in table.values())
    return {name: str(scale) for name, scale in table.items()} if plain else table


def _choice(values: Sequence[str], text: str) -> Any:
    return _literal(values) | None, Field(None, description=text)


def _literal(values: Sequence[Any]) -> Any:
    return Literal[tuple(values)]


def _all(lists: Any) -> list[Any]:
    return list(dict.fromkeys(value for values in lists for value in values))


def _refused(error: ValidationError) -> Refusal:
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    where = ".".join(str(part) for part in first["loc"] if isinstance(part, str | int))
    return Refusal(400, printable(f"{where or 'the body'}: {first['msg']}", 500), printable(where, 100) or None)
