"""Count the instructions of one operation, exactly: `python -m benchmarks.instructions [ADAPTER ...]`.

CPU time on a shared machine moves by a tenth from run to run, and most changes are smaller. Here the client runs under
valgrind, against a transport that answers within the process, so that the kernel and other programs have no part in it:
two runs give the same figure within a thousandth. What the kernel does for a request is left out, so the ratios are
larger than those of `python -m benchmarks`; use it to compare a change with what was before it.

It needs `valgrind` on the path (Debian: `apt-get install valgrind`).
"""

import argparse
import asyncio
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import aiohttp
from aiohttp.client_proto import ResponseHandler

from benchmarks import answers
from benchmarks.adapters import load

# operation: (at a time, by each in the short run, in the long run, deltas in one). The difference leaves out what is
# done once. Calls are made as many at a time as in the table: the cost of a timer of the event loop depends on it.
OPERATIONS = {"call": (64, 2, 6, 1), "paced": (1, 2, 6, answers.LENGTH), "burst": (1, 4, 12, answers.LENGTH)}
SEGMENT = 64 * 1024


class Answering(asyncio.Transport):
    """A transport whose peer answers at once, from the same event loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop, protocol: asyncio.Protocol, operation: str) -> None:
        super().__init__()
        self._loop = loop
        self._protocol = protocol
        self._operation = operation
        self._closing = False

    def is_closing(self) -> bool:
        return self._closing

    def close(self) -> None:
        if not self._closing:
            self._closing = True
            self._loop.call_soon(self._protocol.connection_lost, None)

    abort = close

    def pause_reading(self) -> None: ...

    def resume_reading(self) -> None: ...

    def write(self, data: Any) -> None:
        """Take a request, whole as aiohttp writes it, and answer."""
        assert data.endswith(b"}")
        if self._operation == "paced":
            self._step(iter([answers.STREAM_HEAD, *answers.segments(answers.LENGTH)]))
            return
        answer = answers.CALL if self._operation == "call" else answers.burst(answers.LENGTH)
        for start in range(0, len(answer), SEGMENT):
            self._loop.call_soon(self._protocol.data_received, answer[start : start + SEGMENT])

    def writelines(self, list_of_data: Any) -> None:
        self.write(b"".join(list_of_data))

    def _step(self, segments: Iterator[bytes]) -> None:
        segment = next(segments, None)
        if segment is not None and not self._closing:
            self._protocol.data_received(segment)
            self._loop.call_soon(self._step, segments)


async def run(adapter: str, operation: str, count: int) -> None:
    """Do what is to be counted, in the process that valgrind looks at."""

    async def connect(connector: Any, *_: object) -> ResponseHandler:
        loop = asyncio.get_running_loop()
        protocol: ResponseHandler = connector._factory()
        protocol.connection_made(Answering(loop, protocol, operation))
        return protocol

    aiohttp.TCPConnector._create_connection = connect  # type: ignore[assignment]
    client = load(adapter)("http://127.0.0.1:1/v1")

    async def work() -> None:
        for _ in range(2 + count):
            if operation == "call":
                assert await client.call() == answers.ANSWER
            else:
                assert await client.stream() == answers.LENGTH

    await asyncio.gather(*(work() for _ in range(OPERATIONS[operation][0])))
    await client.close()


def counted(adapter: str, operation: str, count: int) -> "subprocess.Popen[str]":
    """Start a run under valgrind."""
    return subprocess.Popen(
        [
            *("valgrind", "--tool=callgrind", f"--callgrind-out-file={os.devnull}"),
            *(sys.executable, "-m", "benchmarks.instructions", "--child", adapter, operation, str(count)),
        ],
        env=os.environ | {"PYTHONHASHSEED": "0"},
        stderr=subprocess.PIPE,
        text=True,
    )


def instructions(adapter: str, operation: str) -> float:
    """Return how many instructions a call takes, or a delta."""
    at_a_time, short, long, deltas = OPERATIONS[operation]
    totals: list[int] = []
    for child in [counted(adapter, operation, count) for count in (short, long)]:
        _, said = child.communicate()
        found = re.search(r"Collected : (\d+)", said)
        if child.returncode or found is None:
            sys.exit(said)
        totals.append(int(found[1]))
    return (totals[1] - totals[0]) / (long - short) / at_a_time / deltas


def main() -> None:
    """Parse arguments and run."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.instructions", description=__doc__.split("\n", 1)[0])
    parser.add_argument("adapters", nargs="*", default=["ours", "plain"], help="default: ours plain")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        adapter, operation, count = options.child
        asyncio.run(run(adapter, operation, int(count)))
        return
    if shutil.which("valgrind") is None:
        sys.exit("valgrind is missing: apt-get install valgrind")
    print(f"{'instructions':14}" + "".join(f"{operation:>10}" for operation in OPERATIONS))
    for adapter in options.adapters:
        print(f"{adapter:14}", end="", flush=True)
        for operation in OPERATIONS:
            print(f"{instructions(adapter, operation):10,.0f}", end="", flush=True)
        print()


if __name__ == "__main__":
    main()
