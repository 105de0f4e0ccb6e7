"""Batches: requests from a file, results to a file, and on from where a run ended, however it ended.

The files are those of OpenAI's Batch API (https://platform.openai.com/docs/api-reference/batch): a line
`{"custom_id", "method", "url", "body"}` for each request, and `{"id", "custom_id", "response", "error"}` for each
result.
"""

import asyncio
import contextlib
import itertools
import os
from collections.abc import AsyncGenerator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

import msgspec

from ._batch_files import Input, Output, Source
from ._batch_lines import LineError, Task, answer_line, failure_line, is_torn, read_result, read_task
from ._batch_plan import Plan
from ._batch_writer import Writer
from ._fanout import MapResults, check_concurrency
from ._workers import MapResult, Requests
from .errors import BatchError, ChatKoreError, ConfigurationError

__all__ = ["BatchClient", "BatchSummary", "run_batch"]

_SLICE = 1000
"""Lines that are looked through at one go. A cancellation waits for that, which takes some hundredths of a second."""

_TASKS = 256
_BYTES = 2**20
"""Requests, and bytes of them, that are read at one go."""


class BatchSummary(msgspec.Struct, frozen=True, kw_only=True):
    """How a batch went, or how far it is.

    Attributes:
        total: requests in the input.
        completed: those with an answer in the output.
        failed: those with a failure there.
        resumed: how many of both were there before this run.
        prompt_tokens: what the answers of this run report as `usage`.
        completion_tokens: what the answers of this run report as `usage`.
        elapsed: seconds of this run, the look at both files included.
    """

    total: int
    completed: int
    failed: int
    resumed: int
    prompt_tokens: int = 0
    completion_tokens: int = 0
    elapsed: float = 0.0

    @property
    def done(self) -> int:
        """How many requests have a line in the output."""
        return self.completed + self.failed

    @property
    def ok(self) -> bool:
        """Whether every request has an answer."""
        return self.completed == self.total


class _Completions(Protocol):
    def map(self, requests: Requests, /, *, concurrency: int) -> MapResults: ...


class _Chat(Protocol):
    @property
    def completions(self) -> _Completions: ...


class BatchClient(Protocol):
    """What `run_batch` needs of a client."""

    @property
    def chat(self) -> _Chat:
        """Its `completions` have `map`."""
        ...


async def run_batch(
    client: BatchClient,
    input: Source,  # noqa: A002 - the word for it
    output: str | os.PathLike[str],
    *,
    concurrency: int = 64,
    retry_failed: bool = False,
    on_progress: Callable[[BatchSummary], object] | None = None,
) -> BatchSummary:
    """Ask every request of a file, and write a line for each result as it comes.

    Run it again after it was stopped, killed or out of disk, and it asks only what has no line yet. A last line that
    was not written to its end is cut off; requests that were in flight are asked, and billed, again. Before the first
    request both files are looked through, and what is wrong is told with line numbers.

    A line's `response` is what was answered, an error status included; `error` is what went wrong without one, and
    stands beside a response only where the status of an error was 200. What is no result of a call (a client that is
    closed, a key callable that raises) stops the batch and is raised.

    Args:
        client: an `AsyncChatKore`. Its retries, timeouts and limits hold for each request.
        input: a path, or a binary file that can be sought, which is read from its beginning. Gzip is understood.
        output: a path. The file is locked meanwhile, so that no two runs write to it; not on Windows.
        concurrency: how many requests are asked at a time.
        retry_failed: whether to ask again what has failed before, and to replace its lines.
        on_progress: called with the summary so far: before the first request, after each, and when the run is
            cancelled, with what is then written.

    Raises:
        BatchError: lines of the input are malformed or have the same `custom_id`; the output has lines that are no
            results, answer what the input lacks or has otherwise now, or is written by another run; a file cannot be
            read or written; the input was changed while it was read.
        OSError: a result could not be written. What was written before is kept, and the batch can be gone on with.
        ConfigurationError: the concurrency is none, or the client is closed.
    """
    check_concurrency(concurrency)
    began = asyncio.get_running_loop().time()
    with (
        contextlib.closing(Input(input)) as source,
        contextlib.closing(Output(output)) as target,
        ThreadPoolExecutor(1, "chatkore batch") as files,  # joined before the files are closed
    ):
        if source.is_same_file(target.status):
            raise BatchError(f"{target.name} is the input: results need a file of their own")
        plan = Plan(retry_failed=retry_failed)
        await _in_slices(files, _prepare(source, target, plan))
        target.keep()
        run = _Run(plan, began, on_progress)
        writer = Writer(files, target.append, most=concurrency)
        try:
            requests = _requests(files, _slices(source, plan))
            async with client.chat.completions.map(requests, concurrency=concurrency) as results:
                await run.write(results, writer)
            await writer.flush()
        finally:
            writer.close()
        await asyncio.get_running_loop().run_in_executor(files, target.sync)
        return run.summary()


