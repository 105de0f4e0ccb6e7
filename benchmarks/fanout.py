"""What `map` costs beside a loop written by hand over the same client, and whether its memory stays flat.

`python -m benchmarks.fanout` compares CPU time; `--million` asks a million times and prints the memory on the way.
"""

import argparse
import asyncio
import gc
import importlib
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks import machine
from benchmarks.answers import ANSWER
from benchmarks.options import positive
from benchmarks.runner import ROOT, Server, serving
from chatkore_async import AsyncChatKore, Limits

CONCURRENCY = 64


def requests(count: int) -> Iterator[dict[str, Any]]:
    """Requests, each made when it is read."""
    for number in range(count):
        yield {"model": "gpt-4o-mini", "messages": [{"role": "user", "content": f"Hello {number}!"}]}


async def mapped(client: AsyncChatKore, count: int) -> int:
    """By `map`."""
    answered = 0
    async with client.chat.completions.map(requests(count), concurrency=CONCURRENCY) as results:
        async for result in results:
            assert result.completion is not None
            assert result.completion.text == ANSWER
            answered += 1
    return answered


async def tasks(client: AsyncChatKore, count: int) -> int:
    """By a task for each request at once, and a semaphore in each: short, and as large as the input."""
    semaphore = asyncio.Semaphore(CONCURRENCY)
    answered = 0

    async def one(request: dict[str, Any]) -> None:
        nonlocal answered
        async with semaphore:
            completion = await client.chat.completions.create(**request)
        assert completion.text == ANSWER
        answered += 1

    async with asyncio.TaskGroup() as group:
        for request in requests(count):
            group.create_task(one(request))
    return answered


async def bounded(client: AsyncChatKore, count: int) -> int:
    """By a task for each request, begun when a semaphore lets it: the least that keeps memory in bounds."""
    semaphore = asyncio.Semaphore(CONCURRENCY)
    answered = 0

    async def one(request: dict[str, Any]) -> None:
        nonlocal answered
        try:
            completion = await client.chat.completions.create(**request)
        finally:
            semaphore.release()
        assert completion.text == ANSWER
        answered += 1

    async with asyncio.TaskGroup() as group:
        for request in requests(count):
            await semaphore.acquire()
            group.create_task(one(request))
    return answered


WAYS: dict[str, Callable[[AsyncChatKore, int], Awaitable[int]]] = {
    "map": mapped,
    "bounded": bounded,
    "tasks": tasks,
}


def make_client(port: int) -> AsyncChatKore:
    """A client of the server, which answers under `/call`."""
    return AsyncChatKore(
        api_key="key", base_url=f"http://127.0.0.1:{port}/call/v1", limits=Limits(max_connections=None)
    )


async def measure(way: str, port: int, count: int) -> float:
    """Return the microseconds of CPU for one request."""
    async with make_client(port) as client:
        await WAYS[way](client, 4 * CONCURRENCY)  # connections are opened and caches filled before the clock starts
        gc.collect()
        began = machine.cpu()
        assert await WAYS[way](client, count) == count
        return (machine.cpu() - began) / count * 1e6


def child(way: str, server: Server, count: int, loop: str) -> float:
    """Run `measure` in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.fanout", "--child", way, str(server.port()), str(count), loop]
    done = subprocess.run(command, cwd=ROOT, env=machine.environment(), check=True, stdout=subprocess.PIPE, text=True)
    return float(json.loads(done.stdout))


def compare(server: Server, rounds: int, count: int, loop: str) -> None:
    """Print the medians of interleaved rounds, and the ratios of `map` to the others."""
    figures: dict[str, list[float]] = {way: [] for way in WAYS}
    for _ in range(rounds):
        for way in WAYS:
            figures[way].append(child(way, server, count, loop))
    print(f"{count} requests, {CONCURRENCY} at a time, {rounds} rounds; microseconds of CPU for each")
    print(f"{'map':8}{statistics.median(figures['map']):8.2f}µs")
    for way in list(WAYS)[1:]:
        ratios = [ours / other for ours, other in zip(figures["map"], figures[way], strict=True)]
        print(
            f"{way:8}{statistics.median(figures[way]):8.2f}µs   map takes {statistics.median(ratios):.3f} times that,"
            f" {min(ratios):.3f} to {max(ratios):.3f}"
        )


def resident() -> float:
    """Return the memory this process holds, in MiB."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGESIZE") / 2**20


async def curve(port: int, count: int, seconds: float) -> bool:
    """Ask `count` times by `map` and print the memory at each twentieth; return whether all were asked in time."""
    began = time.monotonic()
    peak = 0.0
    print(f"{'requests':>10}{'seconds':>9}{'RSS':>11}{'objects':>10}")
    done = 0
    try:
        async with (
            asyncio.timeout(seconds),
            make_client(port) as client,
            client.chat.completions.map(requests(count), concurrency=CONCURRENCY) as results,
        ):
            async for result in results:
                assert result.completion is not None
                assert result.completion.text == ANSWER
                done += 1
                if done % max(1, count // 20) == 0 or done == min(1000, count):
                    peak = max(peak, resident())
                    elapsed = time.monotonic() - began
                    print(f"{done:10}{elapsed:9.1f}{resident():8.1f} MiB{len(gc.get_objects()):10}", flush=True)
    except TimeoutError:
        print(f"stopped after {seconds:g} s")
    print(f"{done} of {count} requests answered, at most {peak:.1f} MiB")
    return done == count


def main() -> None:
    """Parse arguments and run."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.fanout", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a smoke run; its figures mean nothing")
    parser.add_argument("--rounds", type=positive, default=7, help="rounds of the comparison (default: %(default)s)")
    parser.add_argument("--loop", choices=("asyncio", "uvloop"), default="asyncio")
    parser.add_argument("--million", action="store_true", help="the memory of a million requests instead")
    parser.add_argument("--requests", type=positive, help="that many instead of a million, or of 10,000 in each round")
    parser.add_argument("--seconds", type=float, default=1800, help="when to stop the million (default: %(default)s)")
    parser.add_argument("--child", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    runner: Any = importlib.import_module(options.loop)
    if options.child:
        way, port, count, loop = options.child
        print(json.dumps(importlib.import_module(loop).run(measure(way, int(port), int(count)))))
        return
    whole = True
    with serving() as server:
        if options.million:
            whole = runner.run(curve(server.port(), options.requests or 1_000_000, options.seconds))
        elif options.quick:
            compare(server, 1, 200, options.loop)
        else:
            compare(server, options.rounds, options.requests or 10_000, options.loop)
    sys.exit(0 if whole else 1)


if __name__ == "__main__":
    main()
