"""Lines of batch files and the plan made of them: values in, values out. And the files and the writer beneath."""

import asyncio
import errno
import fcntl
import json
import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chatkore_async import BatchError, ChatCompletion
from chatkore_async._batch_files import Input, Output
from chatkore_async._batch_lines import (
    BEGINNING,
    MAX_LINE,
    LineError,
    answer_line,
    failure_line,
    is_torn,
    name_mark,
    read_result,
    read_task,
    task_mark,
)
from chatkore_async._batch_plan import HANDFUL, Plan
from chatkore_async._batch_writer import Writer
from chatkore_async.errors import (
    APIConnectionError,
    APIError,
    APITimeoutError,
    BadRequestError,
    ChatKoreError,
    InternalServerError,
    InvalidRequestError,
    InvalidResponseError,
)

PATIENCE = 30.0
"""Seconds after which something hangs."""

MESSAGES = [{"role": "user", "content": "Hello"}]


def line(custom_id: object = "a", **body: Any) -> bytes:
    given = {
        "custom_id": custom_id,
        "method": "POST",
        "url": "/v1/chat/completions",
        "body": {"model": "m", "messages": MESSAGES, **body},
    }
    return json.dumps(given).encode()


def without(name: str) -> bytes:
    given = json.loads(line())
    del given[name]
    return json.dumps(given).encode()


def told(custom_id: str = "a", *, failed: bool = False, **body: Any) -> Any:
    task = read_task(line(custom_id, **body))
    error = InvalidRequestError("no")
    return read_result(failure_line(task.id, custom_id, error) if failed else answer(task))


def answer(task: Any) -> bytes:
    return answer_line(task.id, task.custom_id, ChatCompletion())


# Requests.


def test_a_request_is_what_create_takes() -> None:
    """Fields of the API by name, a vendor's in `extra_body`; a stream that is not wanted is left out."""
    task = read_task(line("x", stream=False, temperature=0.5, top_k=3, timeout=2))
    assert task.custom_id == "x"
    assert task.params == {
        "model": "m",
        "messages": MESSAGES,
        "temperature": 0.5,
        "extra_body": {"top_k": 3, "timeout": 2},
    }
    assert read_task(line()).params == {"model": "m", "messages": MESSAGES}


def test_a_request_has_the_same_id_in_each_run() -> None:
    """It depends on the name and on what is asked, not on the order of keys or on blanks."""
    id_of = {text: read_task(text).id for text in (line("a"), line("b"), line("a", seed=1), line("a", seed=2))}
    assert len(set(id_of.values())) == 4
    again = json.dumps(dict(reversed(json.loads(line("a")).items())), indent=1).replace("\n", " ").encode()
    assert read_task(again).id == id_of[line("a")]
    assert all(text.startswith("batch_req_") for text in id_of.values())


@pytest.mark.parametrize(
    "text,reason",
    [
        (b"", "not JSON"),
        (b"nonsense", "not JSON"),
        (line()[:-1], "not JSON"),
        (b'{"custom_id": "\xff"}', "not JSON"),
        (b"[1]", "$: expected `object`, got `array`"),
        (without("custom_id"), "$.custom_id: it is required"),
        (without("method"), "$.method: it is required"),
        (without("url"), "$.url: it is required"),
        (without("body"), "$.body: it is required"),
        (line(""), "$.custom_id: it is empty"),
        (line(7), "$.custom_id: expected `str`, got `int`"),
        (line().replace(b"POST", b"GET"), "$.method: invalid enum value 'GET'"),
        (line().replace(b"chat/completions", b"embeddings"), "$.url: invalid enum value '/v1/embeddings'"),
        (line(stream=True), "$.body.stream: a batch has whole completions"),
        (line(messages=[]), "$.body.messages: at least one message is required"),
        (line(messages=[{"content": "x"}]), "$.body.messages[0].role: it is required"),
        (line(model=None), "$.body.model: expected `str`, got `null`"),
        (line(temperature="hot"), "$.body.temperature: expected `float | null`, got `str`"),
    ],
)
def test_a_line_that_is_no_request(text: bytes, reason: str) -> None:
    """What is wrong is told with its path."""
    with pytest.raises(LineError) as caught:
        read_task(text)
    assert reason in str(caught.value)


def test_a_line_that_is_nested_too_deeply() -> None:
    """What no interpreter could hold is refused like anything else that is wrong."""
    for depth in (5000, 500_000):
        with pytest.raises(LineError):
            read_task(line().replace(b'"m"', b"[" * depth + b"]" * depth))


