"""Rounds: every library in a process of its own, in turn, against one server."""

import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import cycle
from pathlib import Path

import msgspec

from benchmarks import machine
from benchmarks.adapters import ADAPTERS, MissingLibraryError, missing
from benchmarks.figures import Figures, Results, Run
from benchmarks.rows import QUICK, QUICK_LENGTH, Point, Row

ROOT = Path(__file__).parent.parent
LONGEST = 900  # seconds of one run
CURVE_ROUNDS = 2  # in which all places of a curve are measured
SPARE_FILES = 200  # descriptors beside those of connections
BEYOND = "import aiohttp, msgspec, tenacity"
# A fresh interpreter; `os` is there from its start.
_IMPORT = """
import os, time
{core}
{before}
began = time.perf_counter()
import {name}
print((time.perf_counter() - began) * 1e3)
"""

Say = Callable[[str], None]


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """What a session does.

    Attributes:
        rows: What is measured.
        adapters: The libraries, in the order of a round.
        loops: The event loops; a row that is not measured on one of them is left out.
        rounds: Rounds of every row, if they are not to be its own.
        quick: A smoke run: one round of little.
    """

    rows: list[Row]
    adapters: list[str]
    loops: list[str]
    rounds: int | None = None
    quick: bool = False


class Server:
    """A server of these benchmarks; each run has the next of its ports."""

    def __init__(self, ports: list[int], core: int | None) -> None:
        self._ports = cycle(ports)
        self.client_core = core

    def port(self) -> int:
        return next(self._ports)


