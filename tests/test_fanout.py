"""`map`: what is read and when, what comes out and in which order, how it fails, and how it is left."""

import asyncio
import collections
import contextlib
import gc
import pickle
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import pytest

from chatkore_async import (
    APITimeoutError,
    AsyncChatKore,
    BadRequestError,
    ChatCompletion,
    ChatCompletionRequest,
    ConfigurationError,
    InvalidRequestError,
    MapResult,
    MapResults,
)
from chatkore_async.testing import ChatKoreServer, RecordedRequest, Reply, completion, error
from chatkore_async.types import ChatCompletionMessage, Choice, UserMessage

PATIENCE = 20.0
"""Seconds after which something hangs."""


def ask(number: object, **more: Any) -> dict[str, Any]:
    return {"model": "m", "messages": [{"role": "user", "content": "Hello"}], "user": str(number), **more}


def asks(count: int) -> Iterator[dict[str, Any]]:
    return (ask(number) for number in range(count))


def echo(request: RecordedRequest) -> Reply:
    """Answer with the number of the request, and refuse those that ask for it."""
    user = request.json["user"]
    return error(400, f"no {user}") if request.json.get("seed") == 400 else completion(user)


class Gate:
    """Answer a request when the test says so."""

    def __init__(self, server: ChatKoreServer) -> None:
        self.arrived: list[str] = []
        self.left: list[str] = []
        self._events: collections.defaultdict[str, asyncio.Event] = collections.defaultdict(asyncio.Event)
        self._server = server
        server.respond_with(self._answer)

    async def _answer(self, request: RecordedRequest) -> Reply:
        user = request.json["user"]
        self.arrived.append(user)
        try:
            await self._events[user].wait()
        except asyncio.CancelledError:
            self.left.append(user)
            raise
        return echo(request)

    def open(self, *numbers: object) -> None:
        for number in numbers:
            self._events[str(number)].set()

    async def wait_for(self, count: int) -> None:
        await self._server.wait_for_requests(count, timeout=PATIENCE)


class Counted:
    """An iterator that counts what was read of it."""

    def __init__(self, source: Iterator[Any]) -> None:
        self.source = source
        self.read = 0

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        item = next(self.source)
        self.read += 1
        return item


async def slowly(source: Iterator[Any]) -> AsyncIterator[Any]:
    """An async iterable of the same."""
    for item in source:
        await asyncio.sleep(0)
        yield item


async def until(holds: Callable[[], object]) -> None:
    async with asyncio.timeout(PATIENCE):
        while not holds():  # noqa: ASYNC110 - not ours to signal
            await asyncio.sleep(0)


async def settled() -> None:
    """Let everything happen that needs no network and no time."""
    for _ in range(50):
        await asyncio.sleep(0)


def our_tasks() -> list[asyncio.Task[Any]]:
    return [task for task in asyncio.all_tasks() if task.get_name().startswith("chatkore map")]


async def nothing_left(client: AsyncChatKore, server: ChatKoreServer) -> None:
    """No task of ours, no place taken, and no request that is still being answered."""
    await until(lambda: not (our_tasks() or client.pool.in_use or any(each.running for each in server.connections)))
    assert client.pool.waiting == 0


def saying(text: str) -> ChatCompletion:
    return ChatCompletion(choices=[Choice(message=ChatCompletionMessage(content=text))])


def as_given(kind: str, source: Iterator[Any]) -> Any:
    return source if kind == "iterable" else slowly(source)


both_kinds = pytest.mark.parametrize("kind", ["iterable", "async iterable"])


# What comes out.


@both_kinds
@pytest.mark.parametrize("concurrency", [1, 3, 64])
@pytest.mark.parametrize("ordered", [False, True])
async def test_every_request_has_one_result(
    client: AsyncChatKore, server: ChatKoreServer, kind: str, concurrency: int, ordered: bool
) -> None:
    """Each request is asked once and answered once, whatever the iterable, the concurrency and the order."""
    server.respond_with(echo)
    requests = as_given(kind, asks(200))
    async with client.chat.completions.map(requests, concurrency=concurrency, ordered=ordered) as results:
        got = [result async for result in results]
        assert our_tasks() == []
    assert sorted(result.index for result in got) == list(range(200))
    assert all(result.ok and result.completion.text == str(result.index) for result in got)
    assert server.request_count == 200
    if ordered:
        assert [result.index for result in got] == list(range(200))
    await nothing_left(client, server)


