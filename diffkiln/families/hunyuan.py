"""HunyuanVideo 1.5 and HunyuanImage: an encoder of its own sees what a prompt quotes, and none does where it quotes
nothing; the guidance may change with it, too. They are recorded for prompts that quote nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from diffkiln.families import Family
from diffkiln.record.patches import Patch
from diffkiln.record.text import demand, is_sentinel


def _without(marks: str) -> Callable[[Callable[[str], Any]], Callable[[str], Any]]:
    """Returns a patch that finds nothing quoted by these marks in a prompt of the recording, and refuses it later."""

    def around(original: Callable[[str], Any]) -> Callable[[str], Any]:
        def extracted(prompt: str) -> Any:
            if not is_sentinel(prompt):
                return original(prompt)
            demand("glyphs", marks)
            return None

        return extracted

    return around


PLUGIN = Family(
    patches=(
        Patch(
            {"extract_glyph_texts": "e27c55e9692f9cd6 6f4eba6fe17615f0"},
            _without("double"),
            known_in=("HunyuanVideo15Pipeline HunyuanVideo15ImageToVideoPipeline HunyuanVideo15TextEncoderStep"),
            function=True,
            around=True,
        ),
        Patch(
            {"extract_glyph_text": "a3891d548250f85e"},
            _without("all"),
            known_in="HunyuanImagePipeline",
            function=True,
            around=True,
        ),
    ),
)
