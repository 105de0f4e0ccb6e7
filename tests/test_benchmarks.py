"""The benchmarks: what they count, what they refuse, and what they publish."""

import argparse
import asyncio
import gc
import os
import platform
import re
import signal
import socket
import subprocess
import sys
from contextlib import ExitStack, contextmanager
from itertools import pairwise
from pathlib import Path

import msgspec
import pytest

from benchmarks import answers, machine, report, runner, steps
from benchmarks.adapters import ADAPTERS, STEPS, MissingLibraryError, load, missing
from benchmarks.arithmetic import Spread, by_turn, every, growth, ratios, relative_growth, spread
from benchmarks.beside import Side, over
from benchmarks.child import WrongAnswerError, check_call, check_count, check_texts, grown, together
from benchmarks.figures import Figures, Results, Run
from benchmarks.machine import Machine
from benchmarks.options import positive
from benchmarks.rows import LOOPS, ROWS, Point
from benchmarks.runner import Child, Part, Plan, Session, groups, in_turn, measuring, serving, takes_part
from benchmarks.server import Counts, Server
from benchmarks.targets import FEWEST, TARGETS, UNLIKELY, Target, chance, judge, status, told

MACHINE = Machine(cpu="a processor", cores=2, kernel="Linux 6", pinned=True, files=20_000)
PEERS = [name for name, adapter in ADAPTERS.items() if adapter.kind == "peer"]


def run(row: str, adapter: str, number: int, value: float, at: int = 0) -> Run:
    figures = Figures(**{ROWS[row].measure: value})
    return Run(row=row, adapter=adapter, loop="asyncio", at=at, turn=number, figures=figures)


def results(*runs: Run) -> Results:
    return Results(python="CPython 3.11.0", machine=MACHINE, libraries={}, allocator={}, runs=list(runs))


def verdicts(found: Results, target: Target):
    return judge(found, [target.row], [target.loop], [target])


# Arithmetic.


def test_a_ratio_is_that_of_two_turns_of_the_same_number() -> None:
    """A machine that is slow for a moment is slow for both, and the ratio of that pair stays what it is."""
    row = ROWS["at-once-5000"]
    found = results(
        *(run(row.name, "ours", number, value) for number, value in enumerate([90, 900, 95])),
        *(run(row.name, "plain", number, value) for number, value in enumerate([100, 1000, 100])),
    )
    each = [by_turn(found, row, name, "asyncio") for name in ("ours", "plain")]
    assert ratios(row, *each) == {0: [0.9], 1: [0.9], 2: [0.95]}
    assert spread(every(ratios(row, *each))) == Spread(0.9, 0.9, pytest.approx(0.925), 3)


def test_who_was_first_in_a_pair_does_not_matter() -> None:
    """The second finds the caches full of the first one's; two neighbouring pairs, there and back, are one figure."""
    row = ROWS["call"]
    cold, round_ = 1.2, row.turns
    ours, plain = (dict.fromkeys((0, 1, round_, round_ + 1), cost) for cost in (0.9, 1.0))
    for number in ours:
        second = plain if number % 2 == 0 else ours
        second[number] *= cold
    assert ratios(row, ours, plain) == {0: [pytest.approx(0.9)], 1: [pytest.approx(0.9)]}


def test_a_turn_that_only_one_of_two_has_counts_for_neither() -> None:
    """Peers have fewer turns; only those turns are compared."""
    row = ROWS["at-once-5000"]
    assert ratios(row, {0: 10.0, 1: 99.0}, {0: 5.0}) == {0: [2.0]}
    assert ratios(row, {1: 99.0}, {0: 5.0}) == {}


def test_a_spread_of_nothing_is_nothing() -> None:
    """What was not measured has no median; what was measured once has no spread."""
    assert spread([]) is None
    assert spread([3.0]) == Spread(3.0, 3.0, 3.0, 1)


def test_growth_is_the_far_end_of_a_curve_over_the_near_one() -> None:
    """What lies between the two ends does not count, nor does a turn that lacks one of them."""
    found = results(
        *(run("length", "ours", 0, value, at) for at, value in [(100, 9), (1000, 2), (10_000, 7), (100_000, 3)]),
        run("length", "ours", 6, 2, 1000),
        *(run("length", "plain", 0, value, at) for at, value in [(1000, 1), (100_000, 1.2)]),
    )
    assert growth(found, ROWS["length"], "ours", "asyncio") == {0: [1.5]}
    assert growth(found, ROWS["call"], "ours", "asyncio") == {}
    assert relative_growth(found, ROWS["length"], "ours", "plain", "asyncio") == {0: pytest.approx(1.25)}
    assert relative_growth(found, ROWS["call"], "ours", "plain", "asyncio") == {}