@both_kinds
async def test_no_requests_no_results(client: AsyncChatKore, kind: str) -> None:
    """An empty input is no error."""
    assert [result async for result in client.chat.completions.map(as_given(kind, iter(())))] == []
    assert our_tasks() == []


async def test_requests_may_be_structs_dicts_or_pairs(client: AsyncChatKore, server: ChatKoreServer) -> None:
    """A result has its request as it was given and the key that came with it; a dict may hold options of the call."""
    server.respond_with(echo)
    struct = ChatCompletionRequest(model="m", messages=[UserMessage(content="Hello")], user="struct")
    given = [struct, ask("dict", stream=False, extra_headers={"x-tenant": "a"}), (("a", 1), struct), ("b", ask("pair"))]
    results = [result async for result in client.chat.completions.map(given, ordered=True)]
    assert [result.completion.text for result in results] == ["struct", "dict", "struct", "pair"]
    assert [result.key for result in results] == [None, None, ("a", 1), "b"]
    assert results[0].request is results[2].request is struct
    assert results[1].request is given[1]
    assert results[3].request is given[3][1]
    assert "x-tenant" in next(each for each in server.requests if each.json["user"] == "dict").headers
    assert given[1]["stream"] is False  # the caller's dict is not touched


async def test_results_come_as_they_are_finished(client: AsyncChatKore, server: ChatKoreServer) -> None:
    """Without an order, a slow request holds back nobody."""
    gate = Gate(server)
    async with client.chat.completions.map(asks(3), concurrency=3) as results:
        await gate.wait_for(3)
        for number in (2, 0, 1):
            gate.open(number)
            assert (await anext(results)).index == number


async def test_in_order_a_slow_request_holds_back_those_behind_it(
    client: AsyncChatKore, server: ChatKoreServer
) -> None:
    """With an order, results wait for their turn, and what waits counts as read and not taken."""
    gate = Gate(server)
    source = Counted(asks(10))
    async with client.chat.completions.map(source, concurrency=3, ordered=True) as results:
        gate.open(*range(1, 10))
        first = asyncio.ensure_future(anext(results))
        await gate.wait_for(3)
        await settled()
        assert not first.done()
        assert source.read == 3
        gate.open(0)
        assert [(await first).index, *[result.index async for result in results]] == list(range(10))


def test_a_result_tells_its_story_in_a_line() -> None:
    """The repr names the request and what became of it, and is short however long the answer is."""
    assert repr(MapResult(index=3, request={}, completion=saying("Hi\n"))) == "<MapResult 3 ok 'Hi\\n'>"
    assert repr(MapResult(index=4, key="k", request={}, error=ValueError("no"))) == "<MapResult 4 'k' ValueError: no>"
    assert len(repr(MapResult(index=5, request={}, completion=saying("x" * 500)))) < 100


def test_a_result_is_a_value() -> None:
    """Results can be sent to another process, errors and answers included, and cannot be changed."""
    for result in (
        MapResult(index=1, key="k", request=ask(1), completion=saying("Hi")),
        MapResult(index=2, request=ask(2), error=InvalidRequestError("no", path="$.n")),
    ):
        again = pickle.loads(pickle.dumps(result))
        assert (again.index, again.key, again.request) == (result.index, result.key, result.request)
        assert again.completion == result.completion
        assert repr(again.error) == repr(result.error)
        with pytest.raises(AttributeError):
            result.index = 7


async def test_the_state_is_in_the_repr(client: AsyncChatKore, server: ChatKoreServer) -> None:
    """Whoever prints it sees how far it is."""
    gate = Gate(server)
    results = client.chat.completions.map(asks(5), concurrency=2)
    assert repr(results) == "<MapResults not begun: 0 read, 0 in flight, 0 taken>"
    async with results:
        gate.open(0)
        await anext(results)
        await gate.wait_for(3)
        assert repr(results) == "<MapResults running: 3 read, 2 in flight, 1 taken>"
    assert repr(results).startswith("<MapResults ended: ")


# What is read, and when.


