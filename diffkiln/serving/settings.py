"""What a server allows, and for how long."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from diffkiln.errors import CallError

#: A token shorter than this can be guessed.
SHORTEST_TOKEN = 16


@dataclass(frozen=True)
class Settings:
    """The limits of a server. Times are seconds, sizes are bytes.

    Attributes:
        queue: Images that wait for their turn at most; a request beyond them gets 429.
        window: How long a request waits for others to share its call, where the bundle has variants of larger batches.
        deadline: How long a request may take, waiting included; then it gets 504.
        images: Images that one request may ask for.
        prompt_chars: Characters of one prompt.
        body_bytes: Size of a JSON body.
        upload_bytes: Size of a body with images.
        bodies_bytes: Size of all bodies that are being received, together.
        pixels: Pixels of an image that a client sends.
        head_seconds: How long a client may take to send the head of a request.
        body_seconds: How long a client may take to send the body.
        stall_seconds: How long a client may take no bytes of its answer.
        connections: Connections at once; those beyond get 503.
        drain_seconds: How long running requests may take after SIGTERM.
        job_seconds: How long a job for a video may take, waiting included; then it fails.
        kept_videos: Jobs for videos that are known at a time, those that have ended included.
        kept_video_seconds: How long a finished video may be fetched.
        kept_video_bytes: Size of all finished videos together; the oldest make room for the latest.
        kept_loras: Adapters that are loaded at a time.
        loras: Folder of the adapters that requests may ask for; None where they may ask for none.
        tokens: SHA-256 digests of the bearer tokens that are accepted; none means that everybody is.
    """

    queue: int = 64
    window: float = 0.005
    deadline: float = 300.0
    images: int = 8
    prompt_chars: int = 4_000
    body_bytes: int = 256 << 10
    upload_bytes: int = 20 << 20
    bodies_bytes: int = 256 << 20
    pixels: int = 1 << 22
    head_seconds: float = 10.0
    body_seconds: float = 30.0
    stall_seconds: float = 60.0
    connections: int = 512
    drain_seconds: float = 60.0
    job_seconds: float = 3600.0
    kept_videos: int = 64
    kept_video_seconds: float = 3600.0
    kept_video_bytes: int = 512 << 20
    kept_loras: int = 8
    loras: Path | None = None
    tokens: tuple[bytes, ...] = ()

    def __post_init__(self) -> None:
        """Raises `CallError` for a limit that is not above zero, or a queue too short for one request."""
        for item in fields(self):
            value = getattr(self, item.name)
            if item.name not in ("tokens", "window", "loras") and value <= 0:
                raise CallError(f"{item.name}: {value} must be above 0")
        if self.window < 0:
            raise CallError(f"window: {self.window} must not be below 0")
        if self.images > self.queue:
            raise CallError(f"queue: {self.queue} places, but one request may ask for {self.images} images")
        if self.loras is not None and not self.loras.is_dir():
            raise CallError(f"loras: {self.loras} is not a folder. Give one with safetensors files, or leave it out")

    def admits(self, token: str) -> bool:
        """Returns True if the token is an accepted one. The time it takes does not tell how much of it is right."""
        found = _digest(token)
        same = [hmac.compare_digest(found, known) for known in self.tokens]
        return any(same)


def read_tokens(path: Path) -> tuple[bytes, ...]:
    """Returns the digests of the tokens in a file: one a line; empty lines and lines that begin with # do not count.

    Raises:
        CallError: the file cannot be read, others may read it, it has no token, or a token is too short.
    """
    try:
        mode, text = path.stat().st_mode, path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise CallError(f"token file {path}: it cannot be read: {error}") from None
    if mode & 0o027:  # secrets of Kubernetes are readable by the group of the pod
        raise CallError(f"token file {path}: other users may read it. Run: chmod 600 {path}")
    return digests([line.strip() for line in text.splitlines() if line.strip() and not line.startswith("#")], str(path))


def digests(tokens: Sequence[str], where: str) -> tuple[bytes, ...]:
    """Returns the digests of tokens, which are not kept themselves. `where` names their origin in errors."""
    if not tokens:
        raise CallError(f"{where}: there is no token in it. Write one a line, such as `openssl rand -hex 32` prints")
    if short := [number for number, token in enumerate(tokens, 1) if len(token) < SHORTEST_TOKEN]:
        raise CallError(f"{where}: token {short[0]} is shorter than {SHORTEST_TOKEN} characters. Use a longer one")
    return tuple(_digest(token) for token in tokens)


def _digest(token: str) -> bytes:
    return hashlib.sha256(token.encode("utf-8", "surrogateescape")).digest()
