"""Draws the pictures of docs/programs.md: `python website/pictures.py`. Their colours suit light and dark pages."""

from __future__ import annotations

from html import escape
from pathlib import Path

IMAGES = Path(__file__).parents[1] / "docs" / "images"
#: Fill and edge of boxes, by what they stand for.
COLOURS = {
    "host": ("#e8eaf6", "#5c6bc0"),
    "weights": ("#ffe0cc", "#e65100"),
    "small": ("#eceff1", "#78909c"),
    "engine": ("#ffb74d", "#e65100"),
    "here": ("#ff8a50", "#bf360c"),
    "coming": ("#ffe0cc", "#ff8a50"),
}
_LINE = "#8a8f98"


class Picture:
    """An SVG under construction, in units of pixels."""

    def __init__(self, width: int, height: int, title: str) -> None:
        self._size = f'viewBox="0 0 {width} {height}" width="{width}" height="{height}"'
        self._parts = [f"<title>{escape(title)}</title>"]

    def text(self, x: float, y: float, words: str, *, size: int = 13, colour: str = _LINE, at: str = "middle") -> None:
        """Writes a line of text whose anchor is at (x, y)."""
        place = f'x="{x:g}" y="{y:g}" font-size="{size}" text-anchor="{at}" fill="{colour}"'
        self._parts.append(f"<text {place}>{escape(words)}</text>")

    def box(self, x: float, y: float, width: float, height: float, words: str, kind: str) -> None:
        """Draws a box with one line of text for each line of `words`."""
        fill, edge = COLOURS[kind]
        place = f'x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="5"'
        self._parts.append(f'<rect {place} fill="{fill}" stroke="{edge}" stroke-width="1.2"/>')
        lines = words.split("\n")
        for index, line in enumerate(lines):
            middle = y + height / 2 + 4.5 + (index - (len(lines) - 1) / 2) * 15
            self.text(x + width / 2, middle, line, size=12, colour="#1c1c1c")

    def arrow(self, x0: float, y0: float, x1: float, y1: float) -> None:
        """Draws an arrow from (x0, y0) to (x1, y1)."""
        line = f'x1="{x0:g}" y1="{y0:g}" x2="{x1:g}" y2="{y1:g}"'
        self._parts.append(f'<line {line} stroke="{_LINE}" stroke-width="1.5" marker-end="url(#tip)"/>')

    def save(self, name: str) -> None:
        """Writes the picture into docs/images."""
        tip = (
            '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" '
            f'orient="auto"><path d="M0 0L8 4L0 8z" fill="{_LINE}"/></marker></defs>'
        )
        head = f'<svg xmlns="http://www.w3.org/2000/svg" {self._size} font-family="system-ui, sans-serif">'
        (IMAGES / name).write_text("\n".join((head, tip, *self._parts, "</svg>\n")))


def straight_line() -> None:
    """Draws the call as Python has it, and as a program."""
    made = Picture(760, 250, "A pipeline's call as Python code with a loop, and as a straight line of operations")
    made.text(10, 24, "In diffusers: code with branches, a loop, and a scheduler that keeps state", at="start")
    boxes = ((10, "check\narguments"), (140, "encode\nthe prompt"), (270, "prepare\ntimesteps"), (430, "denoise, step"))
    for x, words in (*boxes, (640, "decode")):
        made.box(x, 45, 110, 46, words, "host")
    for x in (120, 250, 540):
        made.arrow(x, 68, x + (100 if x == 540 else 20), 68)
    made.arrow(380, 68, 430, 68)
    made.arrow(510, 91, 510, 112)
    made.arrow(510, 112, 460, 112)
    made.arrow(460, 112, 460, 92)
    made.text(486, 128, "repeat, 8 times", size=12)
    made.text(10, 168, "In the bundle: the same call at fixed sizes, recorded once", at="start")
    x = 10
    steps = [("tokens", "small", 56), ("text\nencoders", "weights", 66), ("noise", "small", 48)]
    steps += [(f"step {index}", "weights", 44) for index in range(8)] + [("VAE", "weights", 40), ("image", "small", 46)]
    for position, (words, kind, width) in enumerate(steps):
        made.box(x, 185, width, 44, words, kind)
        if position:
            made.arrow(x - 11, 207, x, 207)
        x += width + 11
    made.save("program-line.svg")


def regions() -> None:
    """Draws a component's program with its blocks, and the engines that serve them."""
    made = Picture(760, 272, "A component's program: operators, four blocks, and the two engines that serve them")
    made.text(10, 24, "The program of the digits example's transformer", at="start")
    blocks = ("transformer_\nblocks.0", "transformer_\nblocks.1", "single_…\nblocks.0", "single_…\nblocks.1")
    made.box(10, 40, 90, 50, "19\noperators", "small")
    for index, name in enumerate(blocks):
        x = 125 + index * 130
        made.arrow(x - 25, 65, x, 65)
        made.box(x, 40, 105, 50, name, "weights")
        made.text(x + 52, 112, f"weights {index}", size=11)
    made.arrow(620, 65, 645, 65)
    made.box(645, 40, 100, 50, "10\noperators", "small")
    made.text(385, 258, "Two engines, compiled ahead of time, serve four blocks: the weights are inputs")
    for x, words in ((160, "engine\nFluxTransformerBlock"), (420, "engine\nFluxSingleTransformerBlock")):
        made.box(x, 180, 190, 50, words, "engine")
        made.arrow(x + 60, 180, x + 17, 122)
        made.arrow(x + 110, 180, x + 147, 122)
    made.text(55, 112, "replayed by torch", size=11)
    made.text(695, 112, "replayed by torch", size=11)
    made.save("program-regions.svg")


def offloading() -> None:
    """Draws which groups of weights are in memory while a step runs."""
    made = Picture(760, 230, "While one block computes, the next block's weights come in, and the last one's leave")
    made.text(10, 24, "One denoising step with offloaded weights: two groups are in memory at most", at="start")
    for index in range(4):
        y = 40 + index * 34
        made.text(10, y + 20, f"block {index}", at="start", size=12)
        if index:
            made.box(100 + (index - 1) * 150, y, 148, 28, "comes in", "coming")
        made.box(100 + index * 150, y, 148, 28, "computes", "here")
    made.arrow(100, 190, 715, 190)
    made.text(410, 210, "time", size=12)
    made.save("program-weights.svg")


def schedule() -> None:
    """Draws a caching schedule as an edit of the program."""
    made = Picture(760, 200, "A caching schedule replaces the blocks of every second step by values of the step before")
    for row, (y, title) in enumerate(((40, "Before: every step runs all blocks"), (130, "After cache_schedule"))):
        made.text(10, y - 12, title, at="start")
        for index in range(8):
            x = 10 + index * 93
            reuses = row == 1 and index % 2 == 1
            made.box(x, y, 82, 44, "reuses" if reuses else "4 blocks", "small" if reuses else "weights")
            if index:
                made.arrow(x - 11, y + 22, x, y + 22)
    made.save("program-schedule.svg")


if __name__ == "__main__":
    for draw in (straight_line, regions, offloading, schedule):
        draw()
