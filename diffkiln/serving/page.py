"""The page at `/`: a form to try the bundle with. One file, nothing from elsewhere."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path

from diffkiln.serving.forms import field_of
from diffkiln.serving.offer import Offer

_FILE = Path(__file__).with_name("page.html")


def page(routes: Mapping[str, Mapping[str, Offer]], tokens: bool) -> tuple[str, dict[str, str]]:
    """Returns the page, and the headers that let a browser run its own script and nothing else.

    Args:
        routes: The bundles of each path, by name.
        tokens: Whether requests need one.
    """
    models = [_described(path, offer) for path, offers in routes.items() for offer in offers.values()]
    # "<" would end the script that the data stands in.
    data = json.dumps({"models": models, "tokens": tokens}).replace("<", "\\u003c")
    text = _FILE.read_text().replace("/*DATA*/", data)
    policy = (
        f"default-src 'none'; script-src {_hash(text, 'script')}; style-src {_hash(text, 'style')}; "
        "img-src data:; media-src data:; connect-src 'self'; "
        "form-action 'none'; base-uri 'none'; frame-ancestors 'none'"
    )
    return text, {"content-security-policy": policy}


def _described(path: str, offer: Offer) -> dict[str, object]:
    return {
        "path": path,
        "name": offer.name,
        "sizes": offer.sizes,
        "negative": offer.negative,
        "videos": offer.videos,
        "shows": offer.shows,
        "images": {field_of(keyword, offer.videos): count for keyword, count in offer.takes.items()},
    }


def _hash(text: str, tag: str) -> str:
    """Returns the source expression of CSP for the one element of this kind."""
    found = re.search(f"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
    inside = found[1] if found else ""
    return f"'sha256-{base64.b64encode(hashlib.sha256(inside.encode()).digest()).decode()}'"
