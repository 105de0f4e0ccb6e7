"""Measure what uvloop takes off: `python -m benchmarks.loops [call|paced|burst|burst-gathered ...]`.

The same library on uvloop and on asyncio, in turns, as in `python -m benchmarks`, whose rows have each loop for itself.
"""

import argparse
import importlib.util
import sys

from benchmarks.adapters import ADAPTERS
from benchmarks.beside import Side, over
from benchmarks.options import positive
from benchmarks.report import ratio, table
from benchmarks.rows import ROWS, Row

DEFAULT = ("call", "paced", "burst", "burst-gathered")
MEASURED = ("ours", "plain")


def page(rows: list[Row], rounds: int) -> str:
    """A table of the rows, uvloop over asyncio."""
    lines = [
        [row.title, *(ratio(over(row, Side(name, "uvloop"), Side(name, "asyncio"), rounds)) for name in MEASURED)]
        for row in rows
    ]
    return table([f"uvloop over asyncio ({rounds} rounds)", *(ADAPTERS[name].title for name in MEASURED)], lines)


def main() -> None:
    """Parse arguments and measure."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.loops", description=__doc__.split("\n", 1)[0])
    parser.add_argument(
        "rows", nargs="*", default=[*DEFAULT], metavar="ROW", help=f"of {', '.join(DEFAULT)} (default: all)"
    )
    parser.add_argument("--rounds", type=positive, default=5, help="new processes of each loop (default: %(default)s)")
    options = parser.parse_args()
    if unknown := sorted(set(options.rows) - set(DEFAULT)):
        parser.error(f"{unknown[0]!r} is none of {', '.join(DEFAULT)}")
    if importlib.util.find_spec("uvloop") is None:
        sys.exit("uvloop is not installed; the extra uvloop has it: pip install 'chatkore-async[uvloop]'")
    print(page([ROWS[name] for name in options.rows], options.rounds))


if __name__ == "__main__":
    main()
