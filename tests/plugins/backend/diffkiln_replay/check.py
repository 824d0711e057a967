"""What fits: every region of torch's operators, on every machine."""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import Field

from diffkiln.exporters.base import Exporter
from diffkiln.exporters.options import Options


class ReplayOptions(Options):
    """Whether types are compared."""

    lowers: ClassVar = ("paranoid",)

    paranoid: bool = Field(False, description="Compare the type of every result with the declared one.")

    def lowered(self) -> dict[str, Any]:
        return {"paranoid": True} if self.paranoid else {}


class Replay(Exporter):
    """The backend `replay`."""

    name: ClassVar[str] = "replay"
    builder = "diffkiln_replay.build"
    summary = "replays a region operation by operation."
    options = ReplayOptions
    examples: ClassVar = ({"name": "compile", "component": "transformer", "backend": name, "paranoid": True},)


PLUGIN = Replay()
