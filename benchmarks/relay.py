"""What relaying streams costs a service: CPU of a delta, and memory of a stream, beside the same service by hand.

`python -m benchmarks.relay` runs each application of `relays/` in a process of its own. Those of a framework run at the
same time, on one core, so that whatever else the machine does meanwhile happens to all of them; the figures are of each
process alone. The model's servers (one for each) and the readers share the other core.
"""

import argparse
import asyncio
import importlib
import importlib.util
import os
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import ExitStack, asynccontextmanager, contextmanager
from typing import Any, cast

import msgspec

from benchmarks import machine
from benchmarks.arithmetic import Spread, spread
from benchmarks.child import WrongAnswerError, check_texts
from benchmarks.control import ask
from benchmarks.options import positive
from benchmarks.relays import RELAYS
from benchmarks.relays.serve import Look
from benchmarks.runner import ROOT, SPARE_FILES, Server, serving
from benchmarks.server import HELD_AFTER

AT_MOST = 1.15  # ours over by hand, of both figures
NEEDS = {"fastapi": ("fastapi", "uvicorn"), "aiohttp": ()}
BUSY = 0.85  # of the core: beyond it segments queue up, and a delta is not the same work any more
TIMEOUT = 300  # seconds until a run is given up
GRACE = 30  # seconds in which a service ends, or is killed
WARM = 20  # streams before memory is looked at, and those that are there when it is
STEP = 50  # streams opened at a time while memory is looked at
SLOW_DELTAS = 200_000  # 50 MB, of which a slow reader takes 1 KB a second
SLOW_SECONDS = 30
REQUEST = b"POST /chat HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%s"
BODY = b'{"messages":[{"role":"user","content":"Hello!"}]}'


class Load(msgspec.Struct, frozen=True, kw_only=True):
    """What the applications are given to do.

    Attributes:
        streams: at once.
        interval: milliseconds between the deltas of one.
        window: seconds for which CPU is measured.
    """

    streams: int = 500
    interval: int = 500
    window: float = 8.0

    @property
    def length(self) -> int:
        """Deltas of a stream, so that it lasts until the window ends."""
        return int(self.window * 1000 / self.interval) + 12


QUICK = Load(streams=20, interval=20, window=0.3)


class Measured(msgspec.Struct, frozen=True, kw_only=True):
    """One application in one round.

    Attributes:
        delta: microseconds of CPU.
        memory: KiB of a stream that had a delta and waits for the next.
        opening: milliseconds of CPU for a stream, up to its first delta.
        busy: the share of the core that it used while deltas came.
    """

    delta: float
    memory: float
    opening: float
    busy: float


class Reader(asyncio.Protocol):
    """A browser, as it were: asks, counts what comes, and keeps it to be checked when no clock runs."""

    def __init__(self) -> None:
        self.ended = asyncio.get_running_loop().create_future()
        self.deltas = 0
        self._received: list[bytes] = []

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)  # uvloop's is no subclass
        self._transport.write(REQUEST % (len(BODY), BODY))

    def data_received(self, data: bytes) -> None:
        self._received.append(data)
        self.deltas += data.count(b'"choices":')
        if data.endswith(b"0\r\n\r\n") and not self.ended.done():
            self._transport.close()
            self.ended.set_result(None)

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.ended.done():
            self.ended.set_exception(WrongAnswerError(f"a stream broke off: {exc}"))

    def check(self, length: int) -> None:
        """Compare every text of the stream, and how it ended."""
        head, _, body = b"".join(self._received).partition(b"\r\n\r\n")
        if not head.startswith(b"HTTP/1.1 200 "):
            raise WrongAnswerError(head.decode())
        *events, done, rest = _joined(body).split(b"\n\n")
        if (done, rest) != (b"data: [DONE]", b""):
            raise WrongAnswerError(f"a stream of {length} deltas ended with {done!r}, {rest!r}")
        # On a machine that has no time for us, a comment may have come.
        data = [event.removeprefix(b"data: ") for event in events if not event.startswith(b":")]
        chunks = [msgspec.json.decode(each) for each in data]
        if len(chunks) != length or chunks[-1]["choices"][0]["finish_reason"] != "stop":
            raise WrongAnswerError(f"a stream of {length} deltas brought {len(chunks)}")
        check_texts([chunk["choices"][0]["delta"].get("content", "") for chunk in chunks], length)


def _joined(body: bytes) -> bytes:
    """Return a body out of its HTTP chunks."""
    parts: list[bytes] = []
    while body:
        size, _, body = body.partition(b"\r\n")
        parts.append(body[: int(size, 16)])
        body = body[int(size, 16) + 2 :]
    return b"".join(parts)


