"""Results as a page in Markdown."""

import statistics
from collections.abc import Iterator

from benchmarks.adapters import ADAPTERS
from benchmarks.arithmetic import Spread, by_turn, every, growth, ratios, relative_growth, spread
from benchmarks.figures import Results
from benchmarks.rows import ROWS, Row
from benchmarks.targets import Verdict, told

_DETAILS = (("p50", "ms"), ("p99", "ms"), ("first", "ms"), ("peak", "MiB"), ("connections", ""))
_HEADS = ("p50", "p99", "first text", "peak memory", "connections")

BUSY = 0.9  # of its core: then what is measured waits for the server

_HOW_TO_READ = """\
CPU time of the client's process for a call or a delta, time on the wall for calls at once, resident memory. Each figure
is the median of its turns; figures of one line were measured side by side, those of two lines were not. The last column
is the median of the ratios of neighbouring turns (calls at once, memory and imports: of processes one after another),
and the quartiles of these ratios.
"""


def number(value: float, unit: str = "") -> str:
    """A figure with three digits that mean something, and its unit on the same line."""
    if value >= 1000:
        text = f"{value:,.0f}"
    elif value >= 100:
        text = f"{value:.0f}"
    else:
        text = f"{value:.1f}" if value >= 10 else f"{value:.2f}"
    return f"{text}\u00a0{unit}" if unit else text


def ratio(found: Spread | None) -> str:
    """A ratio and, behind it, where the middle half of what it is made of lies."""
    if found is None:
        return ""
    if found.count == 1:
        return f"{found.median:.2f} (one)"
    return f"{found.median:.3f} ({found.low:.3f} to {found.high:.3f})"


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def table(heads: list[str], rows: list[list[str]]) -> str:
    """A table, without the columns in which nothing stands."""
    kept = [place for place in range(len(heads)) if any(row[place] for row in rows)]
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(_row([line[place] for place in kept]) for line in lines) + "\n"


def median(results: Results, row: Row, adapter: str, loop: str, at: int | None = None) -> float | None:
    """The median of a library's turns."""
    found = spread(by_turn(results, row, adapter, loop, at).values())
    return None if found is None else found.median


def loops(results: Results, row: Row) -> list[str]:
    """The loops a row was measured on."""
    there = {run.loop for run in results.runs if run.row == row.name}
    return [loop for loop in row.loops if loop in there]


def _cells(results: Results, row: Row, loop: str, at: int | None = None) -> Iterator[str]:
    each = {adapter: by_turn(results, row, adapter, loop, at) for adapter in ADAPTERS}
    for adapter in ADAPTERS:
        middle = median(results, row, adapter, loop, at)
        yield "" if middle is None else number(middle, row.unit)
    yield ratio(spread(every(ratios(row, each["ours"], each["plain"]))))


def main_table(results: Results) -> str:
    """One line for each row that is no curve."""
    rows = [
        [row.title, loop, *_cells(results, row, loop)]
        for row in ROWS.values()
        if not row.ends
        for loop in loops(results, row)
    ]
    return table(["", "loop", *(adapter.title for adapter in ADAPTERS.values()), "ours / by hand"], rows)


def curve_table(results: Results, row: Row) -> str:
    """One line for each place of a curve, and the growth between its ends."""
    loop = row.loops[0]
    rows = [
        [f"{point.at:,}", *_cells(results, row, loop, point.at)]
        for point in row.points
        if any((run.row, run.at) == (row.name, point.at) for run in results.runs)
    ]
    assert row.ends is not None
    grown = [spread(every(growth(results, row, name, loop))) for name in ADAPTERS]
    if any(grown):
        rows.append(
            [
                f"{row.ends[1]:,} / {row.ends[0]:,}",
                *("" if one is None else f"{one.median:.2f} ×" for one in grown),
                ratio(spread(relative_growth(results, row, "ours", "plain", loop).values())),
            ]
        )
    return table(["", *(adapter.title for adapter in ADAPTERS.values()), "ours / by hand"], rows)


def details(results: Results) -> str:
    """What else was seen of each row and library: latencies, memory, connections."""
    rows: list[list[str]] = []
    for row in ROWS.values():
        for loop in loops(results, row) if row.work != "import" and not row.ends else []:
            for name, adapter in ADAPTERS.items():
                runs = [
                    run.figures for run in results.runs if (run.row, run.adapter, run.loop) == (row.name, name, loop)
                ]
                cells: list[str] = []
                for measure, unit in _DETAILS:
                    values = [value for figures in runs if (value := getattr(figures, measure)) is not None]
                    whole = measure == "connections"
                    middle = statistics.median(values) if values else 0
                    cells.append((f"{middle:,.0f}" if whole else number(middle, unit)) if values else "")
                if any(cells):
                    rows.append([row.title, loop, adapter.title, *cells])
    return table(["", "loop", "", *_HEADS], rows) if rows else ""


def doubts(results: Results) -> list[str]:
    """What makes figures of a library mean less than they seem to: more requests or connections, or a busy server."""
    found: dict[str, None] = {}
    for run in results.runs:
        row, figures, title = ROWS[run.row], run.figures, ADAPTERS[run.adapter].title
        where = f"{row.title}{f' ({run.at:,})' if run.at else ''}, {run.loop}: {title}"
        allowed = next(point.concurrency for point in row.points if point.at == run.at)
        if figures.repeated:
            found[f"{where} repeated requests"] = None
        if figures.connections is not None and figures.connections > allowed and row.work in ("calls", "streams"):
            found[f"{where} opened connections anew"] = None
        if figures.server is not None and figures.server > BUSY:
            found[f"{where} kept the server busy"] = None
    return list(found)


def page(results: Results, verdicts: list[Verdict]) -> str:
    """All of it."""
    machine = results.machine
    cores = f"{machine.cores} core{'s' if machine.cores > 1 else ''}"
    where = "the server on one, the client on another" if machine.pinned else "server and client on any"
    libraries = ", ".join(f"{name} {version}" for name, version in sorted(results.libraries.items()))
    parts = [
        f"{results.python} on {machine.kernel}, {machine.cpu}, {cores}: {where}. With {libraries}.\n",
        _HOW_TO_READ,
    ]
    if text := main_table(results):
        parts.append(text)
    for row in ROWS.values():
        if row.ends and loops(results, row):
            parts += [f"{row.title[0].upper()}{row.title[1:]} ({row.unit} of CPU):\n", curve_table(results, row)]
    if text := details(results):
        parts += ["What else was seen, medians:\n", text]
    if verdicts:
        parts += ["Against the targets:\n", "\n".join(f"- {told(verdict)}" for verdict in verdicts) + "\n"]
    if found := doubts(results):
        parts += ["To be taken with caution:\n", "\n".join(f"- {doubt}" for doubt in found) + "\n"]
    if results.left_out:
        parts += ["Left out:\n", "\n".join(f"- {why}" for why in results.left_out) + "\n"]
    return "\n".join(parts)
