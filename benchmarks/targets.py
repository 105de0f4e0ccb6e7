"""What the client has to reach. The project set these figures itself; to miss one is no reason to change it.

A few are out of reach; why, `experiments.md` shows. These say so whenever they are judged, and have a second bound that
holds them where they are. What lies so near its bound that the rounds of a run cannot tell it from that is not missed.
"""

import math
import statistics
from typing import Literal

import msgspec

from benchmarks.arithmetic import Ratios, Spread, by_turn, every, growth, ratios, relative_growth, spread
from benchmarks.figures import Results
from benchmarks.rows import LOOPS, ROWS

OFFICIAL = "openai"

UNLIKELY = 0.05
"""As often at most is a bound called missed that is the true median."""

FEWEST = 5  # rounds, of which all are beyond the true median less often than that

Outcome = Literal["pass", "NOT TOLD APART", "OUT OF REACH", "MISSED", "NOT MEASURED"]


class Target(msgspec.Struct, frozen=True, kw_only=True):
    """A bound for one row on one loop.

    Attributes:
        kind: `ratio` is ours over plain aiohttp, `gain` the official client over ours, `growth` our growth along a
            curve over that of plain aiohttp, `own growth` ours alone.
        at_most, at_least: The bound; one of them.
        held_at: Beside the bound, where what is out of reach is held instead: what it comes to, and a machine's noise.
    """

    row: str
    kind: Literal["ratio", "gain", "growth", "own growth"]
    loop: str = "asyncio"
    at_most: float | None = None
    at_least: float | None = None
    held_at: float | None = None

    @property
    def needs(self) -> set[str]:
        """The libraries without which it cannot be judged."""
        others: dict[str, set[str]] = {"ratio": {"plain"}, "growth": {"plain"}, "gain": {OFFICIAL}}
        return {"ours"} | others.get(self.kind, set())

    def met(self, value: float) -> bool:
        """Whether a figure is within the bound."""
        return (self.at_most is None or value <= self.at_most) and (self.at_least is None or value >= self.at_least)

    def held(self, value: float) -> bool:
        """Whether a figure is no worse than where it is held."""
        if self.held_at is None:
            return False
        return value <= self.held_at if self.at_least is None else value >= self.held_at


class Verdict(msgspec.Struct, frozen=True):
    """A target, and what was measured of it; of a round that has nothing of it, nothing."""

    target: Target
    rounds: Ratios

    @property
    def found(self) -> Spread | None:
        """The median that is judged, and its spread."""
        return spread(every(self.rounds))

    @property
    def beyond(self) -> int:
        """How many rounds are, by their medians, neither within the bound nor where it is held."""
        medians = [statistics.median(each) for each in self.rounds.values()]
        return sum(not self.target.met(median) and not self.target.held(median) for median in medians)

    @property
    def outcome(self) -> Outcome:
        """What was found. The median of all decides; whether it can tell, a sign test of the rounds does.

        Of the rounds, since what makes one process faster than the next is in all turns of it.
        """
        if self.found is None:
            return "NOT MEASURED"
        if self.target.met(self.found.median):
            return "pass"
        if self.target.held(self.found.median):
            return "OUT OF REACH"
        return "MISSED" if chance(self.beyond, len(self.rounds)) <= UNLIKELY else "NOT TOLD APART"


def chance(beyond: int, rounds: int) -> float:
    """How often so many rounds or more are beyond a bound that is the true median.

    0 for fewer than `FEWEST`, of which no number could be called a miss: then the median alone decides.
    """
    if rounds < FEWEST:
        return 0.0
    return sum(math.comb(rounds, number) for number in range(beyond, rounds + 1)) / 2**rounds


def _ratio(row: str, at_most: float, *loops: str, held_at: float | None = None) -> list[Target]:
    return [
        Target(row=row, kind="ratio", loop=loop, at_most=at_most, held_at=held_at) for loop in loops or ("asyncio",)
    ]


TARGETS = [
    *_ratio("call", 0.95, *LOOPS),
    *_ratio("paced", 1.03, *LOOPS, held_at=1.12),
    *_ratio("burst", 1.25),
    *_ratio("burst-gathered", 1.25, held_at=1.6),
    *_ratio("at-once-5000", 1.00),
    *_ratio("at-once-10000", 1.00),
    *_ratio("open-stream", 1.08),
    *_ratio("waiting-call", 1.08),
    Target(row="concurrency", kind="growth", at_most=1.00),
    Target(row="length", kind="own growth", at_most=1.03),
    # 12 ms, where plain aiohttp took 183; a slower machine takes longer for both.
    *_ratio("import-beyond", round(12 / 183, 3), held_at=0.085),
    Target(row="call", kind="gain", at_least=16),
    Target(row="paced", kind="gain", at_least=9),
    Target(row="burst", kind="gain", at_least=60, held_at=28),
    Target(row="burst-gathered", kind="gain", at_least=60, held_at=34),
    # 5,000 at once would take the official client a minute more, to say the same.
    Target(row="at-once-10000", kind="gain", at_least=30),
]


def measured(results: Results, target: Target) -> Ratios:
    """What was measured of a target, by round."""
    row, loop = ROWS[target.row], target.loop

    def each(adapter: str) -> dict[int, float]:
        return by_turn(results, row, adapter, loop)

    if target.kind == "ratio":
        return ratios(row, each("ours"), each("plain"))
    if target.kind == "gain":
        return ratios(row, each(OFFICIAL), each("ours"))
    if target.kind == "growth":
        return {number: [value] for number, value in relative_growth(results, row, "ours", "plain", loop).items()}
    return growth(results, row, "ours", loop)


def judge(results: Results, rows: list[str], loops: list[str], targets: list[Target] = TARGETS) -> list[Verdict]:
    """Compare with the targets of these rows."""
    return [
        Verdict(target, measured(results, target)) for target in targets if target.row in rows and target.loop in loops
    ]


def status(verdicts: list[Verdict]) -> int:
    """1 if a target was missed, else 2 if one was not measured, else 0."""
    outcomes = {verdict.outcome for verdict in verdicts}
    return 1 if "MISSED" in outcomes else 2 if "NOT MEASURED" in outcomes else 0


_SAID = {
    "ratio": "of plain aiohttp",
    "gain": "times less than the official client",
    "growth": "of the growth of plain aiohttp",
    "own growth": "of what it is at the near end of the curve",
}


def told(verdict: Verdict) -> str:
    """A verdict as a line."""
    target, found, rounds = verdict.target, verdict.found, len(verdict.rounds)
    bound = f"at most {target.at_most:g}" if target.at_most is not None else f"at least {target.at_least:g}"
    line = f"{target.row}, {target.loop}: {bound} {_SAID[target.kind]}: "
    if found is None:
        return line + verdict.outcome
    digits = ".1f" if target.kind == "gain" else ".3f"
    quartiles = (
        f"{found.low:{digits}} to {found.high:{digits}}, {found.count} in {rounds} round{'s' if rounds > 1 else ''}"
    )
    line += f"{found.median:{digits}} ({'one' if found.count == 1 else quartiles}): {verdict.outcome}"
    if verdict.outcome == "OUT OF REACH":
        return f"{line}, held at {target.held_at:g}"
    return f"{line}, {verdict.beyond} of {rounds} rounds beyond" if verdict.outcome == "NOT TOLD APART" else line
