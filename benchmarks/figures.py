"""What is measured, as it is written to `results/*.json`, and the arithmetic on it."""

import statistics
from typing import Literal

import msgspec

from benchmarks.machine import Machine

Measure = Literal["cpu", "wall", "memory", "importing"]


class Figures(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One run of one adapter in a process of its own. What a row does not measure is `None`.

    Attributes:
        cpu: Microseconds of the client's process for one call or one delta, in user code and in the kernel.
        wall: Seconds for all operations.
        p50, p99: Milliseconds of a call.
        first: Milliseconds from asking for a stream to its first delta, the median.
        memory: KiB of resident memory for one open stream or one waiting call.
        importing: Milliseconds of the import.
        peak: The most MiB of memory the process had.
        connections: How many the server saw.
        repeated: Requests the server saw beyond those that were asked for.
        server: The share of the time in which the server's core was busy.
    """

    cpu: float | None = None
    wall: float | None = None
    p50: float | None = None
    p99: float | None = None
    first: float | None = None
    memory: float | None = None
    importing: float | None = None
    peak: float | None = None
    connections: int | None = None
    repeated: int | None = None
    server: float | None = None


class Run(msgspec.Struct, frozen=True, kw_only=True):
    """Figures, and what they are of. `at` is the place on a curve: a concurrency, or the length of a stream."""

    row: str
    adapter: str
    loop: str
    at: int
    round: int
    figures: Figures


class Results(msgspec.Struct, frozen=True, kw_only=True):
    """All of one session of benchmarks."""

    python: str
    machine: Machine
    libraries: dict[str, str]
    allocator: dict[str, str]
    runs: list[Run]
    left_out: list[str] = []


class Spread(msgspec.Struct, frozen=True):
    """A median, and the quartiles between which the middle half lies."""

    low: float
    median: float
    high: float
    rounds: int


def spread(values: list[float]) -> Spread | None:
    """Sum up rounds; `None` where there are none."""
    if not values:
        return None
    if len(values) == 1:
        return Spread(values[0], values[0], values[0], 1)
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return Spread(low, median, high, len(values))


def by_round(
    results: Results, row: str, measure: Measure, adapter: str, loop: str, at: int | None = None
) -> dict[int, float]:
    """The figure of each round that has it; at the first place of a curve if no other is asked for."""
    runs = [run for run in results.runs if (run.row, run.adapter, run.loop) == (row, adapter, loop)]
    if at is None:
        at = min((run.at for run in runs), default=0)
    found = {run.round: getattr(run.figures, measure) for run in runs if run.at == at}
    return {number: value for number, value in found.items() if value is not None}


def ratios(above: dict[int, float], below: dict[int, float]) -> list[float]:
    """The ratio within each round that has both."""
    return [above[number] / below[number] for number in sorted(above.keys() & below.keys())]


def growth(
    results: Results, row: str, measure: Measure, adapter: str, loop: str, ends: tuple[int, int]
) -> dict[int, float]:
    """How much more a round's figure is at the far end of a curve than at the near one."""
    near, far = (by_round(results, row, measure, adapter, loop, at) for at in ends)
    return {number: far[number] / near[number] for number in sorted(near.keys() & far.keys())}