# Results.


@pytest.mark.parametrize(
    "error,code",
    [
        (APITimeoutError("late", phase="answer"), "request_timeout"),
        (APIConnectionError("gone"), "connection_error"),
        (InvalidResponseError("odd"), "invalid_response"),
        (InvalidRequestError("no"), "invalid_request"),
        (APIError("?"), "api_error"),
    ],
)
def test_a_failure_without_a_status(error: ChatKoreError, code: str) -> None:
    """It has no response, and an error with a code and a message."""
    written = json.loads(failure_line("batch_req_1", "a", error))
    assert written == {
        "id": "batch_req_1",
        "custom_id": "a",
        "response": None,
        "error": {"code": code, "message": str(error)},
    }


@pytest.mark.parametrize("body", [{"error": {"message": "no", "vendor": 1}}, "<html>", None, [1]])
def test_a_failure_with_a_status(body: object) -> None:
    """It has the response as it came; a body that is no object is put into the form of the API."""
    error = BadRequestError("no", status_code=400, code="c", body=body)
    written = json.loads(failure_line("batch_req_1", "a", error))
    assert written["error"] is None
    said = body if isinstance(body, dict) else {"error": {"message": "no", "type": None, "param": None, "code": "c"}}
    assert written["response"] == {"status_code": 400, "request_id": "", "body": said}


@pytest.mark.parametrize("code,shown", [("overloaded", "overloaded"), (None, "api_error")])
def test_an_error_inside_a_200(code: str | None, shown: str) -> None:
    """It has a response and an error: by the status alone, it would pass for an answer."""
    written = failure_line("batch_req_1", "a", InternalServerError("busy", status_code=200, code=code, body={}))
    assert json.loads(written)["response"]["status_code"] == 200
    assert json.loads(written)["error"]["code"] == shown
    assert read_result(written).failed


def test_results_are_found_by_their_request() -> None:
    """A line of ours stands for the whole request; one that somebody else wrote for its name alone."""
    task = read_task(line("a", seed=1))
    assert read_result(answer(task)).mark == task_mark(task)
    foreign = b'{"id": "batch_req_123", "custom_id": "a", "response": {"status_code": 200}}'
    assert read_result(foreign).mark == name_mark("a") != task_mark(task)
    assert read_result(foreign) == read_result(foreign + b"\r\n")


@pytest.mark.parametrize(
    "response,error,failed",
    [
        ({"status_code": 200}, None, False),
        ({"status_code": 201, "body": {}}, None, False),
        ({"status_code": 200}, {"code": "x"}, True),
        ({"status_code": 429}, None, True),
        (None, None, True),
        (None, {"code": "batch_expired"}, True),
    ],
)
def test_what_counts_as_a_failure(response: object, error: object, failed: bool) -> None:
    """An answer has a status of success, and no error."""
    text = json.dumps({"custom_id": "a", "response": response, "error": error}).encode()
    assert read_result(text).failed == failed


@pytest.mark.parametrize("text", [line(), b"{}", b"", b"\n", b'{"custom_id": "a"}', b'{"custom_id":1,"response":null}'])
def test_a_line_that_is_no_result(text: bytes) -> None:
    """A line of an input, or of anything else, is none."""
    with pytest.raises(LineError):
        read_result(text)


@given(st.text(min_size=1), st.recursive(st.none() | st.booleans() | st.text() | st.integers() | st.floats(), st.lists))
def test_whatever_is_written_can_be_read(custom_id: str, value: object) -> None:
    """Each line is one line of JSON, and tells whose it is."""
    body = {"error": {"message": value}}
    written = failure_line("batch_req_1", custom_id, BadRequestError("no", status_code=400, body=body))
    assert written.endswith(b"\n")
    assert written.count(b"\n") == 1
    assert written.startswith(BEGINNING)
    assert read_result(written).custom_id == custom_id
    assert read_result(written).failed


def test_half_a_surrogate_pair_does_not_spoil_a_line() -> None:
    """What UTF-8 cannot hold is replaced, wherever it stands: a line that cannot be read would stop every later run."""
    odd = "x\ud83d"
    error = BadRequestError(odd, status_code=400, body={"error": {odd: [odd, 1, None]}})
    written = failure_line("batch_req_1", "a", error)
    assert read_result(written).failed
    assert json.loads(written)["response"]["body"] == {"error": {"x?": ["x?", 1, None]}}


