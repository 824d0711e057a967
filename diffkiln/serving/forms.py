"""Requests that bring images: forms, with OpenAI's names of the fields."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from pydantic import BaseModel
from starlette.datastructures import UploadFile
from starlette.requests import Request

from diffkiln.serving.files import decode
from diffkiln.serving.offer import Offer
from diffkiln.serving.refusals import Refusal
from diffkiln.serving.requests import read_form
from diffkiln.serving.settings import Settings

#: OpenAI's names of fields → keywords of pipelines; other keywords keep their names.
_KEYWORDS = {"mask": "mask_image", "input_reference": "image"}
_MAX_FILES, _MAX_FIELDS = 16, 32
#: Threads that unpack images, so that few are unpacked at once.
_DECODERS = ThreadPoolExecutor(2, "diffkiln-decode")


def field_of(keyword: str, videos: bool) -> str:
    """Returns the field in which the images of a keyword come."""
    names = {"mask_image": "mask"} | ({"image": "input_reference"} if videos else {})
    return names.get(keyword, keyword)


async def read_upload(
    request: Request, body: type[BaseModel], offer_for: Callable[[Any], Offer], settings: Settings
) -> tuple[Any, dict[str, tuple[Any, ...]]]:
    """Returns the checked fields of a form, and its images by keyword.

    Args:
        request: Whose body is a form.
        body: Model of the fields that are no images.
        offer_for: Gives the bundle that the fields ask for.
        settings: How large images may be.

    Raises:
        Refusal: a field or an image is wrong, missing, or too much.
    """
    async with request.form(max_files=_MAX_FILES, max_fields=_MAX_FIELDS, max_part_size=settings.body_bytes) as form:
        fields: dict[str, str] = {}
        files: dict[str, list[bytes]] = {}
        for name, value in form.multi_items():
            if isinstance(value, UploadFile):
                files.setdefault(name.removesuffix("[]"), []).append(await value.read())
            elif name in fields:
                raise Refusal(400, f"{name[:40]}: it is given twice. Send it once", name[:40])
            else:
                fields[name] = value
    checked = read_form(body, fields)
    offer = offer_for(checked)
    return checked, await _images(files, offer, settings)


async def _images(files: Mapping[str, list[bytes]], offer: Offer, settings: Settings) -> dict[str, tuple[Any, ...]]:
    wanted = {field_of(keyword, offer.videos): count for keyword, count in offer.takes.items()}
    for name in (*wanted, *files):
        found, count = len(files.get(name, ())), wanted.get(name, 0)
        if found != count:
            images = f"{count} image{'s' * (count != 1)}"
            raise Refusal(400, f"{name[:40]}: {offer.name} takes {images} here, and {found or 'none'} came", name[:40])
    loop = asyncio.get_running_loop()
    found = {}
    for name, items in files.items():
        decoded = [await loop.run_in_executor(_DECODERS, decode, data, name, settings.pixels) for data in items]
        found[_KEYWORDS.get(name, name)] = tuple(decoded)
    return found
