"""What turns amount to: medians, spreads, ratios of pairs of turns."""

import statistics

import msgspec

from benchmarks.figures import Results
from benchmarks.rows import Row


class Spread(msgspec.Struct, frozen=True):
    """A median, and the quartiles between which the middle half lies."""

    low: float
    median: float
    high: float
    count: int


def spread(values: list[float]) -> Spread | None:
    """Sum up turns, or pairs of them; `None` where there are none."""
    if not values:
        return None
    if len(values) == 1:
        return Spread(values[0], values[0], values[0], 1)
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return Spread(low, median, high, len(values))


def by_turn(results: Results, row: Row, adapter: str, loop: str, at: int | None = None) -> dict[int, float]:
    """The figure that counts of each turn that has it; of the first place of a curve if no other is asked for."""
    at = row.points[0].at if at is None else at
    runs = [run for run in results.runs if (run.row, run.adapter, run.loop, run.at) == (row.name, adapter, loop, at)]
    values = {run.turn: getattr(run.figures, row.measure) for run in runs}
    return {number: value for number, value in values.items() if value is not None}


def ratios(above: dict[int, float], below: dict[int, float]) -> list[float]:
    """The ratio of each pair: two turns of the same number."""
    return [above[number] / below[number] for number in sorted(above.keys() & below.keys())]


def growth(results: Results, row: Row, adapter: str, loop: str) -> dict[int, float]:
    """How much more a turn's figure is at the far end of a curve than at the near one."""
    if row.ends is None:
        return {}
    near, far = (by_turn(results, row, adapter, loop, at) for at in row.ends)
    return {number: far[number] / near[number] for number in sorted(near.keys() & far.keys())}