@contextmanager
def serving() -> Iterator[Server]:
    """Run the server in a process of its own, and on a core of its own where there are two."""
    core, client_core = machine.server_and_client()
    command = [sys.executable, "-m", "benchmarks.server", *([] if core is None else [str(core)])]
    process = subprocess.Popen(
        command, cwd=ROOT, env=machine.environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        yield Server([int(port) for port in process.stdout.readline().split()], client_core)
    finally:
        process.communicate()


def load_of(point: Point, *, peer: bool, quick: bool) -> Point | None:
    """The load for a library: less for peers, which may be left out, and little of a smoke run."""
    count = point.peers if peer else point.count
    if not count:
        return None
    concurrency = min(point.concurrency, count)
    length = point.length
    if quick:
        concurrency, count, length = min(concurrency, QUICK), min(count, QUICK), min(length, QUICK_LENGTH)
    return msgspec.structs.replace(point, concurrency=concurrency, count=count, length=length)


def takes_part(row: Row, adapter: str, loop: str, number: int, plan: Plan) -> bool:
    """Whether a library is measured in this round. Peers are measured in the first rounds, on asyncio."""
    kind = ADAPTERS[adapter].kind
    if row.name == "import-beyond":
        return kind == "ours"
    if kind in ("ours", "reference"):
        return True
    if plan.quick and not row.quick:
        return False
    if kind == "peer" and loop != "asyncio":
        return False
    return number < (row.peer_rounds if plan.rounds is None else min(row.peer_rounds, plan.rounds))


def places(row: Row, number: int, *, quick: bool) -> list[Point]:
    """The loads of a row in a round. Of a curve, later rounds have its ends alone, and a smoke run has the near one."""
    if row.ends is None:
        return list(row.points)
    wanted = row.ends[:1] if quick else row.ends
    return [point for point in row.points if point.at in wanted or (number < CURVE_ROUNDS and not quick)]


def run(adapter: str, row: Row, loop: str, point: Point, server: Server) -> Figures:
    """Run one measurement, whatever it takes."""
    if row.work == "import":
        return importing(adapter, row, server)
    return child(adapter, row, loop, point, server)


def child(adapter: str, row: Row, loop: str, point: Point, server: Server) -> Figures:
    """Run one measurement in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.child", adapter, row.name, str(server.port()), str(point.count), loop]
    command += ["--concurrency", str(point.concurrency), "--length", str(point.length)]
    if server.client_core is not None:
        command += ["--core", str(server.client_core)]
    return msgspec.json.decode(_last_line(command), type=Figures)


def importing(adapter: str, row: Row, server: Server) -> Figures:
    """Time an import in a fresh interpreter."""
    pinned = "" if server.client_core is None else f"os.sched_setaffinity(0, {{{server.client_core}}})"
    before = BEYOND if row.name == "import-beyond" else ""
    program = _IMPORT.format(core=pinned, before=before, name=ADAPTERS[adapter].imports)
    return Figures(importing=float(_last_line([sys.executable, "-c", program])))


def _last_line(command: list[str]) -> str:
    done = subprocess.run(
        command, cwd=ROOT, env=machine.environment(), check=False, capture_output=True, text=True, timeout=LONGEST
    )
    if done.returncode:
        sys.stderr.write(done.stderr)
        done.check_returncode()
    return done.stdout.splitlines()[-1]  # some libraries print


class Session:
    """A plan that is being carried out: what was measured so far, and what was left out for which reason."""

    def __init__(self, plan: Plan, server: Server, say: Say) -> None:
        self._plan, self._server, self._say = plan, server, say
        self._adapters = [adapter for adapter in plan.adapters if not missing(adapter)]
        self.runs: list[Run] = []
        self.left_out = [str(MissingLibraryError(adapter)) for adapter in plan.adapters if missing(adapter)]

    def row(self, row: Row, files: int) -> None:
        """Measure a row on each loop, unless there are not enough open files for it."""
        needed = max(point.concurrency for point in row.points) + SPARE_FILES
        if needed > files and not self._plan.quick:
            self.left_out.append(
                f"{row.title}: it takes {needed:,} open files, and the system allows {files:,}; raise the hard limit"
                " (ulimit -Hn as root, LimitNOFILE= of systemd, --ulimit nofile= of Docker)"
            )
            return
        for loop in row.loops:
            if loop in self._plan.loops:
                began, before = time.monotonic(), len(self.runs)
                self._rounds(row, loop)
                self._say(f"{row.name}, {loop}: {len(self.runs) - before} runs in {time.monotonic() - began:.0f} s")

    def _rounds(self, row: Row, loop: str) -> None:
        # Every other round goes the other way, so that a drift of the machine hits all.
        failed: set[str] = set()
        for number in range(1 if self._plan.quick else self._plan.rounds or row.rounds):
            for adapter in self._adapters if number % 2 == 0 else reversed(self._adapters):
                if adapter in failed or not takes_part(row, adapter, loop, number, self._plan):
                    continue
                try:
                    self._round(row, adapter, loop, number)
                except subprocess.SubprocessError as problem:
                    if ADAPTERS[adapter].kind != "peer":
                        raise
                    failed.add(adapter)
                    why = "took too long" if isinstance(problem, subprocess.TimeoutExpired) else "failed"
                    self.left_out.append(f"{row.title}, {loop}: {ADAPTERS[adapter].title} {why}")

    def _round(self, row: Row, adapter: str, loop: str, number: int) -> None:
        for point in places(row, number, quick=self._plan.quick):
            load = load_of(point, peer=ADAPTERS[adapter].kind == "peer", quick=self._plan.quick)
            if load is not None:
                figures = run(adapter, row, loop, load, self._server)
                self.runs.append(
                    Run(row=row.name, adapter=adapter, loop=loop, at=point.at, round=number, figures=figures)
                )


def measure(plan: Plan, say: Say) -> Results:
    """Carry out a plan.

    Raises:
        subprocess.SubprocessError: Ours or what we are compared with failed, took too long, or brought something wrong;
            its message was printed. When a peer does, its row goes without it.
    """
    files = machine.allow_files()
    with serving() as server:
        session = Session(plan, server, say)
        for row in plan.rows:
            session.row(row, files)
    measured = {run.adapter for run in session.runs}
    names = {name for adapter in measured for name in ADAPTERS[adapter].distributions}
    return Results(
        python=f"{platform.python_implementation()} {platform.python_version()}",
        machine=machine.describe(),
        libraries=machine.versions(sorted(names | {"uvloop"})),
        allocator=machine.ALLOCATOR,
        runs=session.runs,
        left_out=session.left_out,
    )
