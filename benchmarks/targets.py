"""What the client has to reach. The project set these figures itself; to miss one is no reason to change it.

A few are out of reach; why, `experiments.md` shows. These say so whenever they are judged, and have a second bound that
holds them where they are.
"""

from typing import Literal

import msgspec

from benchmarks.arithmetic import Spread, by_turn, growth, ratios, spread
from benchmarks.figures import Results
from benchmarks.rows import LOOPS, ROWS

OFFICIAL = "openai"


class Target(msgspec.Struct, frozen=True, kw_only=True):
    """A bound for one row on one loop.

    Attributes:
        kind: `ratio` is ours over plain aiohttp, `gain` the official client over ours, `growth` our growth along a
            curve over that of plain aiohttp, `own growth` ours alone, `share` what our import adds to that of plain
            aiohttp.
        at_most, at_least: The bound; one of them.
        held_at: Beside `at_most`, where what is out of reach is held instead: what it comes to, and a machine's noise.
    """

    row: str
    kind: Literal["ratio", "gain", "growth", "own growth", "share"]
    loop: str = "asyncio"
    at_most: float | None = None
    at_least: float | None = None
    held_at: float | None = None

    @property
    def needs(self) -> set[str]:
        """The libraries without which it cannot be judged."""
        others: dict[str, set[str]] = {"ratio": {"plain"}, "growth": {"plain"}, "share": {"plain"}, "gain": {OFFICIAL}}
        return {"ours"} | others.get(self.kind, set())

    def met(self, value: float) -> bool:
        """Whether a median is within the bound."""
        return (self.at_most is None or value <= self.at_most) and (self.at_least is None or value >= self.at_least)


class Verdict(msgspec.Struct, frozen=True):
    """A target, and what was measured; `None` where nothing was.

    Attributes:
        by_hand: Of a gain, that of plain aiohttp.
    """

    target: Target
    found: Spread | None
    by_hand: Spread | None = None

    @property
    def met(self) -> bool | None:
        """Whether it was reached; `None` if nobody knows."""
        return None if self.found is None else self.target.met(self.found.median)

    @property
    def out_of_reach(self) -> str | None:
        """Why it does not count that it was missed, if it does not."""
        if self.found is None or self.met:
            return None
        if self.by_hand is not None and not self.target.met(self.by_hand.median):
            return f"plain aiohttp has {self.by_hand.median:.1f}"
        held_at = self.target.held_at
        return f"held at {held_at:g}" if held_at is not None and self.found.median <= held_at else None


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
    Target(row="import-beyond", kind="share", at_most=round(12 / 183, 3), held_at=0.085),
    Target(row="call", kind="gain", at_least=16),
    Target(row="paced", kind="gain", at_least=9),
    Target(row="burst", kind="gain", at_least=60),
    # 5,000 at once would take the official client a minute more, to say the same.
    Target(row="at-once-10000", kind="gain", at_least=30),
]


def found(results: Results, target: Target, whose: str = "ours") -> Spread | None:
    """What was measured of a target, turn by turn; of a gain, whose it is may be asked."""
    row = ROWS[target.row]

    def each(adapter: str) -> dict[int, float]:
        return by_turn(results, row, adapter, target.loop)

    if target.kind == "ratio":
        return spread(ratios(each("ours"), each("plain")))
    if target.kind == "gain":
        return spread(ratios(each(OFFICIAL), each(whose)))
    if target.kind == "growth":
        ours, plain = (growth(results, row, adapter, target.loop) for adapter in ("ours", "plain"))
        return spread(ratios(ours, plain))
    if target.kind == "own growth":
        return spread(list(growth(results, row, "ours", target.loop).values()))
    return spread(ratios(each("ours"), by_turn(results, ROWS["import"], "plain", target.loop)))


def judge(results: Results, rows: list[str], loops: list[str], targets: list[Target] = TARGETS) -> list[Verdict]:
    """Compare with the targets of these rows."""
    return [
        Verdict(target, found(results, target), found(results, target, "plain") if target.kind == "gain" else None)
        for target in targets
        if target.row in rows and target.loop in loops
    ]


def status(verdicts: list[Verdict]) -> int:
    """0 if all was reached that is not out of reach, 1 if something was missed, 2 if something was not measured."""
    if any(verdict.met is False and verdict.out_of_reach is None for verdict in verdicts):
        return 1
    return 2 if any(verdict.met is None for verdict in verdicts) else 0


_SAID = {
    "ratio": "of plain aiohttp",
    "gain": "times less than the official client",
    "growth": "of the growth of plain aiohttp",
    "own growth": "of what it is at the near end of the curve",
    "share": "of the import of plain aiohttp",
}


def told(verdict: Verdict) -> str:
    """A verdict as a line."""
    target, spread_ = verdict.target, verdict.found
    bound = f"at most {target.at_most:g}" if target.at_most is not None else f"at least {target.at_least:g}"
    line = f"{target.row}, {target.loop}: {bound} {_SAID[target.kind]}: "
    if spread_ is None:
        return line + "NOT MEASURED"
    digits = ".1f" if target.kind == "gain" else ".3f"
    quartiles = f"{spread_.low:{digits}} to {spread_.high:{digits}}, {spread_.count} pairs"
    middle = f"{spread_.median:{digits}} ({'one pair' if spread_.count == 1 else quartiles})"
    missed = "MISSED" if verdict.out_of_reach is None else f"OUT OF REACH, {verdict.out_of_reach}"
    return f"{line}{middle}: {'pass' if verdict.met else missed}"