# Targets.


def test_a_target_is_judged_by_the_median() -> None:
    """One pair beyond the bound is noise, a median beyond it is a miss."""
    target = Target(row="open-stream", kind="ratio", at_most=1.25)
    plain = [run(target.row, "plain", number, 1) for number in range(3)]
    for values, met in [((1.0, 1.25, 9.0), True), ((1.0, 1.26, 1.27), False)]:
        found = results(*plain, *(run(target.row, "ours", number, value) for number, value in enumerate(values)))
        (verdict,) = verdicts(found, target)
        assert (verdict.outcome == "pass") is met
        assert status([verdict]) == (0 if met else 1)
        assert told(verdict).endswith("pass" if met else "MISSED")
        assert ", 3 in 3 rounds)" in told(verdict)


def test_a_few_rounds_beyond_a_bound_are_no_miss() -> None:
    """Of eight, with a median that is the bound, five are beyond it in every third run, and seven nearly never."""
    target = Target(row="at-once-5000", kind="ratio", at_most=1.00)
    for beyond, end, code in [
        (4, "pass", 0),
        (5, "NOT TOLD APART, 5 of 8 rounds beyond", 0),
        (6, "NOT TOLD APART, 6 of 8 rounds beyond", 0),
        (7, "MISSED", 1),
    ]:
        values = [1.05] * beyond + [0.9] * (8 - beyond)
        found = results(
            *(run("at-once-5000", "ours", number, value) for number, value in enumerate(values)),
            *(run("at-once-5000", "plain", number, 1) for number in range(8)),
        )
        (verdict,) = verdicts(found, target)
        assert told(verdict).endswith(end)
        assert status([verdict]) == code


def test_many_turns_of_a_few_processes_are_few() -> None:
    """What makes one process slower than the next is in all its turns; so rounds are counted, by their medians."""
    row = ROWS["call"]
    target = Target(row="call", kind="ratio", at_most=1.00)
    for slow, end in [(4, "NOT TOLD APART, 4 of 5 rounds beyond"), (5, "MISSED")]:
        found = results(
            *(
                run("call", name, number, 1.1 if name == "ours" and number < slow * row.turns else 1.0)
                for name in ("ours", "plain")
                for number in range(5 * row.turns)
            )
        )
        (verdict,) = verdicts(found, target)
        assert told(verdict).endswith(end)


def test_many_rounds_tell_a_small_miss() -> None:
    """The more were measured, the less is put down to noise; and of fewer than five the median alone decides."""
    assert chance(7, 8) < UNLIKELY < 0.3 < chance(5, 8)
    assert chance(170, 300) < UNLIKELY < chance(155, 300)
    assert chance(0, 300) == pytest.approx(1)
    assert [chance(count, count) for count in (1, FEWEST - 1)] == [0, 0]
    assert chance(FEWEST, FEWEST) < UNLIKELY


def test_a_target_of_each_kind_reads_its_own_figures() -> None:
    """A gain is the official client over ours, a growth is ours over that of the reference, an import is in itself."""
    found = results(
        run("call", "openai", 0, 1600),
        run("call", "ours", 0, 80),
        *(run("length", name, 0, value, 1000) for name, value in [("ours", 2), ("plain", 1)]),
        *(run("length", name, 0, value, 100_000) for name, value in [("ours", 2.2), ("plain", 1)]),
        run("import-beyond", "ours", 0, 11),
        run("import-beyond", "plain", 0, 220),
    )
    targets = [
        Target(row="call", kind="gain", at_least=16),
        Target(row="length", kind="growth", at_most=1.03),
        Target(row="length", kind="own growth", at_most=1.03),
        Target(row="import-beyond", kind="ratio", at_most=0.066),
    ]
    judged = [verdicts(found, target)[0] for target in targets]
    assert [verdict.found and round(verdict.found.median, 6) for verdict in judged] == [20, 1.1, 1.1, 0.05]
    assert [verdict.outcome for verdict in judged] == ["pass", "MISSED", "MISSED", "pass"]


