"""Servers that examples start: each in a process of its own, on a port that is free."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path

import httpx2


class Servers(ExitStack):
    """Servers by the port that the document names."""

    def __init__(self) -> None:
        super().__init__()
        self._ports: dict[str, str] = {}

    def start(self, command: str) -> bool:
        """Starts a server, if the command does; once it answers, the next examples may ask it."""
        words = shlex.split(command, comments=True)
        if words[:2] != ["diffkiln", "serve"]:
            return False
        place = words.index("--port") + 1
        named, words[place] = words[place], "0"
        log = Path(f"server-{named}.log")
        with log.open("w") as out:
            started = subprocess.Popen([sys.executable, "-m", "diffkiln", *words[1:]], stderr=out)
        self.callback(started.wait)
        self.callback(started.terminate)
        ends = time.monotonic() + 120
        while not (found := re.search(r"listening on http://127.0.0.1:(\d+)", log.read_text())) or not _ready(found[1]):
            assert started.poll() is None, log.read_text()
            assert time.monotonic() < ends
            time.sleep(0.1)
        self._ports[named] = found[1]
        return True

    def at_real_ports(self, text: str) -> str:
        """Returns an example that asks the servers where they are, and fails where `curl` gets an error."""
        for named, port in self._ports.items():
            text = text.replace(f"localhost:{named}", f"127.0.0.1:{port}")
        return re.sub(r"^curl ", "curl -sS --fail-with-body ", text, flags=re.MULTILINE)


def _ready(port: str) -> bool:
    try:
        return httpx2.get(f"http://127.0.0.1:{port}/ready", trust_env=False).status_code == 200
    except httpx2.TransportError:
        return False