def test_a_torn_line_is_known_by_its_beginning() -> None:
    """Whatever of it was written, zeros after it, or nothing but zeros; not the end of another file."""
    whole = answer(read_task(line())).rstrip(b"\n")
    for cut in range(len(whole)):
        assert is_torn(whole[:cut])
        assert is_torn(whole[:cut] + b"\0\0\0")
    for other in (b"Dear diary", b"{}", b'{"id":"x', b"\0x", b'{"custom_id'):
        assert not is_torn(other)


# The plan.


def planned(results: list[Any], requests: list[bytes], **options: bool) -> Plan:
    plan = Plan(**{"retry_failed": False, **options})
    for number, result in enumerate(results, 1):
        plan.add_result(f"out {number}", result)
    for number, text in enumerate(requests, 1):
        plan.add_request(f"in {number}", text)
    return plan


def todo(plan: Plan) -> list[int]:
    plan.conclude()
    return [index for index in range(plan.total) if plan.is_todo(index)]


def test_what_has_no_line_is_to_do() -> None:
    """Answers and failures are done; with `retry_failed`, failures are not."""
    texts = [line(name) for name in "abcdefghij"]
    results = [told("b"), told("j", failed=True)]
    plan = planned(results, texts)
    assert (plan.total, plan.completed, plan.failed, plan.again) == (10, 1, 1, 0)
    assert not plan.has_strangers
    assert todo(plan) == [0, 2, 3, 4, 5, 6, 7, 8]
    plan = planned(results, texts, retry_failed=True)
    assert (plan.total, plan.completed, plan.failed, plan.again) == (10, 1, 0, 1)
    assert todo(plan) == [0, 2, 3, 4, 5, 6, 7, 8, 9]
    assert plan.faults == []


def test_faults_are_collected() -> None:
    """Names that come twice, in either file or with two lines, and lines that are none."""
    plan = planned([told("a"), told("a")], [line("b"), line("b"), b"x"])
    assert [fault.partition(": ")[0] for fault in plan.faults] == ["out 2", "in 2", "in 3"]
    assert not plan.gives_up
    for _ in range(HANDFUL):
        plan.add_request("in", b"x")
    assert plan.gives_up


def test_strangers_are_told_apart() -> None:
    """A name that the input lacks is another fault than a request that has changed."""
    results = [told("a"), told("b", seed=1), told("c", seed=1, failed=True), told("d")]
    plan = planned(results, [line(name) for name in "abc"])
    assert plan.has_strangers
    for number, result in enumerate(results, 1):
        plan.add_stranger(f"out {number}", result)
    assert [fault.partition(":")[0] for fault in plan.faults] == ["out 2", "out 3", "out 4"]
    assert "answered, and has another" in plan.faults[0]
    assert "failed, and has another" in plan.faults[1]
    assert "not in the input" in plan.faults[2]
    # A failure that is retried may have changed.
    plan = planned([told("c", seed=1, failed=True)], [line("c")], retry_failed=True)
    assert not plan.has_strangers
    assert todo(plan) == [0]


# The files.


class Endless(BytesIO):
    """A file with one line that is longer than any."""

    def readline(self, size: int | None = -1, /) -> bytes:
        return b"x" * (size or 0)