def test_what_is_out_of_reach_is_told_and_held_where_it_is() -> None:
    """It is no failure, and is not hidden; to fall further behind is a failure."""
    target = Target(row="paced", kind="ratio", at_most=1.03, held_at=1.12)
    for value, end, code in [
        (1.03, "pass", 0),
        (1.12, "(one): OUT OF REACH, held at 1.12", 0),
        (1.13, "MISSED", 1),
    ]:
        (verdict,) = verdicts(results(run("paced", "ours", 0, value), run("paced", "plain", 0, 1)), target)
        assert told(verdict).endswith(end)
        assert status([verdict]) == code
    gain = Target(row="burst-gathered", kind="gain", at_least=60, held_at=38)
    for value, end in [(60, "pass"), (38, "(one): OUT OF REACH, held at 38"), (37, "MISSED")]:
        measured = [run("burst-gathered", name, 0, each) for name, each in [("openai", value), ("ours", 1)]]
        (verdict,) = verdicts(results(*measured), gain)
        assert told(verdict).endswith(end)


def test_what_was_not_measured_is_neither_reached_nor_missed() -> None:
    """Without the official client there is no ratio to it: 2, but 1 if something else was missed."""
    found = results(run("call", "ours", 0, 1), run("call", "plain", 0, 1))
    judged = judge(found, ["call"], ["asyncio"])
    assert [verdict.outcome for verdict in judged] == ["MISSED", "NOT MEASURED"]
    assert status(judged) == 1
    assert status(judged[1:]) == 2
    assert told(judged[1]).endswith("NOT MEASURED")


def test_a_target_says_which_libraries_it_needs() -> None:
    """Who measures some libraries is not told that the others are missing."""
    asked = [target for target in TARGETS if not target.needs - {"ours", "plain"}]
    assert {target.kind for target in asked} == {"ratio", "growth", "own growth"}
    assert all(target.needs <= ADAPTERS.keys() for target in TARGETS)


def test_every_target_can_be_measured() -> None:
    """Each names a row and a loop of that row, has one bound, and growth is asked of curves alone."""
    for target in TARGETS:
        row = ROWS[target.row]
        assert target.loop in row.loops
        assert (target.at_most is None) != (target.at_least is None)
        assert target.kind.endswith("growth") == (row.ends is not None)
        assert row.ends is None or {*row.ends} <= {point.at for point in row.points}


# Answers.


@pytest.mark.parametrize(
    "texts",
    [
        pytest.param(answers.texts(5)[:-1], id="one is missing"),
        pytest.param([*answers.texts(5), "more"], id="one too many"),
        pytest.param(answers.texts(5)[::-1], id="another order"),
        pytest.param([], id="none"),
    ],
)
def test_texts_other_than_those_sent_are_refused(texts: list[str]) -> None:
    """A library that is fast since it loses something gets no figure."""
    check_texts(["", *answers.texts(5), ""], 5)
    with pytest.raises(WrongAnswerError):
        check_texts(texts, 5)


def test_counts_and_calls_other_than_those_sent_are_refused() -> None:
    """A library that loses a delta gets no figure, and one that makes up a text does not either."""
    check_count(502, 502)
    check_call(answers.ANSWER)
    for wrong in (501, 503):
        with pytest.raises(WrongAnswerError):
            check_count(wrong, 502)
    for text in (None, "", answers.ANSWER + "!"):
        with pytest.raises(WrongAnswerError):
            check_call(text)


class Liar:
    """A client that is right once."""

    def __init__(self) -> None:
        self.calls = 0

    async def call(self) -> str:
        self.calls += 1
        return answers.ANSWER if self.calls == 1 else "Hello!"


async def test_one_wrong_answer_ends_a_run() -> None:
    """The first wrong one of many workers stops them all, and there is no figure."""
    liar = Liar()

    async def work() -> None:
        check_call(await liar.call())

    with pytest.raises(ExceptionGroup) as caught:
        await together(5, work)
    assert caught.group_contains(WrongAnswerError)


# A server and its clients.