@both_kinds
@pytest.mark.parametrize("concurrency", [1, 2, 7])
async def test_never_more_ahead_than_the_concurrency(
    client: AsyncChatKore, server: ChatKoreServer, kind: str, concurrency: int
) -> None:
    """A request is read only when fewer than `concurrency` are read and not taken."""
    server.respond_with(echo)
    taken = read = 0
    ahead = []

    def source() -> Iterator[Any]:
        nonlocal read
        for number in range(50):
            ahead.append(read - taken)
            read += 1
            yield ask(number)

    # The iterator of an async iterable here reads one item when it is asked for one.
    async for _ in client.chat.completions.map(as_given(kind, source()), concurrency=concurrency):
        taken += 1
        if taken % 10 == 0:
            await settled()
    assert max(ahead) == concurrency - 1


@both_kinds
async def test_a_consumer_that_stops_reading_stops_the_reading(
    client: AsyncChatKore, server: ChatKoreServer, kind: str
) -> None:
    """While nobody takes results, what was read is answered, and nothing more is read."""
    server.respond_with(echo)
    source = Counted(asks(40))
    async with client.chat.completions.map(as_given(kind, source), concurrency=5) as results:
        await server.wait_for_requests(5)
        await settled()
        assert source.read == 5
        await anext(results)
        await server.wait_for_requests(6)
        await settled()
        assert source.read == 6
    assert server.request_count == 6


async def test_an_iterable_that_computes_blocks_the_loop_once_a_request(
    client: AsyncChatKore, server: ChatKoreServer
) -> None:
    """The first requests are not all read at one go: between two of them, other tasks have their turn."""
    server.respond_with(echo)
    loop = asyncio.get_running_loop()
    turns = 0
    seen = []

    def source() -> Iterator[Any]:
        for number in range(20):
            seen.append(turns)
            until = loop.time() + 0.002
            while loop.time() < until:
                pass
            yield ask(number)

    async def tick() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    ticking = asyncio.create_task(tick())
    async with client.chat.completions.map(source(), concurrency=20) as results:
        assert len([result async for result in results]) == 20
    ticking.cancel()
    assert len(set(seen)) == 20


async def test_a_slow_async_iterable_holds_back_no_result(client: AsyncChatKore, server: ChatKoreServer) -> None:
    """What is finished is handed out while the next request is still waited for."""
    server.respond_with(echo)
    more = asyncio.Event()

    async def source() -> AsyncIterator[Any]:
        yield ask(0)
        await more.wait()
        yield ask(1)

    async with client.chat.completions.map(source(), concurrency=10) as results:
        assert (await anext(results)).index == 0
        more.set()
        assert [result.index async for result in results] == [1]


async def test_memory_is_bounded_by_the_concurrency(client: AsyncChatKore, server: ChatKoreServer) -> None:
    """However many requests there are, no more of them are alive than are read ahead."""
    asyncio.get_running_loop().set_debug(False)  # which keeps tracebacks
    server.respond_with(echo)
    alive = most = 0

    class Request(dict[str, Any]):
        def __init__(self, number: int) -> None:
            nonlocal alive, most
            super().__init__(ask(number))
            alive += 1
            most = max(most, alive)

        def __del__(self) -> None:
            nonlocal alive
            alive -= 1

    async with client.chat.completions.map(map(Request, range(500)), concurrency=4) as results:
        async for result in results:
            assert result.ok
            del result
        assert most <= 4 + 4  # beside those that are read ahead, a worker that idles may hold its last one
        assert alive == 0


async def test_what_is_ready_can_be_taken_at_once(client: AsyncChatKore, server: ChatKoreServer) -> None:
    """`ready` gives what is finished and waits for nothing; it lets the reading go on like any other step."""
    gate = Gate(server)
    results = client.chat.completions.map(asks(6), concurrency=3)
    assert results.ready() == []
    async with results:
        gate.open(0, 2)
        await until(lambda: len(results._work.finished) == 2)
        assert {result.index for result in results.ready()} == {0, 2}
        assert results.ready() == []
        await gate.wait_for(5)
        gate.open(4)
        await until(lambda: results._work.finished)
    assert results.ready() == []


# Failures.


