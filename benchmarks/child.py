"""One library in a process of its own: `python -m benchmarks.child ADAPTER ROW PORT COUNT LOOP`.

It warms up, measures COUNT operations, prints `Figures` as JSON, and ends. With `--turns` it says "ready" when it is
warm, measures COUNT operations for each line of its standard input, prints a line of figures for each, and ends when
the input does: this is how the runner has two libraries take turns. Nothing else is printed there; what libraries print
goes to standard error.

PORT is one of those that `python -m benchmarks.server` prints. All texts of some streams are compared before the first
turn; the text of every call and the number of deltas of every stream while the clock runs.
"""

import argparse
import asyncio
import gc
import importlib
import os
import statistics
import sys
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Iterator
from typing import Any

import msgspec
from msgspec.structs import replace

from benchmarks import answers, machine
from benchmarks.adapters import ADAPTERS, STEPS, Client, MissingLibraryError, load
from benchmarks.control import ask
from benchmarks.figures import Figures
from benchmarks.rows import ROWS

READERS = 16  # streams at a time whose texts are compared
WARM = 10  # operations before memory is looked at
STEP = 100  # operations started at a time while memory is looked at
READY = "ready"

# What a work hands out: figures, and how many requests it made for them. The first step warms up, and each further one
# is a turn.
Steps = AsyncGenerator[tuple[Figures, int]]


class WrongAnswerError(Exception):
    """A client handed out something other than what the server sent. Its figures are worth nothing."""


