"""One measurement in a process of its own: `python -m benchmarks.child ADAPTER ROW PORT COUNT LOOP`.

It prints `Figures` as JSON, on its last line. COUNT is the number of operations that are measured; PORT is one of those
that `python -m benchmarks.server` prints. All texts of some streams are compared before the clock starts; the text of
every call and the number of deltas of every stream while it runs.
"""

import argparse
import asyncio
import importlib
import statistics
import sys
import time
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec
from msgspec.structs import replace

from benchmarks import answers, machine
from benchmarks.adapters import ADAPTERS, Client, MissingLibraryError, load
from benchmarks.control import ask
from benchmarks.figures import Figures
from benchmarks.rows import ROWS

READERS = 16  # streams at a time whose texts are compared
WARM = 10  # operations before memory is looked at
STEP = 100  # operations started at a time while memory is looked at


class WrongAnswerError(Exception):
    """A client handed out something other than what the server sent. Its figures are worth nothing."""


class Load(msgspec.Struct, frozen=True, kw_only=True):
    """What a child is to do."""

    concurrency: int
    count: int
    length: int
    merged: int
    port: int

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


def check_count(deltas: int, load: Load) -> None:
    """Compare the number of deltas of a stream."""
    if deltas != load.length - load.merged:
        raise WrongAnswerError(f"a stream of {load.length} deltas brought {deltas}")


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


async def calls(client: Client, load: Load) -> tuple[Figures, int]:
    """Measure calls on warm connections."""
    await warm(client, load.concurrency)
    figures, asked = await cold_calls(client, load)
    return figures, load.concurrency + asked


async def cold_calls(client: Client, load: Load) -> tuple[Figures, int]:
    """Measure calls, and how long each takes."""
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


async def streams(client: Client, load: Load) -> tuple[Figures, int]:
    """Compare the texts of some streams and time their first deltas, then measure streams."""
    firsts: list[float] = []
    readers = min(READERS, load.concurrency)

    async def read() -> None:
        texts: list[str] = []
        began = time.perf_counter()
        async for text in client.texts():
            if not texts:
                firsts.append(time.perf_counter() - began)
            texts.append(text)
        check_texts(texts, load.length)

    async def work() -> None:
        for _ in range(load.each):
            check_count(await client.stream(), load)

    await warm(client, load.concurrency)
    await together(readers, read)
    clock = Clock(load.port)
    await together(load.concurrency, work)
    read_by_all = load.concurrency * load.each
    used = clock.stop(read_by_all * load.length)
    return replace(used, first=statistics.median(firsts) * 1e3), load.concurrency + readers + read_by_all


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


async def memory(load: Load, work: Callable[[], Awaitable[None]], ready: Callable[[], int]) -> tuple[Figures, int]:
    """Measure what one more operation takes that waits for the server."""
    await hold(WARM, load.port, work, ready)  # whatever happens once, at the end of the first one too
    before = await hold(WARM, load.port, work, ready)
    after = await hold(load.concurrency, load.port, work, ready)
    # That many were there before.
    return Figures(memory=(after - before) / (load.concurrency - WARM) / 1024), WARM * 2 + load.concurrency


async def waiting_calls(client: Client, load: Load) -> tuple[Figures, int]:
    """Measure the memory of calls that wait for their answer."""

    async def work() -> None:
        check_call(await client.call())

    return await memory(load, work, lambda: ask(load.port).held)


async def open_streams(client: Client, load: Load) -> tuple[Figures, int]:
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

    return await memory(load, work, lambda: reading)


WORKS = {
    "calls": calls,
    "cold calls": cold_calls,
    "streams": streams,
    "open": open_streams,
    "waiting": waiting_calls,
}


async def measure(adapter: str, row: str, load_: Load) -> Figures:
    """Do what a row asks for, through an adapter."""
    url = f"http://127.0.0.1:{load_.port}/{{}}/{load_.length}/v1"
    make = load(adapter)
    first = make(url.format("call"))  # whatever happens once in a process is not measured
    check_call(await first.call())
    await first.close()
    before = ask(load_.port)
    client = make(url.format(ROWS[row].path))
    figures, asked = await WORKS[ROWS[row].work](client, load_)
    after = ask(load_.port)
    await client.close()
    return replace(
        figures,
        peak=machine.peak() / 1024 / 1024,
        connections=after.connections - before.connections,
        repeated=after.requests - before.requests - asked,
    )


def main() -> None:
    """Parse arguments and measure."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.child", description=__doc__)
    parser.add_argument("adapter", choices=ADAPTERS)
    parser.add_argument("row", choices=[row.name for row in ROWS.values() if row.work in WORKS])
    parser.add_argument("port", type=int)
    parser.add_argument("count", type=int)
    parser.add_argument("loop", choices=("asyncio", "uvloop"))
    parser.add_argument("--concurrency", type=int, help="operations at once (default: as the row)")
    parser.add_argument("--length", type=int, help="deltas of a stream (default: as the row)")
    parser.add_argument("--core", type=int, help="the core to run on (default: any)")
    options = parser.parse_args()
    machine.pin(options.core)
    machine.allow_files()
    point = ROWS[options.row].points[0]
    wanted = Load(
        concurrency=options.concurrency or point.concurrency,
        count=options.count,
        length=options.length or point.length,
        merged=ADAPTERS[options.adapter].merged,
        port=options.port,
    )
    try:
        runner: Any = importlib.import_module(options.loop)
        figures = runner.run(measure(options.adapter, options.row, wanted))
    except MissingLibraryError as problem:
        sys.exit(str(problem))
    print(msgspec.json.encode(figures).decode())


if __name__ == "__main__":
    main()
