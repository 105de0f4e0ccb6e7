"""The benchmarks: what they count, what they refuse, and what they publish."""

import asyncio
import os
import platform
import re
import socket
import sys
from pathlib import Path

import msgspec
import pytest

from benchmarks import answers, machine, report, runner
from benchmarks.adapters import ADAPTERS, MissingLibraryError, load, missing
from benchmarks.arithmetic import Spread, by_round, growth, ratios, spread
from benchmarks.child import Load, WrongAnswerError, check_call, check_count, check_texts, together
from benchmarks.figures import Figures, Results, Run
from benchmarks.machine import Machine
from benchmarks.rows import ROWS
from benchmarks.server import Counts, Server
from benchmarks.targets import TARGETS, Target, judge, status, told

MACHINE = Machine(cpu="a processor", cores=2, kernel="Linux 6", pinned=True, files=20_000)
PEERS = [name for name, adapter in ADAPTERS.items() if adapter.kind == "peer"]


def run(row: str, adapter: str, number: int, value: float, at: int = 0) -> Run:
    figures = Figures(**{ROWS[row].measure: value})
    return Run(row=row, adapter=adapter, loop="asyncio", at=at, round=number, figures=figures)


def results(*runs: Run) -> Results:
    return Results(python="CPython 3.11.0", machine=MACHINE, libraries={}, allocator={}, runs=list(runs))


def verdicts(found: Results, target: Target):
    return judge(found, [target.row], [target.loop], [target])


# Arithmetic.


def test_a_ratio_is_taken_within_a_round() -> None:
    """A machine that is slow for one round is slow for both, and the ratio of that round stays what it is."""
    found = results(
        *(run("call", "ours", number, value) for number, value in enumerate([90, 900, 95])),
        *(run("call", "plain", number, value) for number, value in enumerate([100, 1000, 100])),
    )
    each = [by_round(found, ROWS["call"], name, "asyncio") for name in ("ours", "plain")]
    assert ratios(*each) == [0.9, 0.9, 0.95]
    assert spread(ratios(*each)) == Spread(0.9, 0.9, pytest.approx(0.925), 3)


def test_a_round_that_only_one_of_two_has_counts_for_neither() -> None:
    """Peers are measured in fewer rounds; only those rounds are compared."""
    assert ratios({0: 10.0, 1: 99.0}, {0: 5.0}) == [2.0]
    assert ratios({1: 99.0}, {0: 5.0}) == []


def test_a_spread_of_nothing_is_nothing() -> None:
    """What was not measured has no median; what was measured once has no spread."""
    assert spread([]) is None
    assert spread([3.0]) == Spread(3.0, 3.0, 3.0, 1)


def test_growth_is_the_far_end_of_a_curve_over_the_near_one() -> None:
    """What lies between the two ends does not count, nor does a round that lacks one of them."""
    found = results(
        *(run("length", "ours", 0, value, at) for at, value in [(100, 9), (1000, 2), (10_000, 7), (100_000, 3)]),
        run("length", "ours", 1, 2, 1000),
    )
    assert growth(found, ROWS["length"], "ours", "asyncio") == {0: 1.5}
    assert growth(found, ROWS["call"], "ours", "asyncio") == {}


# Targets.


def test_a_target_is_judged_by_the_median() -> None:
    """One round beyond the bound is noise, a median beyond it is a miss."""
    target = Target(row="burst", kind="ratio", at_most=1.25)
    plain = [run("burst", "plain", number, 1) for number in range(3)]
    for values, met in [((1.0, 1.25, 9.0), True), ((1.0, 1.26, 1.27), False)]:
        found = results(*plain, *(run("burst", "ours", number, value) for number, value in enumerate(values)))
        (verdict,) = verdicts(found, target)
        assert verdict.met is met
        assert status([verdict]) == (0 if met else 1)
        assert told(verdict).endswith("pass" if met else "MISSED")