def test_a_line_without_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that is one endless line is refused before it fills the memory."""
    with pytest.raises(BatchError, match=f"line 1: it is longer than {MAX_LINE} bytes"):
        next(Input(Endless()).lines())


def test_a_file_that_is_replaced_while_it_is_opened(tmp_path: Path) -> None:
    """A run that got hold of a file which has no name any more is refused: its results would go nowhere."""

    class Late(Output):
        def __init__(self, path: Path, replace: Any) -> None:
            self._replace_it = replace
            super().__init__(path)

        def _claim(self) -> None:
            self._replace_it()
            super()._claim()

    path = tmp_path / "out.jsonl"
    for replace in (path.unlink, lambda: (path.unlink(), path.touch())):
        path.touch()
        holder = path.open("rb")  # or the system would give the new file the number of the old one
        with pytest.raises(BatchError, match="another run writes"):
            Late(path, replace)
        holder.close()


def test_a_place_that_has_no_locks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Where the system cannot lock, as on some network drives, it is said, and the run goes on."""

    def flock(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    output = Output(tmp_path / "out.jsonl")
    output.keep()
    output.close()
    assert "cannot be locked" in caplog.text
    assert (tmp_path / "out.jsonl").exists()


def test_a_lock_ends_with_its_file(tmp_path: Path) -> None:
    """The next run may begin as soon as the last one has ended."""
    for _ in range(2):
        output = Output(tmp_path / "out.jsonl")
        with pytest.raises(BatchError, match="another run"):
            Output(tmp_path / "out.jsonl")
        output.keep()
        output.close()


def test_the_mode_of_a_new_output_is_the_umasks(tmp_path: Path) -> None:
    """Who may read a new file is decided as everywhere."""
    before = os.umask(0o027)
    try:
        output = Output(tmp_path / "out.jsonl")
        assert output.status.st_mode & 0o777 == 0o640
        output.close()
    finally:
        os.umask(before)
    assert not (tmp_path / "out.jsonl").exists()


def test_what_another_run_left_of_a_rewriting_is_removed(tmp_path: Path) -> None:
    """A run that was killed while it replaced failures leaves a file, which the next such run does away with."""
    path = tmp_path / "out.jsonl"
    path.write_bytes(b"keep\ndrop\nkeep too\n")
    (tmp_path / ".out.jsonl.rewritten").write_bytes(b"left")
    output = Output(path)
    for _ in output.rewrite(lambda text: text.startswith(b"keep")):
        assert path.read_bytes() == b"keep\ndrop\nkeep too\n"  # until the end
    output.append(b"more\n")
    output.sync()
    output.close()
    assert path.read_bytes() == b"keep\nkeep too\nmore\n"
    assert [each.name for each in tmp_path.iterdir()] == ["out.jsonl"]


def test_a_rewriting_that_is_given_up(tmp_path: Path) -> None:
    """The output stays as it was, and nothing is left."""
    path = tmp_path / "out.jsonl"
    path.write_bytes(b"a\nb\n")
    output = Output(path)
    steps: Any = output.rewrite(lambda _: False)
    next(steps)
    steps.close()
    output.close()
    assert path.read_bytes() == b"a\nb\n"
    assert [each.name for each in tmp_path.iterdir()] == ["out.jsonl"]


# The writer.


class Disk:
    """A file that writes when the test lets it."""

    def __init__(self, *, broken: bool = False) -> None:
        self.writes: list[bytes] = []
        self.began = threading.Event()
        self.open = threading.Event()
        self._broken = broken

    def write(self, data: bytes) -> None:
        self.began.set()
        assert self.open.wait(PATIENCE)
        if self._broken:
            raise OSError(errno.ENOSPC, "No space left on device")
        self.writes.append(data)


@pytest.fixture
def files() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(1) as files:
        yield files


async def test_a_slow_disk_gets_many_lines_at_once(files: ThreadPoolExecutor) -> None:
    """While one write goes on, lines gather for the next; who adds too many waits."""
    disk = Disk()
    writer = Writer(files, disk.write, most=3)
    for text in (b"1", b"2", b"3"):
        writer.put(text)
        await writer.room()
    writer.put(b"4")
    waiting = asyncio.create_task(writer.room())
    await asyncio.to_thread(disk.began.wait, PATIENCE)
    assert not waiting.done()
    disk.open.set()
    async with asyncio.timeout(PATIENCE):
        await waiting
        await writer.flush()
        await writer.flush()
    writer.close()
    assert disk.writes == [b"1", b"234"]


async def test_a_disk_that_is_full(files: ThreadPoolExecutor) -> None:
    """Whoever waits, adds or closes after that is told."""
    disk = Disk(broken=True)
    writer = Writer(files, disk.write, most=2)
    for text in (b"1", b"2", b"3"):
        writer.put(text)
    waiting = asyncio.create_task(writer.room())
    await asyncio.to_thread(disk.began.wait, PATIENCE)
    disk.open.set()
    async with asyncio.timeout(PATIENCE):
        for each in (waiting, writer.room(), writer.flush()):
            with pytest.raises(OSError, match="No space"):
                await each
    writer.put(b"4")
    with pytest.raises(OSError, match="No space"):
        writer.close()
    assert disk.writes == []


async def test_closing_writes_what_waits(files: ThreadPoolExecutor) -> None:
    """Also when nobody awaits any more: after a cancellation, lines are written where they are."""
    disk = Disk()
    writer = Writer(files, disk.write, most=10)
    for text in (b"1", b"2", b"3"):
        writer.put(text)
    disk.open.set()
    writer.close()
    assert disk.writes == [b"1", b"23"]
    await asyncio.sleep(0)  # what the thread has to tell finds nothing left to do
    writer.close()
    assert disk.writes == [b"1", b"23"]