class Serving:
    """The server of the benchmarks on this loop."""

    def __init__(self) -> None:
        self.counts = Counts()

    async def __aenter__(self) -> int:
        loop = asyncio.get_running_loop()
        self.server = await loop.create_server(lambda: Server(self.counts), "127.0.0.1", 0)
        return self.server.sockets[0].getsockname()[1]

    async def __aexit__(self, *_: object) -> None:
        self.server.close()


STREAMS = {"paced": "paced", "burst": "burst", "gathered": "burst-gathered", "long": "length"}  # path: row


@pytest.mark.parametrize(
    "adapter,what",
    [
        (adapter, path)
        for adapter in ("ours", "plain", "bare", *(name for name in STEPS if "ooled" not in name))
        for path, row in STREAMS.items()
        if adapter not in ROWS[row].without
    ],
)
async def test_an_adapter_hands_out_what_the_server_sent(adapter: str, what: str) -> None:
    """Whether read in a hurry or text by text, and on one connection for all that follows another."""
    serving = Serving()
    length = 50 if what == "paced" else 250  # as fast as the server sends
    async with serving as port:
        client = load(adapter)(f"http://127.0.0.1:{port}/{what}/{length}/v1")
        assert await client.call() == answers.ANSWER
        assert await client.stream() == length
        check_texts([text async for text in client.texts()], length)
        assert (serving.counts.connections, serving.counts.requests) == (1, 3)
        await client.close()


async def test_a_step_that_only_calls_hands_out_what_the_server_sent() -> None:
    """The pool alone has no streams."""
    async with Serving() as port:
        client = load("steps:Pooled")(f"http://127.0.0.1:{port}/call/250/v1")
        assert await client.call() == answers.ANSWER
        await client.close()


def test_bytecodes_are_counted_and_hardly_differ() -> None:
    """A change can be tried without a clock. In a process of its own, since it takes the place of a tracer."""
    command = [sys.executable, "-m", "benchmarks.bytecodes", "bare", "--only", "burst", "--functions", "3"]
    first, second = (subprocess.check_output(command, cwd=runner.ROOT, text=True).splitlines() for _ in range(2))
    assert first[0] == "| bytecodes of one (asyncio) | burst |"
    (name, counted), (_, again) = ([cell.strip() for cell in lines[2].split("|")[1:3]] for lines in (first, second))
    assert name == "bare"
    assert int(counted) == pytest.approx(int(again), abs=3)  # a segment more or less of some thousand deltas
    assert "bare, burst:" in first
    assert sum("(bare.py:" in line for line in first) >= 1


def test_numbers_that_measure_nothing_are_refused() -> None:
    """No rounds give no figure; it is said before anything is started."""
    assert positive("3") == 3
    for text in ("0", "-1", "1.5", "lots", ""):
        with pytest.raises(argparse.ArgumentTypeError, match="a whole number from 1"):
            positive(text)


def test_the_steps_lead_to_the_client() -> None:
    """Each row of them can be measured, and ends with the whole client."""
    for row, found in steps.STEPS.items():
        assert row in ROWS
        assert list(found)[-1] == "ours"
        assert {*found} <= {*STEPS, "ours"}


def test_steps_and_loops_are_measured_side_by_side() -> None:
    """Two processes that take turns; each two turns of both are a figure."""
    row = msgspec.structs.replace(ROWS["burst"], turns=4, points=(Point(concurrency=1, count=1, length=50),))
    found = over(row, Side("session", "uvloop"), Side("plain", "asyncio"), 2)
    assert found.count == 4
    assert 0.2 < found.low <= found.median <= found.high < 5


@pytest.mark.parametrize("adapter", ["ours", "plain", "bare"])
async def test_what_is_held_waits_until_it_is_let_go(adapter: str) -> None:
    """An open stream has had a text and waits for the next, a waiting call has had nothing: that is what is weighed."""
    serving = Serving()
    async with serving as port:
        client = load(adapter)(f"http://127.0.0.1:{port}/held/10/v1")
        texts = client.texts()
        first = [await anext(texts)]
        while not first[-1]:
            first.append(await anext(texts))
        call = asyncio.create_task(client.call())
        rest = asyncio.create_task(_rest(texts))
        async with asyncio.timeout(30):
            while len(serving.counts.held) < 2:  # noqa: ASYNC110 - the server of the benchmarks has no event for it
                await asyncio.sleep(0)
        assert not call.done()
        assert not rest.done()
        serving.counts.release()
        assert await call == answers.ANSWER
        check_texts([*first, *await rest], 10)
        await client.close()