class Load(msgspec.Struct, frozen=True, kw_only=True):
    """What a child is to do in each turn."""

    concurrency: int
    count: int
    length: int
    port: int
    heap: float = 0.0

    @property
    def each(self) -> int:
        """Operations of each worker."""
        return max(1, self.count // self.concurrency)


class Clock:
    """What is used from its making until `stop`: by this process, by the clock on the wall, by the server."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._server = ask(port).cpu
        self._cpu, self._wall = machine.cpu(), time.perf_counter()

    def stop(self, operations: int) -> Figures:
        cpu, wall = machine.cpu() - self._cpu, time.perf_counter() - self._wall
        server = ask(self._port).cpu - self._server
        return Figures(cpu=cpu / operations * 1e6, wall=wall, server=server / wall)


def check_call(text: str | None) -> None:
    """Compare the text of a call."""
    if text != answers.ANSWER:
        raise WrongAnswerError(f"a call brought {text!r}")


def check_count(deltas: int, length: int) -> None:
    """Compare the number of deltas of a stream."""
    if deltas != length:
        raise WrongAnswerError(f"a stream of {length} deltas brought {deltas}")


def check_texts(texts: list[str], length: int) -> None:
    """Compare the texts of a stream and their order. The empty ones, at both ends, are left out by some libraries."""
    found = [text for text in texts if text]
    if found != answers.texts(length):
        raise WrongAnswerError(f"a stream of {length} deltas brought {len(found)} texts, or not in their order")


async def together(concurrency: int, work: Callable[[], Awaitable[None]]) -> None:
    """Run so many workers at once, and stop all when one fails."""

    async def run() -> None:
        await work()

    async with asyncio.TaskGroup() as group:
        for _ in range(concurrency):
            group.create_task(run())


async def warm(client: Client, concurrency: int) -> None:
    """Open connections and fill caches."""

    async def work() -> None:
        check_call(await client.call())

    await together(concurrency, work)


async def calls(client: Client, load: Load) -> Steps:
    """Measure calls on warm connections."""
    await warm(client, load.concurrency)
    yield Figures(), load.concurrency
    while True:
        yield await timed(client, load)


def grown(share: float) -> list[object]:
    """Let the heap grow by a part of the way from one full collection of garbage to the next, and return what it takes.

    A full collection comes when a quarter more objects are there than at the last, and takes a third of a second when
    ten thousand calls are under way. Whether one more of them falls into a turn, a few objects decide, and each process
    of a library does the same; so each round starts from another place, and the rounds together have all of them.
    """
    gc.collect()
    held: list[object] = [[] for _ in range(round(len(gc.get_objects()) * (1.25**share - 1)))]
    gc.collect()
    return held


async def cold_calls(client: Client, load: Load) -> Steps:
    """Measure calls of a client that has no connection yet; it is cold once."""
    held = grown(load.heap)
    yield Figures(), 0
    yield await timed(client, load)
    held.clear()


async def timed(client: Client, load: Load) -> tuple[Figures, int]:
    """Make calls, and see how long each takes."""
    seconds: list[float] = []

    async def work() -> None:
        for _ in range(load.each):
            began = time.perf_counter()
            text = await client.call()
            seconds.append(time.perf_counter() - began)
            check_call(text)

    clock = Clock(load.port)
    await together(load.concurrency, work)
    used = clock.stop(load.each * load.concurrency)
    parts = statistics.quantiles(seconds, n=100, method="inclusive")
    return replace(used, p50=parts[49] * 1e3, p99=parts[98] * 1e3), len(seconds)


async def streams(client: Client, load: Load) -> Steps:
    """Compare the texts of some streams and time how long the first takes to come, then measure streams.

    They are the first streams of the process. A delta without a text is none here: some libraries hand out the role
    alone as soon as it comes, and ours when there is something to read.
    """
    firsts: list[float] = []
    readers = min(READERS, load.concurrency)

    async def read() -> None:
        texts: list[str] = []
        began = time.perf_counter()
        async for text in client.texts():
            if text and not any(texts):
                firsts.append(time.perf_counter() - began)
            texts.append(text)
        check_texts(texts, load.length)

    async def work() -> None:
        for _ in range(load.each):
            check_count(await client.stream(), load.length)

    await warm(client, load.concurrency)
    await together(readers, read)
    yield Figures(first=statistics.median(firsts) * 1e3), load.concurrency + readers
    while True:
        clock = Clock(load.port)
        await together(load.concurrency, work)
        read_by_all = load.concurrency * load.each
        yield clock.stop(read_by_all * load.length), read_by_all


async def hold(number: int, port: int, work: Callable[[], Awaitable[None]], ready: Callable[[], int]) -> int:
    """Start operations until so many are ready, and return the bytes of memory this process then has."""

    async def run() -> None:
        await work()

    async with asyncio.TaskGroup() as group:
        for started in range(0, number, STEP):
            until = min(started + STEP, number)
            for _ in range(started, until):
                group.create_task(run())
            while ready() < until:  # noqa: ASYNC110 - what the server holds, it is asked for
                await asyncio.sleep(0.002)
        resident = machine.resident()
        ask(port, "release")
    return resident


async def memory(load: Load, work: Callable[[], Awaitable[None]], ready: Callable[[], int]) -> Steps:
    """Measure what one more operation takes that waits for the server; the memory of this process grows once."""
    await hold(WARM, load.port, work, ready)  # whatever happens once, at the end of the first one too
    before = await hold(WARM, load.port, work, ready)
    yield Figures(), WARM * 2
    after = await hold(load.concurrency, load.port, work, ready)
    # That many were there before.
    yield Figures(memory=(after - before) / (load.concurrency - WARM) / 1024), load.concurrency


def waiting_calls(client: Client, load: Load) -> Steps:
    """Measure the memory of calls that wait for their answer."""

    async def work() -> None:
        check_call(await client.call())

    return memory(load, work, lambda: ask(load.port).held)


def open_streams(client: Client, load: Load) -> Steps:
    """Measure the memory of streams that had a delta and wait for the next."""
    reading = 0

    async def work() -> None:
        nonlocal reading
        texts: list[str] = []
        async for text in client.texts():
            reading += bool(text) and not any(texts)
            texts.append(text)
        check_texts(texts, load.length)
        reading -= 1

    return memory(load, work, lambda: reading)


WORKS = {
    "calls": calls,
    "cold calls": cold_calls,
    "streams": streams,
    "open": open_streams,
    "waiting": waiting_calls,
}


class Seen:
    """What the server saw of this process so far.

    Its counters are of all processes. Since others take their turns between those of this one, only what happens
    between `start` and `stop` is counted.
    """

    def __init__(self, port: int) -> None:
        self._port = port
        self.connections = 0
        self.requests = 0

    def start(self) -> None:
        self._before = ask(self._port)

    def stop(self) -> None:
        after = ask(self._port)
        self.connections += after.connections - self._before.connections
        self.requests += after.requests - self._before.requests


async def measure(adapter: str, row: str, load_: Load, turns: Iterable[object]) -> AsyncGenerator[Figures]:
    """Do what a row asks for, through an adapter, once for each of `turns`, and hand out the figures of each."""
    url = f"http://127.0.0.1:{load_.port}/{{}}/{load_.length}/v1"
    make = load(adapter)
    first = make(url.format("call"))  # whatever happens once in a process is not measured
    check_call(await first.call())
    await first.close()
    seen = Seen(load_.port)
    client = make(url.format(ROWS[row].path))
    steps = WORKS[ROWS[row].work](client, load_)
    seen.start()
    prepared, asked = await anext(steps)
    seen.stop()
    for _ in turns:
        seen.start()
        figures, more = await anext(steps)
        seen.stop()
        asked += more
        yield replace(
            figures,
            first=prepared.first,
            peak=machine.peak() / 1024 / 1024,
            connections=seen.connections,
            repeated=seen.requests - asked,
        )
    await steps.aclose()
    await client.close()


def asked_for(lines: Iterable[str], say: Callable[[str], None]) -> Iterator[str]:
    """Say that all is ready, and hand out a turn for each line that comes."""
    say(READY)
    # Waiting for a line blocks the event loop, and is meant to: nothing is under way between two turns, and a process
    # that sleeps in a read takes nothing from the one whose turn it is, as its timers would, or a thread that reads.
    yield from lines


def own_output() -> Callable[[str], None]:
    """Return what writes a line to standard output, and lead all else that would be written there to standard error."""
    output = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    return lambda line: print(line, file=output, flush=True)


async def tell(adapter: str, row: str, load_: Load, turns: Iterable[object], say: Callable[[str], None]) -> None:
    """Measure, and say the figures of each turn when it is over."""
    async for figures in measure(adapter, row, load_, turns):
        say(msgspec.json.encode(figures).decode())


def main() -> None:
    """Parse arguments and measure."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.child", description=__doc__)
    parser.add_argument("adapter", choices=[*ADAPTERS, *STEPS])
    parser.add_argument("row", choices=[row.name for row in ROWS.values() if row.work in WORKS])
    parser.add_argument("port", type=int)
    parser.add_argument("count", type=int, help="operations of a turn")
    parser.add_argument("loop", choices=("asyncio", "uvloop"))
    parser.add_argument("--concurrency", type=int, help="operations at once (default: as the row)")
    parser.add_argument("--length", type=int, help="deltas of a stream (default: as the row)")
    parser.add_argument("--heap", type=float, default=0.0, help="growth of the heap before the clock starts, 0 to 1")
    parser.add_argument("--core", type=int, help="the core to run on (default: any)")
    parser.add_argument("--turns", action="store_true", help="a turn for each line of standard input (default: one)")
    options = parser.parse_args()
    say = own_output()
    machine.pin(options.core)
    machine.allow_files()
    point = ROWS[options.row].points[0]
    wanted = Load(
        concurrency=options.concurrency or point.concurrency,
        count=options.count,
        length=options.length or point.length,
        port=options.port,
        heap=options.heap,
    )
    turns = asked_for(iter(sys.stdin.readline, ""), say) if options.turns else [""]
    try:
        runner: Any = importlib.import_module(options.loop)
        runner.run(tell(options.adapter, options.row, wanted, turns, say))
    except MissingLibraryError as problem:
        sys.exit(str(problem))


if __name__ == "__main__":
    main()
