"""Charts as static SVG, drawn by matplotlib, that take the colours of the page around them.

Names in them may be a stranger's: matplotlib would read "$" as a formula, and leave out what begins with "_".
"""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from typing import Any

from diffkiln.guards.printable import printable

#: Colours that can be told apart on white and on black, and by most people who see fewer colours (Okabe and Ito, 2008).
COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00")
_MARKERS = "os^Dvx"
_WIDTH = 5.2
_LONGEST = 60
_METADATA = re.compile(r"<metadata>.*?</metadata>", re.DOTALL)


def bars(rows: Mapping[str, Mapping[str, float]], unit: str) -> str:
    """Returns stacked horizontal bars as SVG: a bar for each row, a colour for each part.

    Args:
        rows: row → part → value.
        unit: of the values, under the axis.
    """
    figure, axes = _figure(0.9 + 0.42 * len(rows))
    parts = list(dict.fromkeys(part for row in rows.values() for part in row))
    for at, row in enumerate(rows.values()):
        left = 0.0
        for part, value in row.items():
            axes.barh(at, value, 0.62, left=left, color=COLOURS[parts.index(part) % len(COLOURS)], label=_text(part))
            left += value
    axes.set_yticks(range(len(rows)), map(_text, rows))
    axes.invert_yaxis()
    axes.set_xlabel(_text(unit))
    if len(parts) > 1:
        _legend(axes)
    return _svg(figure)


def waterfall(steps: Sequence[tuple[str, float]], unit: str, floor: float | None = None) -> str:
    """Returns how a number falls or rises from step to step as SVG.

    Args:
        steps: the name of each step and the number after it.
        unit: of the numbers.
        floor: a line that the number should not fall below.
    """
    figure, axes = _figure(0.9 + 0.42 * len(steps))
    before = steps[0][1]
    for at, (_, value) in enumerate(steps):
        worse = value < before
        low, width = min(before, value), abs(value - before)
        axes.barh(at, width or 0.1, 0.62, left=low, color=COLOURS[5] if worse else COLOURS[2])
        axes.annotate(f"{value:.4g}", (value, at), (4, 0), textcoords="offset points", va="center", fontsize=8)
        before = value
    if floor is not None:
        axes.axvline(floor, color=COLOURS[0], linestyle="--", linewidth=1.2)
    axes.set_yticks(range(len(steps)), [_text(name) for name, _ in steps])
    axes.invert_yaxis()
    axes.margins(x=0.15)
    axes.set_xlabel(_text(unit))
    return _svg(figure)


def lines(series: Mapping[str, Sequence[float]], across: str, unit: str) -> str:
    """Returns lines over steps from 1 as SVG, with a logarithmic axis.

    Args:
        series: name → a positive number for each step.
        across: what the steps are.
        unit: of the numbers.
    """
    figure, axes = _figure(2.6)
    for number, (name, values) in enumerate(series.items()):
        steps = range(1, len(values) + 1)
        axes.semilogy(
            steps, values, marker="o", markersize=3.5, color=COLOURS[number % len(COLOURS)], label=_text(name)
        )
    axes.set_xlabel(_text(across))
    axes.set_ylabel(_text(unit))
    axes.xaxis.get_major_locator().set_params(integer=True)
    _legend(axes)
    return _svg(figure)


def scatter(points: Mapping[str, Sequence[tuple[float, float, str]]], across: str, up: str) -> str:
    """Returns points as SVG, a colour and a mark for each series.

    Args:
        points: series → across, up, and the word beside the point.
        across, up: what the axes are.
    """
    figure, axes = _figure(3.4)
    for number, (name, series) in enumerate(points.items()):
        ways = [list(values) for values in zip(*((x, y) for x, y, _ in series), strict=True)]
        marker = _MARKERS[number % len(_MARKERS)]
        axes.plot(*ways, marker, markersize=6, color=COLOURS[number % len(COLOURS)], label=_text(name))
        for x, y, word in series:
            axes.annotate(_text(word), (x, y), (5, 3), textcoords="offset points", fontsize=8)
    axes.set_xlabel(_text(across))
    axes.set_ylabel(_text(up))
    axes.margins(0.1)
    _legend(axes)
    return _svg(figure)


def _text(name: str) -> str:
    """Returns a name as matplotlib shows exactly these characters."""
    shown = printable(name, _LONGEST).replace("$", r"\$")
    return f" {shown}" if shown.startswith("_") else shown


def _figure(height: float) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(_WIDTH, height), layout="constrained")
    axes = figure.add_subplot()
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    return figure, axes


def _legend(axes: Any) -> None:
    """Puts one entry for each label above the chart."""
    handles, labels = axes.get_legend_handles_labels()
    kept = dict(zip(labels, handles, strict=True))
    at = {"loc": "lower left", "bbox_to_anchor": (0, 1), "ncols": min(len(kept), 3)}
    axes.legend(list(kept.values()), list(kept), frameon=False, fontsize=8, **at)


def _svg(figure: Any) -> str:
    """Returns the figure as an element of a page: no file's header, no addresses, black as the page's own colour."""
    import matplotlib

    made = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "diffkiln", "font.size": 9}):
        figure.savefig(made, format="svg", transparent=True, metadata={"Date": None})
    text = made.getvalue()
    text = _METADATA.sub("", text[text.index("<svg") :])
    return text.replace("#000000", "currentColor").replace("stroke: black", "stroke: currentColor")