class _Run:
    """Counts what comes, and turns it into lines."""

    def __init__(self, plan: Plan, began: float, on_progress: Callable[[BatchSummary], object] | None) -> None:
        self._total = plan.total
        self._completed = plan.completed
        self._failed = plan.failed
        self._resumed = plan.completed + plan.failed
        self._prompt_tokens = self._completion_tokens = 0
        self._began = began
        self._on_progress = on_progress

    def summary(self) -> BatchSummary:
        return BatchSummary(
            total=self._total,
            completed=self._completed,
            failed=self._failed,
            resumed=self._resumed,
            prompt_tokens=self._prompt_tokens,
            completion_tokens=self._completion_tokens,
            elapsed=asyncio.get_running_loop().time() - self._began,
        )

    async def write(self, results: MapResults, writer: Writer) -> None:
        self._report()
        try:
            async for result in results:
                _check(result)
                writer.put(self._line(result))
                self._report()
                await writer.room()
        except BaseException as stopped:
            # What is finished is billed: it is written, whatever the reason to stop.
            for result in filter(_is_line, results.ready()):
                writer.put(self._line(result))
            if isinstance(stopped, asyncio.CancelledError):  # and not what the caller's own function raised
                self._report()
            raise

    def _line(self, result: MapResult) -> bytes:
        custom_id, task_id = result.key
        if result.completion is None:
            assert isinstance(result.error, ChatKoreError)
            self._failed += 1
            return failure_line(task_id, custom_id, result.error)
        self._completed += 1
        if (usage := result.completion.usage) is not None:
            self._prompt_tokens += usage.prompt_tokens
            self._completion_tokens += usage.completion_tokens
        return answer_line(task_id, custom_id, result.completion)

    def _report(self) -> None:
        if self._on_progress is not None:
            self._on_progress(self.summary())


def _is_line(result: MapResult) -> bool:
    """Tell what became of a request from what hinders all of them: a closed client, a key that cannot be had."""
    return result.ok or (isinstance(result.error, ChatKoreError) and not isinstance(result.error, ConfigurationError))


def _check(result: MapResult) -> None:
    if result.error is not None and not _is_line(result):
        raise result.error


def _prepare(source: Input, target: Output, plan: Plan) -> Iterator[None]:
    """Look through both files, and make the output ready to be appended to. A generator: each step is a line."""
    tail = b""
    for number, line in target.lines():
        tail = b"" if line.endswith(b"\n") else line
        try:
            plan.add_result(f"{target.name}, line {number}", read_result(line))
        except LineError as error:
            if not (tail and is_torn(tail)):
                plan.faults.append(f"{target.name}, line {number} is no result: {error}")
        if plan.gives_up:
            break
        yield
    for number, line in () if plan.gives_up else source.lines():
        plan.add_request(f"{source.name}, line {number}", line)
        if plan.gives_up:
            break
        yield
    if plan.has_strangers and not plan.faults:
        yield from _strangers(target, plan)
    if plan.faults:
        count = "at least " * plan.gives_up + str(len(plan.faults))
        message = f"the batch cannot be run, for {count} reason{'s' * (len(plan.faults) > 1)}: {plan.faults[0]}"
        raise BatchError(message, faults=tuple(plan.faults))
    plan.conclude()
    if tail:
        target.mend(tail)
    if plan.again:
        yield from target.rewrite(lambda line: not plan.drops(read_result(line)))


def _strangers(target: Output, plan: Plan) -> Iterator[None]:
    for number, line in target.lines():
        with contextlib.suppress(LineError):  # the torn one
            plan.add_stranger(f"{target.name}, line {number}", read_result(line))
        if plan.gives_up:
            return
        yield


def _slices(source: Input, plan: Plan) -> Iterator[list[Task]]:
    """Yield what is to be asked, some requests at a time; now and then none, where many are done."""
    tasks: list[Task] = []
    size = 0
    for index, (number, line) in enumerate(source.lines()):
        if index >= plan.total:
            break  # it grew, which the check tells
        if plan.is_todo(index):
            try:
                tasks.append(read_task(line))
            except LineError as error:
                source.check()
                raise BatchError(f"{source.name}, line {number}: {error}") from error
            size += len(line)
        if len(tasks) >= _TASKS or size >= _BYTES or not (index + 1) % _SLICE:
            source.check()
            yield tasks
            tasks, size = [], 0
    source.check()
    yield tasks


async def _in_slices(files: ThreadPoolExecutor, steps: Iterator[None]) -> None:
    """Take all steps in the thread, in portions that a cancellation can wait for."""

    def some() -> bool:
        return sum(1 for _ in itertools.islice(steps, _SLICE)) == _SLICE

    while await asyncio.get_running_loop().run_in_executor(files, some):
        pass


async def _requests(
    files: ThreadPoolExecutor, slices: Iterator[list[Task]]
) -> AsyncGenerator[tuple[object, dict[str, Any]], None]:
    while (tasks := await asyncio.get_running_loop().run_in_executor(files, next, slices, None)) is not None:
        for task in tasks:
            yield (task.custom_id, task.id), task.params