class Application:
    """A running application."""

    def __init__(self, process: asyncio.subprocess.Process | None, port: int) -> None:
        self._process = process
        self._port = port

    async def look(self, *, collected: bool = False) -> Look:
        """Return what it has used so far; with `collected`, after its collector has run."""
        assert self._process is not None
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(b"collected\n" if collected else b"look\n")
        return msgspec.json.decode(await self._process.stdout.readline(), type=Look)

    async def connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """Open a connection that takes in next to nothing by itself."""
        own = socket.socket()
        own.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        own.setblocking(False)
        await asyncio.get_running_loop().sock_connect(own, ("127.0.0.1", self._port))
        return await asyncio.open_connection(sock=own, limit=1024)

    async def read(self) -> Reader:
        """Open a stream."""
        _, reader = await asyncio.get_running_loop().create_connection(Reader, "127.0.0.1", self._port)
        return reader


@asynccontextmanager
async def running(name: str, base_url: str, loop: str, core: int | None) -> AsyncIterator[Application]:
    """Run an application whose model answers under this URL."""
    command = [sys.executable, "-m", "benchmarks.relays.serve", name, base_url, loop]
    if core is not None:
        command += ["--core", str(core)]
    process = await asyncio.create_subprocess_exec(
        *command, cwd=ROOT, env=machine.environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        yield Application(process, int(await process.stdout.readline()))
    finally:
        process.stdin.close()
        try:
            await asyncio.wait_for(process.wait(), GRACE)
        except TimeoutError:
            process.kill()
            await process.wait()
            raise


async def until(reached: Callable[[], bool]) -> None:
    """Wait for what readers got. They share a loop with this."""
    while not reached():  # noqa: ASYNC110 - they would have to set an event for each of many questions
        await asyncio.sleep(0.005)


async def held(application: Application, number: int) -> list[Reader]:
    """Open streams, each of which gets its first deltas and no more."""
    readers: list[Reader] = []
    while len(readers) < number:
        readers += [await application.read() for _ in range(min(STEP, number - len(readers)))]
        await until(lambda so_far=readers: all(reader.deltas == HELD_AFTER for reader in so_far))
    return readers


async def whole(readers: list[Reader], length: int) -> None:
    """Wait for the end of all streams, and check each."""
    for reader in readers:
        await reader.ended
    for reader in readers:
        reader.check(length)


async def measure(name: str, server: Server, loop: str, load: Load, together: asyncio.Barrier) -> Measured:
    """Measure one application: first what streams take that stand still, and then what their deltas take."""
    port = server.port()
    base_url = f"http://127.0.0.1:{port}/held/{load.length}/v1"
    async with running(name, base_url, loop, server.client_core) as application:
        before = None
        for _ in range(2):  # whatever happens once, at the end of the first ones too
            readers = await held(application, WARM)
            before = await application.look(collected=True)
            await asyncio.to_thread(ask, port, "release")
            await whole(readers, load.length)
        assert before is not None

        begun = await application.look()
        readers = await held(application, WARM + load.streams)
        opened = await application.look()
        after = await application.look(collected=True)

        await together.wait()
        await asyncio.to_thread(ask, port, f"pace-{load.interval}")
        await until(lambda: all(reader.deltas > HELD_AFTER for reader in readers))
        first, at, deltas = await application.look(), time.perf_counter(), sum(reader.deltas for reader in readers)
        # As long as all of them run, should the machine have had no time for us.
        await until(lambda: time.perf_counter() > at + load.window or any(reader.ended.done() for reader in readers))
        last, wall = await application.look(), time.perf_counter() - at
        deltas = sum(reader.deltas for reader in readers) - deltas
        await whole(readers, load.length)
    return Measured(
        delta=(last.cpu - first.cpu) / deltas * 1e6,
        memory=(after.resident - before.resident) / load.streams / 1024,
        opening=(opened.cpu - begun.cpu) / len(readers) * 1e3,
        busy=(last.cpu - first.cpu) / wall,
    )


async def slow(name: str, server: Server, loop: str) -> None:
    """Print the memory of an application that relays 50 MB to a reader of 1 KB/s."""
    base_url = f"http://127.0.0.1:{server.port()}/long/{SLOW_DELTAS}/v1"
    async with running(name, base_url, loop, server.client_core) as application:
        reader, writer = await application.connect()
        writer.write(REQUEST % (len(BODY), BODY))
        sizes: list[float] = []
        for _ in range(SLOW_SECONDS):
            assert len(await reader.readexactly(1024)) == 1024
            await asyncio.sleep(1)
            sizes.append((await application.look()).resident / 2**20)
        writer.transport.abort()
    marks = ", ".join(f"{sizes[second]:.1f}" for second in (0, 4, 9, 19, SLOW_SECONDS - 1))
    print(f"{name}: {marks} MiB after 1, 5, 10, 20 and {SLOW_SECONDS} s of 1 KB/s", flush=True)


@contextmanager
def pinned(core: int | None) -> Iterator[None]:
    """Run the readers on the server's core."""
    if core is None:
        yield
        return
    before = os.sched_getaffinity(0)
    machine.pin(core)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


async def at_once(names: Sequence[str], loop: str, load: Load, servers: Sequence[Server]) -> list[Measured]:
    """Measure applications at the same time."""
    async with asyncio.timeout(TIMEOUT):
        together = asyncio.Barrier(len(names))
        async with asyncio.TaskGroup() as group:  # one that fails would leave the others at the barrier
            tasks = [
                group.create_task(measure(name, server, loop, load, together))
                for name, server in zip(names, servers, strict=True)
            ]
    return [task.result() for task in tasks]


def rounds(framework: str, loop: str, load: Load, number: int, servers: Sequence[Server]) -> dict[str, list[Measured]]:
    """Measure a framework's applications, each second round begun the other way around."""
    # The readers are on uvloop where it is installed, since they are not what is measured.
    runner: Any = importlib.import_module("uvloop" if importlib.util.find_spec("uvloop") else "asyncio")
    found: dict[str, list[Measured]] = {name: [] for name in RELAYS[framework]}
    for each in range(number):
        names = RELAYS[framework][:: 1 if each % 2 == 0 else -1]
        for name, measured in zip(names, runner.run(at_once(names, loop, load, servers)), strict=True):
            found[name].append(measured)
    return found


FIGURES = {"delta": "a delta, µs of CPU", "memory": "an open stream, KiB", "opening": "opening one, ms of CPU"}
TARGETS = ("delta", "memory")


def ratio(found: dict[str, list[Measured]], figure: str) -> Spread:
    """The ratio of ours to what was written by hand, within each round."""
    ours, by_hand, _ = ([getattr(each, figure) for each in measured] for measured in found.values())
    result = spread(one / other for one, other in zip(ours, by_hand, strict=True))
    assert result is not None
    return result


def told(found: dict[str, list[Measured]], figure: str) -> str:
    """A line of the table."""
    medians = [spread([getattr(each, figure) for each in measured]) for measured in found.values()]
    numbers = "".join(f"{median.median:10.2f}" for median in medians if median)
    of_both = ratio(found, figure)
    line = f"{FIGURES[figure]:28}{numbers}   {of_both.median:.3f} ({of_both.low:.3f} to {of_both.high:.3f})"
    if figure in TARGETS:
        line += f"  at most {AT_MOST}: {'pass' if of_both.median <= AT_MOST else 'MISSED'}"
    return line


def table(framework: str, loop: str, found: dict[str, list[Measured]]) -> str:
    """The figures of a framework."""
    head = f"{framework + ', ' + loop:28}{'ours':>10}{'by hand':>10}{'pipe':>10}   ours over by hand"
    lines = [head, *(told(found, figure) for figure in FIGURES)]
    busiest = max(sum(each.busy for each in together) for together in zip(*found.values(), strict=True))
    if busiest > BUSY:
        lines.append(f"The core was busy for {busiest:.0%} of the time: use fewer --streams, or a longer --interval.")
    return "\n".join(lines)


def main() -> int:
    """Parse arguments, measure, and return 1 for a target that was missed, 2 for one that was not measured."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.relay", description=__doc__.split("\n", 1)[0])
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--quick", action="store_true", help="a smoke run; its figures mean nothing")
    what.add_argument("--check", action="store_true", help="end with 1 when a target is missed, 2 when not measured")
    what.add_argument("--slow", action="store_true", help="the memory while a reader takes 1 KB/s of 50 MB, instead")
    parser.add_argument("--framework", choices=RELAYS, action="append", help="this one (repeatable; default: all)")
    parser.add_argument("--loop", choices=("asyncio", "uvloop"), default="asyncio", help="of the application")
    parser.add_argument("--rounds", type=positive, default=7, help="default: %(default)s")
    parser.add_argument("--streams", type=positive, default=Load().streams, help="at once (default: %(default)s)")
    parser.add_argument(
        "--interval", type=int, default=Load().interval, help="ms between deltas (default: %(default)s)"
    )
    options = parser.parse_args()
    load = QUICK if options.quick else Load(streams=options.streams, interval=options.interval)
    missed = unmeasured = False
    files = machine.allow_files()
    # A service has two for each stream; the readers of all three are in this process.
    if files < 3 * load.streams + SPARE_FILES:
        print(f"{load.streams} streams take three times as many open files, and the system allows {files:,}: raise it")
        return 2 if options.check else 0
    server_core, _ = machine.server_and_client()
    if not options.slow:
        print(f"{load.streams} streams at once, a delta of each every {load.interval} ms", flush=True)
    with ExitStack() as stack:
        servers = [stack.enter_context(serving()) for _ in range(3)]
        stack.enter_context(pinned(server_core))
        for framework in options.framework or RELAYS:
            lacking = [name for name in NEEDS[framework] if importlib.util.find_spec(name) is None]
            if lacking:
                print(f"{framework}: not measured, without {' and '.join(lacking)}: pip install -e '.[dev]'")
                unmeasured = True
                continue
            if options.slow:
                asyncio.run(slow(f"{framework}_ours", servers[0], options.loop))
                continue
            found = rounds(framework, options.loop, load, 1 if options.quick else options.rounds, servers)
            print(table(framework, options.loop, found), flush=True)
            missed |= any(ratio(found, figure).median > AT_MOST for figure in TARGETS)
    return 0 if not options.check else 1 if missed else 2 if unmeasured else 0


if __name__ == "__main__":
    sys.exit(main())