async def _rest(texts: object) -> list[str]:
    return [text async for text in texts]  # type: ignore[attr-defined]


async def test_the_server_refuses_a_path_it_does_not_know() -> None:
    """A misspelt row fails; it does not measure something else."""
    connection = Server(Counts())
    with pytest.raises(ValueError, match="nonsense"):
        connection._answer(b"/nonsense/1/v1", streamed=True)


# Where full collections fall.


def test_each_round_of_calls_at_once_starts_from_a_heap_of_its_own() -> None:
    """Ours and the reference from the same one; over the rounds, evenly from all of them."""
    heaps = [
        {part.heap for group in groups(ROWS["at-once-5000"], ["ours", "plain"], number, quick=False) for part in group}
        for number in range(ROWS["at-once-5000"].rounds)
    ]
    assert all(len(each) == 1 for each in heaps)
    there = sorted(heap for each in heaps for heap in each)
    assert there[0] == 0
    assert max(b - a for a, b in pairwise([*there, 1.0])) < 2 / len(there)
    assert {part.heap for group in groups(ROWS["call"], ["ours"], 1, quick=False) for part in group} == {0}


def test_a_heap_grows_by_less_than_what_brings_a_full_collection() -> None:
    """From nothing to a quarter of what there is."""
    assert grown(0) == []
    there = len(gc.get_objects())
    assert len(grown(0.5)) == pytest.approx(there * (1.25**0.5 - 1), rel=0.02)


# Turns.


def members(row: str, number: int = 0, *, quick: bool = False) -> list[list[str]]:
    found = groups(ROWS[row], ["ours", "plain", "bare", "openai"], number, quick=quick)
    return [[f"{part.adapter} {part.load.at}".removesuffix(" 0") for part in group] for group in found]


def test_turns_go_there_and_back() -> None:
    """Two turns of the same number are neighbours, and neither of two libraries is always the first."""
    assert list(in_turn(["ours", "plain"], 3)) == [
        *((0, "ours"), (0, "plain")),
        *((1, "plain"), (1, "ours")),
        *((2, "ours"), (2, "plain")),
    ]


def test_ours_and_the_reference_take_turns_and_all_others_are_alone() -> None:
    """Others take so long that connections would expire meanwhile. Every other round goes the other way."""
    assert members("call") == [["ours", "plain"], ["bare"], ["openai"]]
    assert members("call", 1) == [["openai"], ["bare"], ["plain", "ours"]]


@pytest.mark.parametrize("row", ["at-once-5000", "at-once-10000", "open-stream", "waiting-call", "import"])
def test_who_fills_the_machine_is_alone(row: str) -> None:
    """Thousands of connections, and memory that is weighed, leave no room for a second process."""
    assert all(len(group) == 1 for group in members(row))


def test_all_places_of_a_curve_take_turns() -> None:
    """Each beside the reference at the same place, and the ends of the curve in the same seconds."""
    assert members("length")[0] == [
        f"{adapter} {at}" for at in (100, 1000, 10_000, 100_000) for adapter in ("ours", "plain")
    ]
    assert members("length", runner.CURVE_ROUNDS)[0] == ["ours 1000", "plain 1000", "ours 100000", "plain 100000"]
    assert members("length", quick=True)[0] == ["ours 1000", "plain 1000"]


def test_a_place_with_thousands_of_calls_at_once_is_alone() -> None:
    """The others of its curve take turns; its turns have numbers of theirs, so that growth has its pairs."""
    together, *alone = groups(ROWS["concurrency"], ["ours", "plain"], 1, quick=False)[::-1]
    assert {part.load.at for part in together} == {1, 8, 64, 1000}
    assert [part.load.at for (part,) in alone] == [10_000, 10_000]
    assert all(1 < part.turns <= together[0].turns for (part,) in alone)


def test_what_can_be_measured_once_in_a_process_has_one_turn() -> None:
    """A client is cold once, and the memory of a process grows once."""
    for row in ROWS.values():
        assert row.turns == 1 or row.work in ("calls", "streams")
        assert 1 <= row.turns_alone <= row.turns  # so that no two rounds have turns of the same number
        assert {*row.without} <= ADAPTERS.keys() - {"ours", "plain"}