@both_kinds
async def test_failures_have_their_place(client: AsyncChatKore, server: ChatKoreServer, kind: str) -> None:
    """A call that fails, and a request that cannot be sent, are results with an error; the others are answered."""
    server.respond_with(echo)
    given = [
        ask(0),
        ask(1, seed=400),
        ask(2, temperature=float("nan")),
        ("key", ask(3, stream=True)),
        "Hello",
        ask(5, temprature=1),
        {"model": "m"},
        {1: 2},
        ask(8, timeout=-1),
        ask(9),
    ]
    results = [result async for result in client.chat.completions.map(as_given(kind, iter(given)), ordered=True)]
    assert [result.ok for result in results] == [True, *[False] * 8, True]
    assert [type(result.error) for result in results[1:9]] == [
        BadRequestError,
        InvalidRequestError,
        InvalidRequestError,
        InvalidRequestError,
        TypeError,
        InvalidRequestError,
        TypeError,
        ConfigurationError,
    ]
    assert [getattr(results[at].error, "path", None) for at in (2, 3, 4, 6)] == [
        "$.temperature",
        "$.stream",
        "$",
        "$.messages",
    ]
    assert results[3].key == "key"
    assert all(result.completion is None for result in results[1:9])
    assert "extra_body" in str(results[5].error)
    assert results[4].request == "Hello"


@both_kinds
@pytest.mark.parametrize("ordered", [False, True])
async def test_the_first_failure_is_raised_after_what_is_finished(
    client: AsyncChatKore, server: ChatKoreServer, kind: str, ordered: bool
) -> None:
    """With `on_error="raise"` the rest is cancelled at once, what is finished comes first, and then the error."""
    gate = Gate(server)
    requests = as_given(kind, (("four", ask(4, seed=400)) if number == 4 else ask(number) for number in range(99)))
    got = []
    results = client.chat.completions.map(requests, concurrency=6, ordered=ordered, on_error="raise")
    with pytest.raises(BadRequestError, match="no 4") as caught:
        async with results:
            await gate.wait_for(6)
            for done, number in enumerate((3, 1, 0, 4), 1):
                gate.open(number)
                await until(lambda done=done: results._work.open == 6 - done)
            async for result in results:
                got.append(result.index)  # noqa: PERF401 - it raises
    assert got == ([0, 1, 3] if ordered else [3, 1, 0])
    assert "request 4 ('four')" in caught.value.__notes__[0]
    assert server.request_count == 6
    await nothing_left(client, server)
    assert sorted(gate.left) == ["2", "5"]
    with pytest.raises(StopAsyncIteration):
        await anext(results)


async def test_a_request_that_cannot_be_sent_is_raised_too(client: AsyncChatKore, server: ChatKoreServer) -> None:
    """`on_error="raise"` makes no difference between failures."""
    with pytest.raises(InvalidRequestError) as caught:
        async for _ in client.chat.completions.map([ask(0, temperature=float("inf"))], on_error="raise"):
            pass
    assert caught.value.__notes__ == ["map: this was request 0"]
    await nothing_left(client, server)


async def test_the_cause_of_a_failure_is_kept() -> None:
    """The error is the call's own, with the foreign error behind it, whether returned or raised."""
    async with AsyncChatKore(api_key="k", base_url="http://127.0.0.1:9/v1", max_retries=0) as client:
        [result] = [result async for result in client.chat.completions.map([ask(0)])]
        assert isinstance(result.error.__cause__, OSError)
        with pytest.raises(type(result.error)) as caught:
            await anext(client.chat.completions.map([ask(0)], on_error="raise"))
        assert isinstance(caught.value.__cause__, OSError)


@both_kinds
@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize("on_error", ["return", "raise"])
@pytest.mark.parametrize("count", [0, 1, 10])
async def test_an_iterable_that_raises(  # noqa: PLR0917 - one each
    client: AsyncChatKore, server: ChatKoreServer, kind: str, ordered: bool, on_error: Any, count: int
) -> None:
    """Every request before it is answered; then what the iterable raised is raised as it is."""
    server.respond_with(echo)
    broken = LookupError("the database is gone")

    def source() -> Iterator[Any]:
        yield from asks(count)
        raise broken

    got = []
    requests = as_given(kind, source())
    with pytest.raises(LookupError) as caught:
        async for result in client.chat.completions.map(requests, concurrency=4, ordered=ordered, on_error=on_error):
            got.append(result.completion.text)  # noqa: PERF401
    assert caught.value is broken
    assert sorted(got, key=int) == [str(number) for number in range(count)]
    await nothing_left(client, server)


async def test_an_iterable_that_raises_lets_the_rest_fail(client: AsyncChatKore, server: ChatKoreServer) -> None:
    """With `on_error="raise"`, what happened first is raised: the iterable's error, not that of a request after it."""
    gate = Gate(server)

    def source() -> Iterator[Any]:
        yield ask(0, seed=400)
        yield ask(1)
        raise LookupError("gone")

    async with client.chat.completions.map(source(), on_error="raise") as results:
        await gate.wait_for(2)
        gate.open(0)
        with pytest.raises(LookupError):
            await anext(results)
    await nothing_left(client, server)


