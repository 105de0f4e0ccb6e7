"""What turns amount to: medians, spreads, ratios of neighbours."""

import math
import statistics
from collections.abc import Iterable
from itertools import chain

import msgspec

from benchmarks.figures import Results
from benchmarks.rows import Row

Ratios = dict[int, list[float]]
"""The ratios of each round, by its number."""


class Spread(msgspec.Struct, frozen=True):
    """A median, and the quartiles between which the middle half lies."""

    low: float
    median: float
    high: float
    count: int


def spread(values: Iterable[float]) -> Spread | None:
    """Sum up figures; `None` where there are none."""
    there = list(values)
    if not there:
        return None
    if len(there) == 1:
        return Spread(there[0], there[0], there[0], 1)
    low, median, high = statistics.quantiles(there, n=4, method="inclusive")
    return Spread(low, median, high, len(there))


def by_turn(results: Results, row: Row, adapter: str, loop: str, at: int | None = None) -> dict[int, float]:
    """The figure that counts of each turn that has it; of the first place of a curve if no other is asked for."""
    at = row.points[0].at if at is None else at
    runs = [run for run in results.runs if (run.row, run.adapter, run.loop, run.at) == (row.name, adapter, loop, at)]
    values = {run.turn: getattr(run.figures, row.measure) for run in runs}
    return {number: value for number, value in values.items() if value is not None}


def _by_round(row: Row, values: dict[int, float]) -> Ratios:
    found: Ratios = {}
    for number in sorted(values):
        found.setdefault(number // row.turns, []).append(values[number])
    return found


def ratios(row: Row, above: dict[int, float], below: dict[int, float]) -> Ratios:
    """The ratios of a row, each of two turns that one library had and two of the other.

    In a pair of turns, who is first had the turn before as well, and finds the caches as it left them; the other finds
    them full of the first one's. That moves a call by a tenth. The next pair goes the other way round, so the two are
    one figure, their geometric mean. Where each process has one turn, each pair is a figure.
    """
    pairs = {number: above[number] / below[number] for number in above.keys() & below.keys()}
    found = _by_round(row, pairs)
    return {
        number: [math.sqrt(one * other) for one, other in zip(each[::2], each[1::2], strict=False)] or each
        for number, each in found.items()
    }


def every(found: Ratios) -> list[float]:
    """The ratios of all rounds."""
    return list(chain.from_iterable(found.values()))


def growth(results: Results, row: Row, adapter: str, loop: str) -> Ratios:
    """How much more an operation costs at the far end of a curve than at the near one in turns of the same number."""
    if row.ends is None:
        return {}
    near, far = (by_turn(results, row, adapter, loop, at) for at in row.ends)
    return _by_round(row, {number: far[number] / near[number] for number in near.keys() & far.keys()})


def relative_growth(results: Results, row: Row, adapter: str, to: str, loop: str) -> dict[int, float]:
    """The growth of one library over that of another, by round: their ratio at the far end over the near one's."""
    if row.ends is None:
        return {}
    near, far = (ratios(row, *(by_turn(results, row, name, loop, at) for name in (adapter, to))) for at in row.ends)
    return {
        number: statistics.median(far[number]) / statistics.median(near[number])
        for number in sorted(near.keys() & far.keys())
    }
