"""The command that serves a bundle over HTTP."""

from __future__ import annotations

import functools
import os
from pathlib import Path
from typing import Any

import click

from diffkiln.cli.group import FILE
from diffkiln.cli.memory import MAX_MEMORY
from diffkiln.cli.printing import say
from diffkiln.cli.run import DEVICE, LIMIT, NATIVE, limits_of
from diffkiln.cli.trust import POLICY
from diffkiln.errors import MissingDependency
from diffkiln.serving.settings import Settings, digests, read_tokens

#: Where a token may stand instead of in a file; a command line is seen by every user of the machine.
_TOKEN = "DIFFKILN_TOKEN"
_SECONDS = click.FloatRange(0, min_open=True)
_LEVELS = ("debug", "info", "warning", "error")


def _number(name: str, kind: click.ParamType, text: str) -> Any:
    """Returns the option of a field of the settings."""
    default = getattr(Settings, name.removeprefix("--").replace("-", "_"))
    return click.option(name, type=kind, default=default, show_default=True, help=text)


@click.command("serve")
@click.argument("bundle", type=FILE)
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on; 0.0.0.0 is every one.")
@click.option(
    "--port", type=click.IntRange(0, 65535), default=8000, show_default=True, help="Port; 0 takes a free one."
)
@click.option("--name", help="What requests call the bundle (default: the folder's name).")
@click.option("--tokens", type=FILE, help=f"File with bearer tokens, one a line (or one in {_TOKEN}).")
@_number("--queue", click.IntRange(1), "Images that may wait.")
@_number("--window", click.FloatRange(0), "Seconds to wait for requests that share a call.")
@_number("--deadline", _SECONDS, "Seconds that a request may take.")
@_number("--job-seconds", _SECONDS, "Seconds that a job for a video may take.")
@_number("--kept-videos", click.IntRange(1), "Jobs for videos that are known at a time.")
@_number("--images", click.IntRange(1), "Images of one request.")
@_number("--drain-seconds", _SECONDS, "Seconds for running requests after SIGTERM.")
@click.option("--loras", type=FILE, help="Folder of LoRA adapters that requests may ask for.")
@_number("--kept-loras", click.IntRange(1), "Adapters that are loaded at a time.")
@click.option(
    "--share-weights", is_flag=True, help="Keep the weights in memory once for all servers of this user, on a CPU."
)
@click.option("--log-json", is_flag=True, help="Write log lines as JSON.")
@click.option("--log-level", type=click.Choice(_LEVELS), default="info", help="The least that is logged.")
@DEVICE
@MAX_MEMORY
@LIMIT
@POLICY
@NATIVE
def serve_(
    bundle: Path,
    host: str,
    port: int,
    name: str | None,
    tokens: Path | None,
    loras: Path | None,
    share_weights: bool,
    log_json: bool,
    log_level: str,
    device: str | None,
    max_memory: int | None,
    limits: tuple[str, ...],
    policy: Path | None,
    allow_native: bool,
    **numbers: Any,
) -> None:
    """Serve BUNDLE over HTTP, as OpenAI's API.

    Requests name sizes and steps of the bundle's variants. Those that differ in prompt and seed alone share a call
    where there are variants of larger batches. The page at / is a form to try it.

    \b
    diffkiln serve bundle --port 8000
    diffkiln serve bundle --host 0.0.0.0 --tokens tokens.txt --log-json
    """
    needs_server()
    from diffkiln.runtime.loading import load
    from diffkiln.serving.logs import set_up
    from diffkiln.serving.server import serve

    known = read_tokens(tokens) if tokens else ()
    if text := os.environ.pop(_TOKEN, ""):
        known = (*known, *digests([text], _TOKEN))
    settings = Settings(**numbers, tokens=known, loras=loras)
    set_up(log_json, log_level)
    if not known and host not in ("127.0.0.1", "::1", "localhost"):
        say("warning: no tokens, so everybody who can reach this machine may send requests. See --tokens")
    load = functools.partial(
        load,
        bundle,
        allow_native=allow_native,
        device=device,
        policy=policy,
        limits=limits_of(limits),
        max_memory=max_memory,
        share_weights=share_weights,
    )
    serve(bundle, name or bundle.absolute().name, load, settings, host, port, lambda url: say(f"listening on {url}"))


def needs_server() -> None:
    """Checks that the packages of the extra `serve` are installed. Raises `MissingDependency`."""
    from importlib.util import find_spec

    wanted = ("fastapi", "uvicorn", "httptools", "prometheus_client", "python_multipart")
    if missing := [name for name in wanted if find_spec(name) is None]:
        raise MissingDependency(f"serving needs {', '.join(missing)}: pip install 'diffkiln[serve]'")