def test_a_library_may_be_left_out_of_a_row() -> None:
    """LiteLLM would take longer for 10,000 calls at once than all else together."""
    row = ROWS["at-once-10000"]
    plan = Plan(rows=[row], adapters=list(ADAPTERS), loops=["asyncio"])
    there = [adapter for adapter in ADAPTERS if takes_part(row, adapter, "asyncio", 0, plan)]
    assert there == ["ours", "plain", "bare", "openai", "openai_aiohttp"]


class Machinery:
    """Instead of processes: a machine that is slower by one with each turn it has had, on which some libraries fail."""

    def __init__(self, *failing: str, turns: int = 0) -> None:
        self._failing = failing
        self._left = turns  # before those that fail do
        self._now = 0
        self.alive: set[str] = set()
        self.most = 0

    @contextmanager
    def measuring(self, part: Part, *_: object):
        self.alive.add(f"{part.adapter} {part.load.at}")
        self.most = max(self.most, len(self.alive))
        try:
            yield lambda: self._turn(part.adapter)
        finally:
            self.alive.remove(f"{part.adapter} {part.load.at}")

    def _turn(self, adapter: str) -> Figures:
        self._now += 1
        if adapter in self._failing:
            self._left -= 1
            if self._left < 0:
                raise subprocess.CalledProcessError(1, adapter)
        return Figures(cpu=self._now)


def session(monkeypatch: pytest.MonkeyPatch, machinery: Machinery, *adapters: str) -> Session:
    monkeypatch.setattr(runner, "measuring", machinery.measuring)
    monkeypatch.setattr(runner, "missing", lambda adapter: False)
    plan = Plan(rows=[], adapters=list(adapters), loops=["asyncio"])
    return Session(plan, runner.Server([1], None), lambda line: None)


def test_each_turn_makes_a_ratio_of_neighbours(monkeypatch: pytest.MonkeyPatch) -> None:
    """However the machine changes, it had one turn of time to do so; and who was first changes each time."""
    found = session(monkeypatch, Machinery(), "ours", "plain", "bare")
    row = ROWS["call"]
    found.row(row, 20_000)
    ours, plain = (by_turn(results(*found.runs), row, name, "asyncio") for name in ("ours", "plain"))
    assert list(ours) == list(plain) == list(range(row.rounds * row.turns))
    assert {abs(ours[turn] - plain[turn]) for turn in ours} == {1}
    first = [ours[turn] < plain[turn] for turn in range(row.turns)]
    assert first == [turn % 2 == 0 for turn in range(row.turns)]
    assert (ours[row.turns] < plain[row.turns]) is False  # the second round goes the other way


def test_a_peer_that_fails_is_left_out_and_ours_ends_the_session(monkeypatch: pytest.MonkeyPatch) -> None:
    """A row goes without a peer, and says so; nothing of it is kept, and no process is left."""
    machinery = Machinery("openai", turns=3)
    found = session(monkeypatch, machinery, "ours", "plain", "openai")
    found.row(ROWS["call"], 20_000)
    assert {run.adapter for run in found.runs} == {"ours", "plain"}
    assert found.left_out == ["one call, 64 at a time, asyncio: openai failed"]
    machinery = Machinery("plain")
    with pytest.raises(subprocess.CalledProcessError):
        session(monkeypatch, machinery, "ours", "plain").row(ROWS["call"], 20_000)
    assert machinery.most == 2
    assert not machinery.alive


# Processes that take turns.


def child(program: str) -> Child:
    return Child([sys.executable, "-c", f"import sys\nsay = lambda line: print(line, flush=True)\n{program}"])


def test_a_process_that_dies_in_its_turn_tells_why(capsys: pytest.CaptureFixture[str]) -> None:
    """What it wrote to standard error is printed, and its status is that of the error."""
    with (
        pytest.raises(subprocess.CalledProcessError) as caught,
        child("say('ready'); input(); say('{}'); input(); sys.exit('a reason')") as one,
    ):
        assert one.turn() == Figures()
        one.turn()
    assert caught.value.returncode == 1
    assert "a reason" in capsys.readouterr().err