class Panic(BaseException):
    """What is not to be caught."""


@both_kinds
@pytest.mark.parametrize("count", [0, 3])
async def test_an_iterable_that_panics(client: AsyncChatKore, server: ChatKoreServer, kind: str, count: int) -> None:
    """What is no `Exception` ends everything at once, and reaches whoever reads the results."""
    server.respond_with(echo)

    def source() -> Iterator[Any]:
        yield from asks(count)
        raise Panic

    with pytest.raises(Panic):
        async for _ in client.chat.completions.map(as_given(kind, source()), concurrency=2):
            pass
    await nothing_left(client, server)


@both_kinds
def test_an_iterable_that_exits(kind: str) -> None:
    """`SystemExit`, as Ctrl-C, ends the program as it does anywhere."""

    def source() -> Iterator[Any]:
        raise SystemExit(7)
        yield

    async def main() -> None:
        async with AsyncChatKore(api_key="k", base_url="http://127.0.0.1:9/v1") as client:
            async for _ in client.chat.completions.map(as_given(kind, source())):
                pass

    with pytest.raises(SystemExit, match="7"):
        asyncio.run(main())


async def test_a_call_that_panics(server: ChatKoreServer) -> None:
    """A worker that dies of what is no `Exception` does not leave the consumer waiting."""

    def key() -> str:
        raise Panic

    async with AsyncChatKore(api_key=key, base_url=server.base_url) as client:
        with pytest.raises(Panic):
            async for _ in client.chat.completions.map(asks(10), concurrency=3):
                pass
        await nothing_left(client, server)


@pytest.mark.parametrize("idle", [False, True])
async def test_a_worker_that_a_stranger_cancels(client: AsyncChatKore, server: ChatKoreServer, idle: bool) -> None:
    """Whoever cancels a task of ours ends the whole, visibly: no result goes missing in silence."""
    gate = Gate(server)
    async with client.chat.completions.map(asks(10), concurrency=2) as results:
        await gate.wait_for(2)
        if idle:
            gate.open(0)
            await until(lambda: results._work.finished)
        for task in our_tasks():
            if idle == (task.get_name() == "chatkore map: worker 0"):
                task.cancel()
        with pytest.raises(asyncio.CancelledError, match="worker"):
            async for result in results:
                assert result.index == 0
    await nothing_left(client, server)


# Leaving.


class Closing:
    """Generators that tell when and where they are closed."""

    def __init__(self) -> None:
        self.task: asyncio.Task[Any] | None = None
        self.closed_by: asyncio.Task[Any] | None = None
        self.closed = False

    def iterable(self) -> Iterator[Any]:
        try:
            yield from asks(40)
        finally:
            self.closed = True

    async def async_iterable(self) -> AsyncIterator[Any]:
        self.task = asyncio.current_task()
        try:
            async with asyncio.timeout(PATIENCE):  # which complains when it is left in another task
                for request in asks(40):
                    yield request
        finally:
            await asyncio.sleep(0)
            self.closed_by = asyncio.current_task()
            self.closed = True

    def given(self, kind: str) -> Any:
        return self.iterable() if kind == "iterable" else self.async_iterable()


@both_kinds
@pytest.mark.parametrize("way", ["break", "raise", "close", "end"])
async def test_leaving_cancels_what_is_in_flight(
    client: AsyncChatKore, server: ChatKoreServer, kind: str, way: str
) -> None:
    """When the block is left, requests are cancelled, the generator is closed, and no task is left."""
    gate, source = Gate(server), Closing()
    results = client.chat.completions.map(source.given(kind), concurrency=4)
    gate.open(0)
    with contextlib.suppress(ZeroDivisionError):
        async with results:
            async for result in results:
                assert result.index == 0
                await gate.wait_for(5)
                if way == "raise":
                    raise ZeroDivisionError
                if way == "close":
                    await results.aclose()
                    await results.aclose()
                    assert source.closed
                    assert our_tasks() == []
                if way != "end":
                    break
                await results.aclose()
    assert source.closed
    assert source.closed_by is source.task
    assert our_tasks() == []
    assert client.pool.in_use == 0
    await nothing_left(client, server)
    assert sorted(gate.left) == ["1", "2", "3", "4"]
    assert [result async for result in results] == []


