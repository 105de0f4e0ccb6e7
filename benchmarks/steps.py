"""Measure what each part of the client adds: `python -m benchmarks.steps [call|paced|burst|burst-gathered ...]`.

From aiohttp's session, set up as the client sets it up, each step does one thing more that the client does; the last is
the client. All take turns, as in `python -m benchmarks`, and each ratio is over the same by hand.
"""

import argparse
from contextlib import ExitStack

from benchmarks.arithmetic import spread
from benchmarks.report import ratio, table
from benchmarks.rows import LOOPS, ROWS, Row
from benchmarks.runner import Child, Part, command, in_turn, serving

REFERENCE = "plain"
STEPS = {
    "call": {
        "session": "the session alone, set up as ours",
        "steps:Typed": "and the request checked, the answer typed",
        "steps:Pooled": "and arguments told apart, the pool, errors of ours",
        "ours": "and deadline, attempts, metadata, books: the client",
    },
    "paced": {
        "session": "the session alone, set up as ours",
        "steps:Yielding": "and deltas handed out one by one",
        "steps:Framed": "and the rules of event streams, typed chunks",
        "steps:Merged": "and raw bytes kept, chunks merged",
        "ours": "and idle time, limits, leaving, the end: the client",
    },
}
STEPS["burst"] = STEPS["burst-gathered"] = STEPS["paced"]


def measured(row: Row, loop: str, rounds: int) -> dict[str, list[float]]:
    """The CPU of each turn of each step, in microseconds."""
    adapters = [REFERENCE, *STEPS[row.name]]
    found: dict[str, list[float]] = {adapter: [] for adapter in adapters}
    with serving() as server:
        for _ in range(rounds):
            with ExitStack() as stack:
                children = [
                    (adapter, stack.enter_context(Child(command(part, row, loop, server))))
                    for adapter in adapters
                    for part in [Part(adapter=adapter, load=row.points[0], turns=row.turns)]
                ]
                for _, (adapter, child) in in_turn(children, row.turns):
                    cpu = child.turn().cpu
                    assert cpu is not None
                    found[adapter].append(cpu)
    return found


def page(row: Row, loop: str, found: dict[str, list[float]]) -> str:
    """A table of the steps, each over the same by hand."""
    by_hand = found[REFERENCE]
    lines = [
        [text, ratio(spread([ours / plain for ours, plain in zip(found[adapter], by_hand, strict=True)]))]
        for adapter, text in STEPS[row.name].items()
    ]
    return table([f"{row.title} ({loop}, {len(by_hand)} turns)", "over by hand"], lines)


def main() -> None:
    """Parse arguments and measure."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.steps", description=__doc__.split("\n", 1)[0])
    parser.add_argument(
        "rows", nargs="*", default=[*STEPS], metavar="ROW", help=f"of {', '.join(STEPS)} (default: all)"
    )
    parser.add_argument("--rounds", type=int, default=5, help="new processes of each step (default: %(default)s)")
    parser.add_argument("--loop", choices=LOOPS, default="asyncio", help="default: %(default)s")
    options = parser.parse_args()
    if unknown := sorted(set(options.rows) - set(STEPS)):
        parser.error(f"there are no steps of {unknown[0]!r}")
    for row in options.rows:
        print(page(ROWS[row], options.loop, measured(ROWS[row], options.loop, options.rounds)), flush=True)


if __name__ == "__main__":
    main()
