"""Results as drawings: `python -m benchmarks.charts RESULTS.json DIRECTORY`. It needs matplotlib, of the extra bench.

The drawings stand on white pages and on black ones: nothing is behind them, and all tones are middle ones. The same
results give the same bytes.
"""

import sys
from pathlib import Path
from typing import Any

import matplotlib as mpl
import msgspec
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, NullFormatter, NullLocator

from benchmarks.adapters import ADAPTERS
from benchmarks.arithmetic import by_turn, every, ratios, spread
from benchmarks.figures import Results
from benchmarks.report import loops, median, number
from benchmarks.rows import ROWS, Row

# Each has a contrast of 3 or more on white and on black.
INK = "#7a7f87"
COLOURS = {
    "ours": "#d9480f",
    "plain": "#7a7f87",
    "bare": "#b08900",
    "openai": "#1c7ed6",
    "openai_aiohttp": "#0c8599",
    "litellm": "#9c5fd4",
}
MARKS = {"ours": "o", "plain": "s", "bare": "d", "openai": "^", "openai_aiohttp": "v", "litellm": "P"}
COMPARED = [name for name in ADAPTERS if name != "plain"]
STYLE: dict[Any, Any] = {
    "svg.hashsalt": "chatkore_async",
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 10,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "savefig.transparent": True,
}


BAR, GAP = 1.0, 1.3  # heights: of a bar, and between groups of bars


class Group(msgspec.Struct, frozen=True):
    """A row of the table: of each library its ratio to the reference, and its figure in words."""

    title: str
    bars: list[tuple[str, float, str]]


def _save(figure: Figure, place: Path) -> None:
    figure.savefig(place, format="svg", metadata={"Date": None, "Creator": None}, bbox_inches="tight")


def groups(results: Results) -> list[Group]:
    """What the bars show: each row that is no curve, and is no part of another."""
    found: list[Group] = []
    for row in ROWS.values():
        for loop in [] if row.ends or row.name == "import-beyond" else loops(results, row):
            plain = by_turn(results, row, "plain", loop)
            each: list[tuple[str, float, str]] = []
            for name in COMPARED:
                times = spread(every(ratios(row, by_turn(results, row, name, loop), plain)))
                middle = median(results, row, name, loop)
                if times is not None and middle is not None:
                    each.append((name, times.median, number(middle, row.unit)))
            if each:
                found.append(Group(f"{row.title} ({loop})" if len(row.loops) > 1 else row.title, each))
    return found


def bars(results: Results, place: Path) -> None:
    """Each row against the same by hand with aiohttp: bars to the left are less."""
    found = groups(results)
    if not found:
        return
    height = sum(BAR * len(group.bars) + GAP for group in found)
    figure = Figure(figsize=(8, 0.17 * height + 0.8))
    axes: Any = figure.subplots()
    top, ticks = 0.0, list[float]()
    for group in found:
        ticks.append(top + BAR * (len(group.bars) - 1) / 2)
        for place_, (name, times, text) in enumerate(group.bars):
            at = top + BAR * place_
            axes.barh(at, times - 1, left=1, height=BAR * 0.84, color=COLOURS[name])
            axes.plot(times, at, marker="o", markersize=5, color=COLOURS[name])  # a bar of no length is seen too
            end = {"xytext": (6, 0), "textcoords": "offset points", "va": "center", "size": 8}
            axes.annotate(f"{number(times)} × ({text})", (max(times, 1), at), **end)
        top += BAR * len(group.bars) + GAP
    axes.set_xscale("log")
    axes.axvline(1, color=COLOURS["plain"], linewidth=1.2)
    axes.set_yticks(ticks, [group.title for group in found])
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(top - GAP, -BAR)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g} ×"))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.spines["left"].set_visible(False)
    low, high = axes.get_xlim()
    axes.set_xlim(low, high * 5)  # room for the words behind the longest bars
    axes.set_xlabel(f"times what {ADAPTERS['plain'].title}, takes")
    there = [name for name in COMPARED if any(name == bar[0] for group in found for bar in group.bars)]
    handles = [Patch(color=COLOURS[name], label=ADAPTERS[name].title) for name in there]
    axes.legend(
        handles=handles, loc="lower right", bbox_to_anchor=(1, 1), ncols=len(handles), fontsize=8, handlelength=1
    )
    _save(figure, place / "bars.svg")


def curve(results: Results, row: Row, label: str, place: Path) -> None:
    """What one operation costs at each place of a curve."""
    loop = row.loops[0]
    lines = {
        name: [(point.at, value) for point in row.points if (value := median(results, row, name, loop, point.at))]
        for name in ADAPTERS
    }
    if not any(lines.values()):
        return
    figure = Figure(figsize=(6, 3.6))
    axes: Any = figure.subplots()
    for name, line in lines.items():
        if line:
            look = {"marker": MARKS[name], "color": COLOURS[name], "zorder": 3 if name == "ours" else 2}
            axes.plot(*zip(*line, strict=True), label=ADAPTERS[name].title, **look)
    axes.set_xscale("log")
    axes.set_yscale("log")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}" if value >= 1 else f"{value:g}"))
        axis.set_minor_formatter(NullFormatter())
    axes.grid(which="major", color=INK, alpha=0.25)
    axes.set_xlabel(label)
    axes.set_ylabel(f"{row.unit} of CPU for {row.title.split(',', 1)[0]}")
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    _save(figure, place / f"{row.name}.svg")


def main() -> None:
    """Draw all there is to draw."""
    stored, place = map(Path, sys.argv[1:])
    results = msgspec.json.decode(stored.read_bytes(), type=Results)
    with mpl.rc_context(STYLE):
        bars(results, place)
        curve(results, ROWS["concurrency"], "calls at a time", place)
        curve(results, ROWS["length"], "deltas of the stream", place)


if __name__ == "__main__":
    main()
