"""Measure what each part of the client adds: `python -m benchmarks.steps [call|paced|burst|burst-gathered ...]`.

From aiohttp's session, set up as the client sets it up, each step does one thing more that the client does; the last is
the client. Each takes turns with the same by hand, as in `python -m benchmarks`, two processes at a time: with more,
those that wait long would have to open their connections anew.
"""

import argparse

from benchmarks.beside import Side, over
from benchmarks.options import positive
from benchmarks.report import ratio, table
from benchmarks.rows import LOOPS, ROWS, Row

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


def page(row: Row, loop: str, rounds: int) -> str:
    """A table of the steps, each over the same by hand."""
    lines = [
        [text, ratio(over(row, Side(adapter, loop), Side(REFERENCE, loop), rounds))]
        for adapter, text in STEPS[row.name].items()
    ]
    return table([f"{row.title} ({loop}, {rounds} rounds of {row.turns} turns)", "over by hand"], lines)


def main() -> None:
    """Parse arguments and measure."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.steps", description=__doc__.split("\n", 1)[0])
    parser.add_argument(
        "rows", nargs="*", default=[*STEPS], metavar="ROW", help=f"of {', '.join(STEPS)} (default: all)"
    )
    parser.add_argument("--rounds", type=positive, default=5, help="new processes of each step (default: %(default)s)")
    parser.add_argument("--loop", choices=LOOPS, default="asyncio", help="default: %(default)s")
    options = parser.parse_args()
    if unknown := sorted(set(options.rows) - set(STEPS)):
        parser.error(f"there are no steps of {unknown[0]!r}")
    for row in options.rows:
        print(page(ROWS[row], options.loop, options.rounds), flush=True)


if __name__ == "__main__":
    main()
