"""Rounds: every library in a new process, in turn, against one server."""

import io
import platform
import select
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import cycle
from pathlib import Path
from typing import NoReturn, Self, TypeVar

import msgspec

from benchmarks import machine
from benchmarks.adapters import ADAPTERS, MissingLibraryError, missing
from benchmarks.child import READY
from benchmarks.figures import Figures, Results, Run
from benchmarks.rows import MOST_TOGETHER, QUICK, QUICK_LENGTH, QUICK_TURNS, Point, Row

ROOT = Path(__file__).parent.parent
LONGEST = 900  # seconds of one turn, or until a process is ready for its first
CURVE_ROUNDS = 2  # in which all places of a curve are measured
SPARE_FILES = 200  # descriptors beside those of connections
GOLDEN = 0.618  # its multiples, taken modulo 1, fill the unit evenly, however many there are
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
Turn = Callable[[], Figures]  # takes one, and returns what was measured
T = TypeVar("T")


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """What a session does.

    Attributes:
        rows: What is measured.
        adapters: The libraries, in the order of a round.
        loops: The event loops; a row that is not measured on one of them is left out.
        rounds: Rounds of every row, if they are not to be its own.
        quick: A smoke run: one round of few turns with little to do.
    """

    rows: list[Row]
    adapters: list[str]
    loops: list[str]
    rounds: int | None = None
    quick: bool = False


class Server:
    """A server of these benchmarks; each process has the next of its ports."""

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
        ports = [int(port) for port in process.stdout.readline().split()]
        if not ports:
            raise subprocess.SubprocessError("the server of the benchmarks did not start; what it said stands above")
        yield Server(ports, client_core)
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
    if adapter in row.without:
        return False
    if row.name == "import-beyond":
        return kind in ("ours", "reference")
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


class Part(msgspec.Struct, frozen=True, kw_only=True):
    """What one process of a round does: a library under a load, so many turns long.

    Attributes:
        heap: How far the heap has grown before the clock starts, from 0 to 1; see `child.grown`.
    """

    adapter: str
    load: Point
    turns: int
    heap: float = 0.0


def groups(row: Row, adapters: list[str], number: int, *, quick: bool) -> list[list[Part]]:
    """Who does what in a round, in groups of those that take turns; one group after another.

    Where a row has turns, ours and the reference are one group, with the places of a curve that have room for others.
    Everything else is alone: connections would expire while others have their turn, and a row without turns has no room
    for a second process.
    Every other round goes the other way, so that a drift of the machine hits all.
    """
    together: list[Part] = []
    found: list[list[Part]] = []
    for adapter in adapters:
        kind = ADAPTERS[adapter].kind
        for point in places(row, number, quick=quick):
            load = load_of(point, peer=kind == "peer", quick=quick)
            if load is None:
                continue
            beside_others = row.turns > 1 and kind in ("ours", "reference") and load.concurrency <= MOST_TOGETHER
            turns = row.turns if beside_others else row.turns_alone
            part = Part(
                adapter=adapter,
                load=load,
                turns=min(turns, QUICK_TURNS) if quick else turns,
                heap=number * GOLDEN % 1 if row.work == "cold calls" else 0.0,
            )
            if beside_others:
                together.append(part)
            else:
                found.append([part])
    if together:  # those of the same place are neighbours
        found.insert(0, sorted(together, key=lambda part: part.load.at))
    return found if number % 2 == 0 else [group[::-1] for group in reversed(found)]


def in_turn(members: Sequence[T], turns: int) -> Iterator[tuple[int, T]]:
    """Let all have a turn, and again the other way round: ours, plain, plain, ours, ours, plain.

    Two turns of the same number are neighbours, so that both met the same machine, and neither is always the first.
    """
    for turn in range(turns):
        for member in members if turn % 2 == 0 else reversed(members):
            yield turn, member


