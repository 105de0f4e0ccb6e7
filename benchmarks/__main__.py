"""Run the adapters against one server, in turn, and print what ours costs beside plain aiohttp."""

import argparse
import asyncio
import importlib
import json
import os
import resource
import statistics
import subprocess
import sys
from typing import Any

from benchmarks.server import DELTAS

ALLOCATOR = {
    "MALLOC_MMAP_THRESHOLD_": "67108864",
    "MALLOC_TRIM_THRESHOLD_": "268435456",
    "MALLOC_TOP_PAD_": "16777216",
}
# operation: (concurrency, operations of a full run, of a quick run, deltas in one operation)
OPERATIONS = {
    "call": (64, 8000, 200, 1),
    "paced": (100, 200, 20, len(DELTAS)),
    "burst": (1, 200, 10, len(DELTAS)),
}
ADAPTERS = ("ours", "plain")


def cpu() -> float:
    """Return the CPU seconds this process used."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


async def measure(adapter: str, operation: str, port: int, count: int) -> float:
    """Return the microseconds of CPU for one call or one delta."""
    concurrency, _, _, deltas = OPERATIONS[operation]
    client = importlib.import_module(f"benchmarks.{adapter}").Client(f"http://127.0.0.1:{port}/{operation}/v1")

    async def work(rounds: int) -> None:
        for _ in range(rounds):
            if operation == "call":
                assert await client.call() == "Hello! How can I help you today?"
            else:
                assert await client.stream() == len(DELTAS)

    async def run(each: int) -> None:
        async with asyncio.TaskGroup() as group:
            for _ in range(concurrency):
                group.create_task(work(each))

    await run(1)  # connections are opened and caches filled before the clock starts
    each = max(1, count // concurrency)
    began = cpu()
    await run(each)
    used = cpu() - began
    await client.close()
    return used / (each * concurrency * deltas) * 1e6


def child(adapter: str, operation: str, port: int, count: int, loop: str) -> float:
    """Run `measure` in a process of its own."""
    command = [sys.executable, "-m", "benchmarks", "--child", adapter, operation, str(port), str(count), loop]
    done = subprocess.run(command, env=os.environ | ALLOCATOR, check=True, stdout=subprocess.PIPE, text=True)
    return float(json.loads(done.stdout))


def main() -> None:
    """Parse arguments and run."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a smoke run; its figures mean nothing")
    parser.add_argument("--rounds", type=int, default=7, help="rounds of each pair (default: %(default)s)")
    parser.add_argument("--only", choices=OPERATIONS, help="one operation")
    parser.add_argument("--loop", choices=("asyncio", "uvloop"), default="asyncio")
    parser.add_argument("--child", nargs=5, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        adapter, operation, port, count, loop = options.child
        runner: Any = importlib.import_module("uvloop" if loop == "uvloop" else "asyncio")
        print(json.dumps(runner.run(measure(adapter, operation, int(port), int(count)))))
        return
    server = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.server"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert server.stdout is not None
    port = int(server.stdout.readline())
    try:
        print(f"{'':8}{'ours':>10}{'plain':>10}{'ratio':>9}   spread of the ratio")
        for operation in [options.only] if options.only else OPERATIONS:
            count = OPERATIONS[operation][2 if options.quick else 1]
            figures: dict[str, list[float]] = {adapter: [] for adapter in ADAPTERS}
            for _ in range(1 if options.quick else options.rounds):
                for adapter in ADAPTERS:
                    figures[adapter].append(child(adapter, operation, port, count, options.loop))
            ratios = [ours / plain for ours, plain in zip(figures["ours"], figures["plain"], strict=True)]
            medians = [statistics.median(figures[adapter]) for adapter in ADAPTERS]
            print(
                f"{operation:8}{medians[0]:8.2f}µs{medians[1]:8.2f}µs{statistics.median(ratios):8.3f}x"
                f"   {min(ratios):.3f} to {max(ratios):.3f}",
                flush=True,
            )
    finally:
        server.communicate()


if __name__ == "__main__":
    main()