def test_a_target_of_each_kind_reads_its_own_figures() -> None:
    """A gain is the official client over ours, a growth is ours over that of the reference, an import is in itself."""
    found = results(
        run("call", "openai", 0, 1600),
        run("call", "ours", 0, 80),
        *(run("length", name, 0, value, 1000) for name, value in [("ours", 2), ("plain", 1)]),
        *(run("length", name, 0, value, 100_000) for name, value in [("ours", 2.2), ("plain", 1)]),
        run("import-beyond", "ours", 0, 11),
    )
    targets = [
        Target(row="call", kind="gain", at_least=16),
        Target(row="length", kind="growth", at_most=1.03),
        Target(row="length", kind="own growth", at_most=1.03),
        Target(row="import-beyond", kind="absolute", at_most=12),
    ]
    judged = [verdicts(found, target)[0] for target in targets]
    assert [verdict.found and round(verdict.found.median, 6) for verdict in judged] == [20, 1.1, 1.1, 11]
    assert [verdict.met for verdict in judged] == [True, False, False, True]


def test_what_was_not_measured_is_neither_reached_nor_missed() -> None:
    """Without the official client there is no ratio to it: 2, but 1 if something else was missed."""
    found = results(run("call", "ours", 0, 1), run("call", "plain", 0, 1))
    judged = judge(found, ["call"], ["asyncio"])
    assert [verdict.met for verdict in judged] == [False, None]
    assert status(judged) == 1
    assert status(judged[1:]) == 2
    assert told(judged[1]).endswith("NOT MEASURED")


def test_a_target_says_which_libraries_it_needs() -> None:
    """Who measures some libraries is not told that the others are missing."""
    asked = [target for target in TARGETS if not target.needs - {"ours", "plain"}]
    assert {target.kind for target in asked} == {"ratio", "growth", "own growth", "absolute"}
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
    """Libraries may take out a delta without text where that is known of them, and nothing else."""
    load_ = Load(concurrency=1, count=1, length=502, merged=1, port=0)
    check_count(501, load_)
    check_call(answers.ANSWER)
    for wrong in (500, 502):
        with pytest.raises(WrongAnswerError):
            check_count(wrong, load_)
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


@pytest.mark.parametrize("adapter", ["ours", "plain", "bare"])
@pytest.mark.parametrize("what", ["paced", "burst", "long"])
async def test_an_adapter_hands_out_what_the_server_sent(adapter: str, what: str) -> None:
    """Whether read in a hurry or text by text, and on one connection for all that follows another."""
    serving = Serving()
    async with serving as port:
        client = load(adapter)(f"http://127.0.0.1:{port}/{what}/250/v1")
        assert await client.call() == answers.ANSWER
        assert await client.stream() == 250
        check_texts([text async for text in client.texts()], 250)
        assert (serving.counts.connections, serving.counts.requests) == (1, 3)
        await client.close()


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


def test_a_table_has_a_line_for_each_row_and_the_spread() -> None:
    """Whoever reads a ratio reads how far its rounds lie apart; a column without figures is left out."""
    found = results(
        *(run("call", "ours", number, value) for number, value in enumerate([90.0, 95.0, 100.0])),
        *(run("call", "plain", number, 100.0) for number in range(3)),
        run("at-once-10000", "ours", 0, 4.321),
        run("at-once-10000", "plain", 0, 4.321),
    )
    text = report.main_table(found).replace("\u00a0", " ")
    assert "| one call, 64 at a time | asyncio | 95.0 µs | 100 µs | 0.950 (0.925 to 0.975) |" in text
    assert "4.32 s | 4.32 s | 1.00 (one round) |" in text
    assert "LiteLLM" not in text


def test_a_page_says_what_was_left_out() -> None:
    """A row that is missing is missing for a reason, which stands below."""
    found = msgspec.structs.replace(results(run("call", "ours", 0, 90.0)), left_out=["no uvloop"])
    assert report.page(found, []).endswith("Left out:\n\n- no uvloop\n")


def test_results_are_read_as_they_were_written() -> None:
    """Stored results can be judged and drawn again."""
    found = results(run("length", "ours", 1, 1.5, 1000), run("import", "plain", 0, 183.0))
    assert msgspec.json.decode(msgspec.json.encode(found), type=Results) == found


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