@pytest.mark.parametrize(
    "program",
    [
        pytest.param("sys.exit('before the first turn')", id="dies before it is ready"),
        pytest.param("say('nonsense')", id="is something else"),
        pytest.param("say('ready'); input(); say('nonsense')", id="no figures"),
        pytest.param("say('ready'); input()", id="ends in a turn"),
        pytest.param("say('ready')", id="ends before its turn"),
        pytest.param("say('ready'); input(); say('{}'); sys.stdin.read(); sys.exit(1)", id="fails at its end"),
    ],
)
def test_a_process_that_does_not_answer_has_no_figures(program: str) -> None:
    """Whatever goes wrong is one error for who measures, and the process has ended."""
    one = child(program)
    with pytest.raises(subprocess.SubprocessError), one:
        one.turn()
    assert one._process.returncode is not None


def test_a_process_that_says_nothing_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """A library that hangs does not hang the session."""
    monkeypatch.setattr(runner, "LONGEST", 0)
    one = child("sys.stdin.read()")
    with pytest.raises(subprocess.TimeoutExpired), one:
        pass
    assert one._process.returncode == -signal.SIGKILL


def test_an_interrupt_leaves_no_process() -> None:
    """Whoever gives up a session does not find its processes a day later."""
    one = child("say('ready'); sys.stdin.read()")
    with pytest.raises(KeyboardInterrupt), one:
        raise KeyboardInterrupt
    assert one._process.returncode == -signal.SIGKILL


def test_what_a_library_prints_is_no_answer() -> None:
    """Some print, from Python or from C."""
    noise = "import os; from benchmarks.child import own_output; say = own_output(); print('!'); os.write(1, b'!')"
    with child(f"{noise}; say('ready'); input(); print('!', flush=True); say('{{}}')") as one:
        assert one.turn() == Figures()


@pytest.mark.parametrize("row", ["call", "burst"])
def test_two_libraries_take_turns(row: str) -> None:
    """Each turn has figures of its own; what the server saw of the other counts for neither."""
    (group, *_) = groups(ROWS[row], ["ours", "plain"], 0, quick=True)
    with serving() as server, ExitStack() as stack:
        turns = [(part, stack.enter_context(measuring(part, ROWS[row], LOOPS[0], server))) for part in group]
        found = [(turn, part, take()) for turn, (part, take) in in_turn(turns, 2)]
    assert [(turn, part.adapter) for turn, part, _ in found] == [(0, "ours"), (0, "plain"), (1, "plain"), (1, "ours")]
    for _, part, figures in found:
        assert figures.cpu
        assert figures.cpu > 0
        assert (figures.connections, figures.repeated) == (part.load.concurrency, 0)


# Libraries that are not there.