@both_kinds
async def test_a_loop_that_is_left_without_a_block(client: AsyncChatKore, server: ChatKoreServer, kind: str) -> None:
    """A bare `async for` that breaks cancels what is in flight when its results are collected."""
    gate, source = Gate(server), Closing()
    gate.open(0)
    async for _ in client.chat.completions.map(source.given(kind), concurrency=4):
        await gate.wait_for(5)
        break
    gc.collect()
    await nothing_left(client, server)
    assert source.closed
    assert sorted(gate.left) == ["1", "2", "3", "4"]


async def test_results_collected_in_another_thread(client: AsyncChatKore, server: ChatKoreServer) -> None:
    """The collector may run in any thread; what is in flight is cancelled in the loop's own."""
    gate = Gate(server)
    kept = [client.chat.completions.map(asks(10), concurrency=2)]
    async with asyncio.timeout(PATIENCE):
        gate.open(0)
        await anext(kept[0])
        await gate.wait_for(3)
    thread = threading.Thread(target=kept.clear)
    thread.start()
    thread.join()
    gc.collect()
    await nothing_left(client, server)
    assert sorted(gate.left) == ["1", "2"]


def test_results_that_outlive_their_loop() -> None:
    """Results that nobody finished end with their loop, and may be forgotten afterwards without a word."""

    async def main() -> MapResults:
        async with ChatKoreServer() as server, AsyncChatKore(api_key="k", base_url=server.base_url) as client:
            results = client.chat.completions.map(asks(10), concurrency=2)
            await anext(results)
            return results

    kept = [asyncio.run(main())]
    kept.clear()
    gc.collect()


def test_a_loop_that_is_closed_with_results_open() -> None:
    """A loop that is closed before its tasks have ended makes the collector of results say nothing."""
    loop = asyncio.new_event_loop()

    async def never(**_: Any) -> ChatCompletion:
        await loop.create_future()
        raise AssertionError

    results = MapResults(never, [ask(0)], concurrency=1, ordered=False, on_error="return")

    loop.run_until_complete(results.__aenter__())
    loop.run_until_complete(settled())
    tasks = asyncio.all_tasks(loop)
    loop.close()
    del results
    gc.collect()
    for task in tasks:
        task._log_destroy_pending = False


@both_kinds
async def test_closing_before_the_first_step(client: AsyncChatKore, server: ChatKoreServer, kind: str) -> None:
    """Results that nobody began read nothing, ask nothing and give nothing."""
    source = Counted(asks(3))
    results = client.chat.completions.map(as_given(kind, source))
    await results.aclose()
    async with results:
        assert [result async for result in results] == []
    assert source.read == server.request_count == 0


async def test_a_generator_that_raises_when_it_is_closed(
    client: AsyncChatKore, server: ChatKoreServer, caplog: pytest.LogCaptureFixture
) -> None:
    """Its error is logged: whoever leaves has an error of their own, or none."""
    server.respond_with(echo)

    def source() -> Iterator[Any]:
        try:
            yield from asks(40)
        finally:
            raise LookupError("cannot close")

    async with client.chat.completions.map(source(), concurrency=2) as results:
        await anext(results)
    assert "cannot close" in caplog.text
    await nothing_left(client, server)


async def test_an_async_generator_that_raises_when_it_is_closed(
    client: AsyncChatKore, server: ChatKoreServer, caplog: pytest.LogCaptureFixture
) -> None:
    """As with an ordinary one."""
    server.respond_with(echo)

    async def source() -> AsyncIterator[Any]:
        try:
            for request in asks(40):
                yield request
        finally:
            raise LookupError("cannot close")

    async with client.chat.completions.map(source(), concurrency=2) as results:
        await anext(results)
    assert "cannot close" in caplog.text
    await nothing_left(client, server)


async def test_an_async_iterable_that_ignores_its_cancellation(client: AsyncChatKore, server: ChatKoreServer) -> None:
    """What it gives after that is not asked, and leaving does not hang."""
    server.respond_with(echo)
    waiting = asyncio.Event()

    async def source() -> AsyncIterator[Any]:
        yield ask(0)
        try:
            waiting.set()
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            yield ask(1)

    async with asyncio.timeout(PATIENCE), client.chat.completions.map(source()) as results:
        await anext(results)
        await waiting.wait()
    assert server.request_count == 1
    await nothing_left(client, server)