class Child:
    """A process that measures when it is told to, and has no CPU meanwhile. To be used as a context.

    Its methods raise `subprocess.SubprocessError` if it ended, was silent for `LONGEST` seconds, or said something that
    is no answer; what it wrote to standard error was printed then. However the context ends, the process has ended.
    """

    def __init__(self, command: list[str]) -> None:
        self._command = command

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            # A file, since a pipe that nobody reads while another has its turn would fill up.
            self._errors = stack.enter_context(tempfile.TemporaryFile())
            self._process = stack.enter_context(
                subprocess.Popen(
                    self._command,
                    bufsize=0,  # what was read and not handed out yet, `select` would not know of
                    cwd=ROOT,
                    env=machine.environment(),
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=self._errors,
                )
            )
            stack.callback(self._process.kill)  # one that has ended is left alone
            if (line := self._line()) != READY:
                self._wrong(repr(line))
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *failed: object) -> None:
        with self._stack:
            if failed[0] is None:
                self._end()

    def turn(self) -> Figures:
        """Let it measure once."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(b"\n")
        except BrokenPipeError:
            self._died()
        line = self._line()
        try:
            return msgspec.json.decode(line, type=Figures)
        except msgspec.DecodeError:
            self._wrong(repr(line))

    def _line(self) -> str:
        output = self._process.stdout
        assert isinstance(output, io.RawIOBase)
        if not select.select([output], [], [], LONGEST)[0]:
            self._show()
            raise subprocess.TimeoutExpired(self._command, LONGEST)
        line = output.readline()
        if not line.endswith(b"\n"):
            self._died()
        return line.decode(errors="replace").rstrip("\n")

    def _end(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            code = self._process.wait(LONGEST)
        except subprocess.TimeoutExpired:
            self._show()
            raise
        if code:
            self._died()

    def _died(self) -> NoReturn:
        code = self._process.wait(LONGEST)
        if not code:
            self._wrong("nothing, and ended")
        self._show()
        raise subprocess.CalledProcessError(code, self._command)

    def _wrong(self, said: str) -> NoReturn:
        self._show()
        raise subprocess.SubprocessError(f"{' '.join(self._command)} said {said}")

    def _show(self) -> None:
        self._errors.seek(0)
        sys.stderr.write(self._errors.read().decode(errors="replace"))


@contextmanager
def measuring(part: Part, row: Row, loop: str, server: Server) -> Iterator[Turn]:
    """Have what takes the turns of a part there while the context lasts."""
    if row.work == "import":
        yield lambda: importing(part.adapter, row, server)
        return
    with Child(command(part, row, loop, server)) as child:
        yield child.turn


def command(part: Part, row: Row, loop: str, server: Server) -> list[str]:
    """What starts the process of a part."""
    load, port = part.load, str(server.port())
    found = [sys.executable, "-m", "benchmarks.child", part.adapter, row.name, port, str(load.count), loop, "--turns"]
    found += ["--concurrency", str(load.concurrency), "--length", str(load.length)]
    if part.heap:
        found += ["--heap", f"{part.heap:.3f}"]
    if server.client_core is not None:
        found += ["--core", str(server.client_core)]
    return found


def importing(adapter: str, row: Row, server: Server) -> Figures:
    """Time an import in a fresh interpreter."""
    pinned = "" if server.client_core is None else f"os.sched_setaffinity(0, {{{server.client_core}}})"
    # What ours adds, beside what there is without it.
    before = BEYOND if (adapter, row.name) == ("ours", "import-beyond") else ""
    program = _IMPORT.format(core=pinned, before=before, name=ADAPTERS[adapter].imports)
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        env=machine.environment(),
        check=False,
        capture_output=True,
        text=True,
        timeout=LONGEST,
    )
    if done.returncode:
        sys.stderr.write(done.stderr)
        done.check_returncode()
    return Figures(importing=float(done.stdout.splitlines()[-1]))  # some libraries print


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
                self._say(f"{row.name}, {loop}: {len(self.runs) - before} turns in {time.monotonic() - began:.0f} s")

    def _rounds(self, row: Row, loop: str) -> None:
        failed: set[str] = set()
        for number in range(1 if self._plan.quick else self._plan.rounds or row.rounds):
            there = [each for each in self._adapters if takes_part(row, each, loop, number, self._plan)]
            for group in groups(row, there, number, quick=self._plan.quick):
                adapter = group[0].adapter
                if adapter in failed:
                    continue
                try:
                    self._turns(row, group, loop, number)
                except subprocess.SubprocessError as problem:
                    if ADAPTERS[adapter].kind != "peer":
                        raise
                    failed.add(adapter)
                    why = "took too long" if isinstance(problem, subprocess.TimeoutExpired) else "failed"
                    self.left_out.append(f"{row.title}, {loop}: {ADAPTERS[adapter].title} {why}")
        self.runs = [run for run in self.runs if (run.row, run.loop) != (row.name, loop) or run.adapter not in failed]

    def _turns(self, row: Row, group: list[Part], loop: str, number: int) -> None:
        runs: list[Run] = []
        with ExitStack() as stack:
            # All are there, and warm, before the first turn.
            turns = [(part, stack.enter_context(measuring(part, row, loop, self._server))) for part in group]
            for turn, (part, take) in in_turn(turns, group[0].turns):
                at = number * row.turns + turn
                runs.append(
                    Run(row=row.name, adapter=part.adapter, loop=loop, at=part.load.at, turn=at, figures=take())
                )
        self.runs += runs


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