@pytest.mark.parametrize("adapter", PEERS)
def test_a_missing_peer_names_the_extra(adapter: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who runs the benchmarks without the libraries compared with is told how to get them."""
    library = ADAPTERS[adapter].needs[0]
    monkeypatch.setitem(sys.modules, library, None)
    for name in PEERS:
        monkeypatch.delitem(sys.modules, f"benchmarks.adapters.{name}", raising=False)
    assert missing(adapter)
    with pytest.raises(MissingLibraryError, match=r"chatkore-async\[bench\]"):
        load(adapter)


def test_no_adapter_imports_the_library_of_another() -> None:
    """Each process has one library in memory, and the runner has none."""
    for name in PEERS:
        library = ADAPTERS[name].needs[0]
        for path in Path(runner.__file__).parent.rglob("*.py"):
            imported = re.search(rf"^\s*(import|from) {library}\b", path.read_text(encoding="utf-8"), re.MULTILINE)
            assert not imported or path.parent.name == "adapters", path.name
            assert not imported or path.stem.startswith(library), path.name


# What is published.


def test_results_name_no_host_and_no_path() -> None:
    """They are published, and tell of a machine what bears on speed."""
    told_ = msgspec.json.encode(msgspec.structs.replace(results(), machine=machine.describe())).decode()
    for private in (socket.gethostname(), platform.node(), str(Path.home()), os.fspath(Path.cwd()), sys.prefix):
        assert not re.search(rf"(?<!\w){re.escape(private)}(?!\w)", told_)
    assert machine.describe().cpu
    for kept in (Path(__file__).parent.parent / "benchmarks/results").iterdir():
        assert not re.search(r"/(?:home|root|Users|tmp)/", kept.read_text("utf-8")), kept.name


def test_a_table_has_a_line_for_each_row_and_the_spread() -> None:
    """Whoever reads a ratio reads how far its pairs lie apart; a column without figures is left out."""
    found = results(
        *(run("open-stream", "ours", number, value) for number, value in enumerate([90.0, 95.0, 100.0])),
        *(run("open-stream", "plain", number, 100.0) for number in range(3)),
        run("at-once-10000", "ours", 0, 4.321),
        run("at-once-10000", "plain", 0, 4.321),
    )
    text = report.main_table(found).replace("\u00a0", " ")
    assert "| memory of an open stream | asyncio | 95.0 KiB | 100 KiB | 0.950 (0.925 to 0.975) |" in text
    assert "4.32 s | 4.32 s | 1.00 (one) |" in text
    assert "LiteLLM" not in text


def test_a_page_says_what_was_left_out() -> None:
    """A row that is missing is missing for a reason, which stands below."""
    found = msgspec.structs.replace(results(run("call", "ours", 0, 90.0)), left_out=["no uvloop"])
    assert report.page(found, []).endswith("Left out:\n\n- no uvloop\n")


def test_a_page_says_what_is_not_what_it_seems() -> None:
    """A request that was made twice, a connection that had to be opened anew, a server that was waited for."""
    there = [
        Figures(cpu=1, repeated=1),
        Figures(cpu=1, connections=99),
        Figures(cpu=1, connections=64, server=0.95),
        Figures(cpu=1, connections=64, repeated=0, server=0.3),
    ]
    runs = [
        Run(row="call", adapter=name, loop="asyncio", at=0, turn=0, figures=figures)
        for name, figures in zip(["openai", "litellm", "bare", "ours"], there, strict=True)
    ]
    assert report.doubts(results(*runs, *runs)) == [
        "one call, 64 at a time, asyncio: openai repeated requests",
        "one call, 64 at a time, asyncio: LiteLLM opened connections anew",
        "one call, 64 at a time, asyncio: asyncio.Protocol, by hand kept the server busy",
    ]
    assert "To be taken with caution:\n\n- one call" in report.page(results(*runs), [])


def test_the_page_that_is_kept_is_that_of_the_results_that_are() -> None:
    """Whoever changes how figures are made of turns makes the page anew."""
    kept = Path(__file__).parent.parent / "benchmarks/results"
    stored = msgspec.json.decode((kept / "cpython-3.11.json").read_bytes(), type=Results)
    page = report.page(stored, judge(stored, list(ROWS), list(LOOPS)))
    assert page == (kept / "table.md").read_text("utf-8")


def test_results_are_read_as_they_were_written() -> None:
    """Stored results can be judged and drawn again."""
    found = results(run("length", "ours", 1, 1.5, 1000), run("import", "plain", 0, 183.0))
    assert msgspec.json.decode(msgspec.json.encode(found), type=Results) == found


def cells(page: str) -> list[list[str]]:
    """The lines of the tables of a page, cell by cell."""
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in page.splitlines() if line.startswith("|")]


def test_the_readme_tells_what_was_measured() -> None:
    """Each figure in it stands in the table that the benchmarks wrote, in the same row and under the same head."""
    root = Path(__file__).parent.parent
    heads, _, *measured = cells((root / "benchmarks/results/table.md").read_text("utf-8"))
    readme = (root / "README.md").read_text("utf-8")
    told_heads, _, *told_rows = cells(readme.split("<!-- costs: begin -->")[1].split("<!-- costs: end -->")[0])
    assert len(told_rows) > 5
    found = {(row[0], row[1]): dict(zip(heads, row, strict=False)) for row in measured[::-1]}
    for row in told_rows:
        assert row == [found[row[0], row[1]][head] for head in told_heads]


def test_peers_get_less_to_do_and_a_smoke_run_gets_little() -> None:
    """A library that needs minutes for what others do in seconds has a load of its own, or none."""
    call, far = ROWS["call"].points[0], ROWS["concurrency"].points[-1]
    assert runner.load_of(call, peer=False, quick=False) == call
    peer = runner.load_of(call, peer=True, quick=False)
    assert peer is not None
    assert (peer.concurrency, peer.count) == (call.concurrency, call.peers)
    assert runner.load_of(far, peer=True, quick=False) is None
    quick = runner.load_of(far, peer=False, quick=True)
    assert quick is not None
    assert quick.concurrency == quick.count == 20
