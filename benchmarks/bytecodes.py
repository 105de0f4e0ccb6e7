"""Count the bytecodes of one operation, by function: `python -m benchmarks.bytecodes [ADAPTER ...]`.

What runs once in a call finds nothing in the caches of the processor. There it hardly matters what a bytecode does, and
their number tells what the call costs: ours over by hand it says what the clock says within some four percent, and it
says the same each time, on any machine. So a change is tried with this first, and then with the clock. Where something
runs in a loop, or where most of the time goes into C, as with deltas in a burst, it tells less.
"""

import argparse
import importlib
import sys
from collections import Counter
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import msgspec

from benchmarks.adapters import ADAPTERS, STEPS, Client, load
from benchmarks.answers import LENGTH
from benchmarks.child import check_call, check_count, together
from benchmarks.report import table
from benchmarks.rows import LOOPS, ROWS
from benchmarks.runner import serving

DEFAULT = ("plain", "session", "ours")


class Operation(msgspec.Struct, frozen=True):
    """What is counted: so many at a time, each so often, and how many deltas one has."""

    at_a_time: int
    each: int
    deltas: int = 1


OPERATIONS = {
    "call": Operation(64, 10),
    "burst": Operation(1, 4, LENGTH),
    "burst-gathered": Operation(1, 4, LENGTH),
    "paced": Operation(2, 1, LENGTH),
}


class Tracer:
    """Counts the bytecodes that run between `start` and `stop`, and how often a function is entered or resumed."""

    def __init__(self) -> None:
        self.bytecodes: Counter[CodeType] = Counter()
        self.entered: Counter[CodeType] = Counter()

    def start(self) -> None:
        sys._getframe().f_trace_opcodes = True  # Python 3.12 looks for this once, when tracing begins
        sys.settrace(self._enter)

    def stop(self) -> None:
        sys.settrace(None)

    def _enter(self, frame: FrameType, _event: str, _: object) -> Any:
        self.entered[frame.f_code] += 1
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        return self._step

    def _step(self, frame: FrameType, event: str, _: object) -> Any:
        if event == "opcode":
            self.bytecodes[frame.f_code] += 1
        return self._step


async def run(client: Client, name: str, operation: Operation, tracer: Tracer) -> None:
    """Do it all once to warm up, and once more while it is counted."""

    async def work() -> None:
        for _ in range(operation.each):
            if name == "call":
                check_call(await client.call())
            else:
                check_count(await client.stream(), LENGTH)

    await together(operation.at_a_time, work)
    tracer.start()
    try:
        await together(operation.at_a_time, work)
    finally:
        tracer.stop()
    await client.close()


def counted(adapter: str, name: str, loop: str, port: int) -> tuple[Counter[CodeType], Counter[CodeType], int]:
    """Return the bytecodes and the entries of each function, and how many operations these are of."""
    operation, tracer = OPERATIONS[name], Tracer()

    async def main() -> None:
        await run(load(adapter)(f"http://127.0.0.1:{port}/{ROWS[name].path}/{LENGTH}/v1"), name, operation, tracer)

    runner: Any = importlib.import_module(loop)
    runner.run(main())
    return tracer.bytecodes, tracer.entered, operation.at_a_time * operation.each * operation.deltas


def by_function(bytecodes: Counter[CodeType], entered: Counter[CodeType], count: int, most: int) -> str:
    """A table of the functions that have most of them."""
    lines = [
        [f"{code.co_qualname} ({Path(code.co_filename).name}:{code.co_firstlineno})"]
        + [f"{number / count:.2f}" for number in (found, entered[code])]
        for code, found in bytecodes.most_common(most)
    ]
    return table(["function", "bytecodes", "entered or resumed"], lines)


def main() -> None:
    """Parse arguments and count."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bytecodes", description=__doc__.split("\n", 1)[0])
    parser.add_argument("adapters", nargs="*", default=DEFAULT, help=f"default: {' '.join(DEFAULT)}")
    parser.add_argument("--only", choices=OPERATIONS, action="append", help="default: call and burst")
    parser.add_argument("--loop", choices=LOOPS, default="asyncio", help="default: %(default)s")
    parser.add_argument("--functions", type=int, default=0, metavar="N", help="show the N functions that have most")
    options = parser.parse_args()
    for adapter in options.adapters:
        if adapter not in {*ADAPTERS, *STEPS}:
            parser.error(f"there is no adapter {adapter!r}")
    operations = options.only or ["call", "burst"]
    lines: list[list[str]] = []
    details: list[str] = []
    with serving() as server:
        for adapter in options.adapters:
            line = [adapter]
            for name in operations:
                bytecodes, entered, count = counted(adapter, name, options.loop, server.port())
                line.append(f"{bytecodes.total() / count:,.0f}")
                if options.functions:
                    details += [
                        "",
                        f"{adapter}, {name}:",
                        "",
                        by_function(bytecodes, entered, count, options.functions),
                    ]
            lines.append(line)
    print(table([f"bytecodes of one ({options.loop})", *operations], lines))
    print("\n".join(details))


if __name__ == "__main__":
    main()