async def test_other_iterators_are_left_open(client: AsyncChatKore, server: ChatKoreServer) -> None:
    """Only generators are closed: an iterator of another kind may be read on by its owner."""
    server.respond_with(echo)
    source = Counted(asks(10))
    async with client.chat.completions.map(source, concurrency=2) as results:
        await anext(results)
    assert next(source)["user"] == str(source.read - 1)


async def test_other_async_iterators_are_left_open(client: AsyncChatKore, server: ChatKoreServer) -> None:
    """As with ordinary ones: a queue, say, whose next reader goes on where this one ended."""
    server.respond_with(echo)

    class Source:
        read = 0

        def __aiter__(self) -> "Source":
            return self

        async def __anext__(self) -> dict[str, Any]:
            self.read += 1
            return ask(self.read)

    source = Source()
    async with client.chat.completions.map(source, concurrency=2) as results:
        await anext(results)
    assert (await anext(source))["user"] == str(source.read)
    await nothing_left(client, server)


async def test_a_call_that_leaves(server: ChatKoreServer) -> None:
    """A callable of the caller's may close the results out of the midst of a call; nobody waits for themselves."""
    results: MapResults

    async def key() -> str:
        await results.aclose()
        return "key"

    async with AsyncChatKore(api_key=key, base_url=server.base_url) as client:
        results = client.chat.completions.map(asks(10), concurrency=3)
        async with asyncio.timeout(PATIENCE):
            assert [result async for result in results] == []
        await nothing_left(client, server)


# Cancellation.


async def consume(client: AsyncChatKore, source: Closing, kind: str, style: str, got: list[int]) -> None:
    requests = source.given(kind)
    if style == "block":
        async with client.chat.completions.map(requests, concurrency=3) as results:
            async for result in results:
                got.append(result.index)  # noqa: PERF401 - it is cancelled
    else:
        async for result in client.chat.completions.map(requests, concurrency=3):
            got.append(result.index)  # noqa: PERF401


@both_kinds
@pytest.mark.parametrize("style", ["block", "bare"])
@pytest.mark.parametrize("again", [False, True])
async def test_cancelled_at_every_await(
    client: AsyncChatKore, server: ChatKoreServer, kind: str, style: str, again: bool
) -> None:
    """Wherever a consumer is cancelled, once or at every await that follows, no task and no request is left behind."""
    asyncio.get_running_loop().set_debug(False)
    server.respond_with(lambda request: completion("x"))
    turns = finished = 0
    while finished < 40:
        turns += 1 + turns // 10
        source, got = Closing(), []
        task = asyncio.create_task(consume(client, source, kind, style, got))
        for _ in range(turns):
            if task.done():
                break
            await asyncio.sleep(0)
        task.cancel()
        while again and not task.done():
            await asyncio.sleep(0)
            task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
        del task
        if style == "block" and not again:
            assert our_tasks() == []
        gc.collect()
        await nothing_left(client, server)
        finished = len(got)
        assert source.closed or finished == 0
    assert turns > 50


async def test_a_timeout_around_a_step_loses_nothing(client: AsyncChatKore, server: ChatKoreServer) -> None:
    """In a block, a step may be cancelled and tried again; every result comes, and an error is not swallowed."""
    gate = Gate(server)

    def source() -> Iterator[Any]:
        yield from asks(3)
        raise LookupError("gone")

    got = []
    async with client.chat.completions.map(source(), concurrency=9) as results:
        await gate.wait_for(3)
        for number in (1, 0, 2, None):
            step = asyncio.ensure_future(anext(results))
            await asyncio.sleep(0)
            step.cancel()
            with pytest.raises(asyncio.CancelledError):
                await step
            if number is not None:
                gate.open(number)
                got.append((await anext(results)).index)
    assert got == [1, 0, 2]


async def test_a_step_cancelled_at_the_end_keeps_the_failure(client: AsyncChatKore, server: ChatKoreServer) -> None:
    """A step that is cancelled while it waits for the last tasks does not swallow what is to be raised."""
    async with client.chat.completions.map([ask(0, seed=400)], on_error="raise") as results:
        server.respond_with(echo)
        await until(lambda: results._work.failure)
        step = asyncio.ensure_future(anext(results))
        while not step.done():
            await asyncio.sleep(0)
            step.cancel()
        with pytest.raises((asyncio.CancelledError, BadRequestError)):
            await step
        if step.cancelled():
            with pytest.raises(BadRequestError):
                await anext(results)


async def test_a_consumer_with_a_deadline(client: AsyncChatKore, server: ChatKoreServer) -> None:
    """A deadline around the whole raises as usual, and cancels what is in flight."""
    gate = Gate(server)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.05), client.chat.completions.map(asks(9), concurrency=3) as results:
            async for _ in results:
                pytest.fail("nothing is answered")
    await nothing_left(client, server)
    assert len(gate.left) == len(gate.arrived) <= 3


async def test_a_call_with_a_deadline_of_its_own(client: AsyncChatKore, server: ChatKoreServer) -> None:
    """A timeout among the parameters is the one call's: it fails in its place, and the others go on."""
    gate = Gate(server)
    gate.open(1)
    requests = [ask(0, timeout=0.05), ask(1)]
    results = {result.index: result async for result in client.chat.completions.map(requests)}
    assert isinstance(results[0].error, APITimeoutError)
    assert results[1].ok


# How it is used.


async def test_it_is_read_by_one_task_at_a_time(client: AsyncChatKore, server: ChatKoreServer) -> None:
    """A second reader at the same time is a mistake, and is told so."""
    gate = Gate(server)
    async with client.chat.completions.map(asks(2)) as results:
        first = asyncio.ensure_future(anext(results))
        await gate.wait_for(2)
        with pytest.raises(RuntimeError, match="another task"):
            await anext(results)
        gate.open(0, 1)
        assert (await first).ok


@pytest.mark.parametrize("wrong", ["Hello", b"Hello", ask(0), 7, None, ChatCompletionRequest(model="m", messages=[])])
async def test_what_is_no_iterable_of_requests(client: AsyncChatKore, wrong: Any) -> None:
    """A single request, or nothing that can be iterated, is a `TypeError` at once."""
    with pytest.raises(TypeError, match="iterable of requests"):
        client.chat.completions.map(wrong)


@pytest.mark.parametrize("setting", [{"concurrency": each} for each in (0, -1, 1.5, True, "8", None)])
async def test_an_impossible_concurrency(client: AsyncChatKore, setting: dict[str, Any]) -> None:
    """The concurrency is a whole number from 1."""
    with pytest.raises(ConfigurationError, match="concurrency"):
        client.chat.completions.map([], **setting)


async def test_an_impossible_on_error(client: AsyncChatKore) -> None:
    """There are two ways to treat failures."""
    with pytest.raises(ConfigurationError, match="on_error"):
        client.chat.completions.map([], on_error="ignore")


@pytest.mark.skipif(not hasattr(asyncio, "eager_task_factory"), reason="Python has no eager tasks before 3.12")
@both_kinds
async def test_eager_tasks(client: AsyncChatKore, server: ChatKoreServer, kind: str) -> None:
    """A loop whose tasks begin at once changes nothing, failures before the first await included."""
    server.respond_with(echo)
    asyncio.get_running_loop().set_task_factory(asyncio.eager_task_factory)
    requests = as_given(kind, (ask(number, temperature=float("nan") if number == 7 else 0.5) for number in range(20)))
    results = [result async for result in client.chat.completions.map(requests, concurrency=3)]
    assert [result.index for result in results if not result.ok] == [7]
    assert len(results) == 20
    with pytest.raises(InvalidRequestError):
        async for _ in client.chat.completions.map([ask(0, temperature=float("nan"))], on_error="raise"):
            pass
    await nothing_left(client, server)


async def test_results_leave_no_garbage(client: AsyncChatKore, server: ChatKoreServer) -> None:
    """Results and their errors are freed by reference counting, not by the next collection."""
    server.respond_with(echo)
    given = [ask(0), {"model": "m"}]

    async def once() -> None:
        async for _ in client.chat.completions.map(given):
            pass
        with contextlib.suppress(InvalidRequestError):
            async for _ in client.chat.completions.map(given[1:], on_error="raise"):
                pass

    await once()
    await settled()
    gc.collect()
    gc.disable()
    try:
        kinds = ("MapResult", "MapResults", "Work", "InvalidRequestError")
        before = collections.Counter(type(thing).__name__ for thing in gc.get_objects())
        for _ in range(5):
            await once()
        await settled()
        after = collections.Counter(type(thing).__name__ for thing in gc.get_objects())
    finally:
        gc.enable()
    assert [(kind, after[kind] - before[kind]) for kind in kinds if after[kind] > before[kind]] == []
