"""The limit of a cluster, and its rows, without a cluster: processes are queues that send messages to one desk."""

import asyncio
import contextlib
import gc
import json
import logging
import pickle
import threading
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from virtual import demand, run

from chatkore_async import (
    APIConnectionError,
    AsyncChatKore,
    ConfigurationError,
    InvalidRequestError,
    MapResult,
    RateLimit,
    Report,
    RetryPolicy,
)
from chatkore_async.integrations._cluster_desk import LEASE, LISTEN, Desk
from chatkore_async.integrations._cluster_queue import LimiterLostError, RemoteLimiter, Unreachable
from chatkore_async.integrations._cluster_rows import COLUMNS, WHOLE, messages_of, row_of
from chatkore_async.integrations._cluster_worker import Key, Worker, check_client, check_params
from chatkore_async.testing import ChatKoreServer, completion, error
from chatkore_async.types import Usage

DONE = Report(
    status=200, headers={"set-cookie": "large", "x-ratelimit-remaining-requests": "1"}, usage=None, retry_after=None
)


def now() -> float:
    return asyncio.get_running_loop().time()


class Cluster:
    """A desk, and the processes that ask it. What travels is counted, and may be lost or come late."""

    def __init__(self, limit: RateLimit, **options: float) -> None:
        self.limit = limit
        self.options = options
        self.messages = 0
        self.sizes: list[int] = []
        self.trouble: Callable[[int], Awaitable[None]] | None = None  # before a message arrives
        self.loses_answers = False
        self.restart()

    def restart(self) -> None:
        self.desk = Desk(self.limit, **self.options)

    def process(self, reaches: Callable[[], bool] = lambda: True) -> RemoteLimiter:
        async def exchange(message: bytes) -> bytes:
            self.messages += 1
            self.sizes.append(len(message))
            if not reaches():
                await asyncio.get_running_loop().create_future()  # the process is dead: what it says is not heard
            if self.trouble is not None:
                await self.trouble(self.messages)
            desk = self.desk
            answer = await desk.exchange(message)
            if self.loses_answers or desk is not self.desk:
                raise Unreachable("the answer is lost")
            return answer

        return RemoteLimiter(self.limit, exchange)


async def attempt(
    limiter: RemoteLimiter, moments: list[float] | None = None, seconds: float = 0.0, **fields: Any
) -> None:
    permit = await limiter.acquire(demand(**fields))
    if moments is not None:
        moments.append(now())
    await asyncio.sleep(seconds)
    limiter.release(permit, DONE)


async def settled() -> None:
    """Let what is under way arrive."""
    await asyncio.sleep(1)


def test_a_limit_holds_over_all_processes_together() -> None:
    """Three processes send no more in a minute than one would, and each gets its part."""

    async def main() -> None:
        cluster = Cluster(RateLimit(requests_per_minute=600, adaptive=False))
        moments: list[list[float]] = [[], [], []]
        processes = [cluster.process() for _ in moments]
        await asyncio.gather(*(attempt(p, m) for p, m in zip(processes, moments, strict=True) for _ in range(100)))
        every = sorted(moment for each in moments for moment in each)
        assert 29 < every[-1] < 31
        assert all(sum(start <= each < start + 1 for each in every) <= 13 for start in every)
        assert all(abs(each[-1] - every[-1]) < 21 for each in moments)
        await settled()
        assert (cluster.desk.in_flight, cluster.desk.waiting) == (0, 0)

    run(main())


def test_attempts_in_flight_are_counted_over_all_processes() -> None:
    """`max_concurrency` is that of the cluster."""

    async def main() -> None:
        cluster = Cluster(RateLimit(max_concurrency=3, adaptive=False))
        in_flight = most = 0

        async def one(process: RemoteLimiter) -> None:
            nonlocal in_flight, most
            permit = await process.acquire(demand())
            in_flight += 1
            most = max(most, in_flight)
            await asyncio.sleep(1)
            in_flight -= 1
            process.release(permit, DONE)

        await asyncio.gather(*(one(process) for process in (cluster.process(), cluster.process()) for _ in range(10)))
        assert most == 3

    run(main())


def test_what_gathers_travels_together() -> None:
    """A process that makes thousands of attempts sends as few messages as the bound for all of them allows."""

    async def main() -> None:
        cluster = Cluster(RateLimit(), calls_per_second=100)
        processes = [cluster.process() for _ in range(10)]  # so each sends one in a tenth of a second

        async def worker(process: RemoteLimiter) -> None:
            for _ in range(100):
                await attempt(process, seconds=0.05)

        await asyncio.gather(*(worker(process) for process in processes for _ in range(20)))
        assert cluster.messages < 110 * now()
        assert cluster.messages < 20_000 / 10

    run(main())


def test_who_neither_waits_nor_holds_sends_nothing() -> None:
    """An idle process costs the limiter nothing, and is forgotten."""

    async def main() -> None:
        cluster = Cluster(RateLimit())
        process = cluster.process()
        await attempt(process)
        await settled()
        sent = cluster.messages
        await asyncio.sleep(10 * LEASE)
        assert cluster.messages == sent
        await attempt(cluster.process())
        assert "1 processes" in repr(cluster.desk)
        await attempt(process)  # which is taken in again

    run(main())


def test_no_body_and_no_key_travels() -> None:
    """Tokens are estimated where the request is; what is sent is some bytes."""

    async def main() -> None:
        cluster = Cluster(RateLimit(tokens_per_minute=1e9, adaptive=False))
        process = cluster.process()
        await attempt(process, body=b'{"messages":[{"content":"%s"}]}' % (b"hello " * 10_000))
        await settled()
        assert max(cluster.sizes) < 400

    run(main())


def test_tokens_are_spent_as_estimated_where_the_request_is() -> None:
    """An estimator of the caller's runs in the process that asks, and its number counts for all."""

    async def main() -> None:
        cluster = Cluster(RateLimit(tokens_per_minute=6000, adaptive=False, estimate=lambda _: 99.5))
        moments: list[float] = []
        processes = [cluster.process(), cluster.process()]
        await asyncio.gather(*(attempt(process, moments) for process in processes for _ in range(10)))
        assert 17 < max(moments) < 21  # a hundred a second, and a hundred each

    run(main())


@pytest.mark.parametrize("tokens", [-1, float("nan"), float("inf"), "many", None])
def test_an_estimate_that_is_no_number_is_an_error_of_the_caller(tokens: Any) -> None:
    """It is said where the estimator runs."""
    cluster = Cluster(RateLimit(tokens_per_minute=6000, estimate=lambda _: tokens))
    with pytest.raises(ConfigurationError, match="no number of tokens"):
        run(cluster.process().acquire(demand()))


def test_the_usage_of_an_answer_is_learned_from() -> None:
    """A report reaches the limiter: tokens that were not used are there for others."""

    async def main() -> None:
        cluster = Cluster(RateLimit(tokens_per_minute=60, adaptive=False, estimate=lambda _: 60))
        first, second = cluster.process(), cluster.process()
        permit = await first.acquire(demand())
        first.release(permit, Report(status=200, headers={}, usage=Usage(total_tokens=1), retry_after=None))
        await settled()
        await second.acquire(demand())
        assert now() < 5

    run(main())


# Cancelled.


def test_who_leaves_the_queue_leaves_no_hole() -> None:
    """The place of a cancelled call is taken by the next, in whichever process, and not a moment later."""

    async def main() -> None:
        cluster = Cluster(RateLimit(requests_per_minute=60, adaptive=False))
        first, second = cluster.process(), cluster.process()
        await attempt(first)
        leaving = [asyncio.ensure_future(first.acquire(demand())) for _ in range(10)]
        await asyncio.sleep(0.1)
        moments: list[float] = []
        staying = [asyncio.ensure_future(attempt(second, moments)) for _ in range(2)]
        await asyncio.sleep(0.1)
        for each in leaving:
            each.cancel()
        await asyncio.gather(*staying)
        assert 0.9 < moments[0] < 1.1
        assert 1.9 < moments[1] < 2.1
        await settled()
        assert (cluster.desk.in_flight, cluster.desk.waiting) == (0, 0)

    run(main())


@pytest.mark.parametrize("steps", range(12))
def test_a_permit_that_comes_for_who_has_left_goes_to_the_next(steps: int) -> None:
    """At whichever moment a call is cancelled, its permit is neither lost nor wasted on a rate of one in a minute."""

    async def main() -> None:
        cluster = Cluster(RateLimit(requests_per_minute=1, adaptive=False))

        async def late(_: int) -> None:
            for _ in range(3):
                await asyncio.sleep(0)

        cluster.trouble = late
        first, second = cluster.process(), cluster.process()
        leaving = asyncio.ensure_future(first.acquire(demand()))
        for _ in range(steps):
            await asyncio.sleep(0)
        moments: list[float] = []
        staying = asyncio.ensure_future(attempt(second, moments))
        for _ in range(steps):
            await asyncio.sleep(0)
        leaving.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            first.release(await leaving, DONE)
        await staying
        assert moments[0] < 61
        await settled()
        assert (cluster.desk.in_flight, cluster.desk.waiting) == (0, 0)

    run(main())


def test_a_granted_permit_that_nobody_takes_is_passed_on() -> None:
    """A call that is cancelled while its permit travels does not cost another a minute of waiting."""

    async def main() -> None:
        cluster = Cluster(RateLimit(requests_per_minute=1, adaptive=False))
        granted = asyncio.Event()

        async def exchange(message: bytes) -> bytes:
            answer = await cluster.desk.exchange(message)
            granted.set()
            await asyncio.sleep(1)
            return answer

        first, second = RemoteLimiter(cluster.limit, exchange), cluster.process()
        leaving = asyncio.ensure_future(first.acquire(demand()))
        await granted.wait()
        moments: list[float] = []
        staying = asyncio.ensure_future(attempt(second, moments))
        leaving.cancel()
        await staying
        assert moments[0] < 3
        await asyncio.sleep(5)
        assert (cluster.desk.in_flight, cluster.desk.waiting) == (0, 0)

    run(main())


def test_a_call_that_is_cancelled_before_it_asked_says_nothing() -> None:
    """Nothing is sent for who came and went in one step."""

    async def main() -> None:
        cluster = Cluster(RateLimit())
        task = asyncio.ensure_future(cluster.process().acquire(demand()))
        await asyncio.sleep(0)
        task.cancel()
        await settled()
        assert cluster.messages == 0

    run(main())


# Dead.


def test_what_a_dead_process_held_is_free_again() -> None:
    """Nobody waits for a process that was killed longer than the lease."""

    async def main() -> None:
        cluster = Cluster(RateLimit(max_concurrency=2, adaptive=False))
        alive = True
        dead, other = cluster.process(lambda: alive), cluster.process()
        for _ in range(2):
            await dead.acquire(demand())
        waits = [asyncio.ensure_future(dead.acquire(demand())) for _ in range(3)]
        await settled()
        alive = False
        began = now()
        await other.acquire(demand())
        assert now() - began < LEASE + 2 * LISTEN
        assert cluster.desk.waiting == 0
        for each in waits:
            each.cancel()

    run(main())


def test_a_process_that_is_at_work_for_hours_keeps_what_it_holds() -> None:
    """The lease is renewed by a message in some seconds, and by nothing else."""

    async def main() -> None:
        cluster = Cluster(RateLimit(max_concurrency=1, adaptive=False))
        process = cluster.process()
        await attempt(process, seconds=3600)
        assert cluster.messages < 3600 / LISTEN + 10

    run(main())


def test_a_process_that_was_taken_for_dead_goes_on(caplog: pytest.LogCaptureFixture) -> None:
    """One that stood still for minutes is taken in again with all who wait in it, and says so."""

    async def main() -> None:
        cluster = Cluster(RateLimit(max_concurrency=1, adaptive=False))
        stands_still = False

        async def trouble(_: int) -> None:
            if stands_still:
                await asyncio.sleep(3 * LEASE)

        process, other = cluster.process(), cluster.process()
        permit = await process.acquire(demand())
        waits = asyncio.ensure_future(process.acquire(demand()))
        await settled()
        stands_still, cluster.trouble = True, trouble
        await asyncio.sleep(2 * LEASE)
        cluster.trouble = None
        await attempt(other)
        second = await waits
        process.release(permit, DONE)  # which nobody counts any more
        process.release(second, DONE)
        await settled()
        assert cluster.desk.in_flight == 0

    with caplog.at_level(logging.WARNING, logger="chatkore_async"):
        run(main())
    assert "no longer counted: 1" in caplog.text


def test_a_limiter_that_is_started_anew_is_waited_for(caplog: pytest.LogCaptureFixture) -> None:
    """Calls wait until it is back, with one warning, and none of them is forgotten."""

    async def main() -> None:
        cluster = Cluster(RateLimit(max_concurrency=2, adaptive=False))

        async def trouble(_: int) -> None:
            raise Unreachable("it is started again")

        process = cluster.process()
        work = [asyncio.ensure_future(attempt(process, seconds=1)) for _ in range(10)]
        await asyncio.sleep(0.5)
        cluster.trouble = trouble
        cluster.restart()
        await asyncio.sleep(20)
        cluster.trouble = None
        await asyncio.gather(*work)
        await settled()
        assert (cluster.desk.in_flight, cluster.desk.waiting) == (0, 0)
        assert cluster.messages < 60

    with caplog.at_level(logging.WARNING, logger="chatkore_async"):
        run(main())
    assert caplog.text.count("cannot be reached") == 1


def test_an_answer_that_is_lost_is_given_again() -> None:
    """Messages may be heard and their answers lost: no permit is counted twice, and none is forgotten."""

    async def main() -> None:
        cluster = Cluster(RateLimit(max_concurrency=2, adaptive=False))
        cluster.loses_answers = True
        process = cluster.process()
        work = [asyncio.ensure_future(attempt(process, seconds=1)) for _ in range(6)]
        await asyncio.sleep(3)
        cluster.loses_answers = False
        await asyncio.gather(*work)
        await settled()
        assert (cluster.desk.in_flight, cluster.desk.waiting) == (0, 0)

    run(main())


def test_a_permit_that_is_told_of_twice_is_one() -> None:
    """A process that asked again for what it then got goes on holding it."""

    async def main() -> None:
        cluster = Cluster(RateLimit(max_concurrency=5))
        calls = 0

        async def exchange(message: bytes) -> bytes:
            nonlocal calls
            calls += 1
            if calls == 2:
                raise Unreachable("this once")
            answer = await cluster.desk.exchange(message)
            await asyncio.sleep(1)
            return answer

        process = RemoteLimiter(cluster.limit, exchange)
        first = asyncio.ensure_future(process.acquire(demand()))
        await asyncio.sleep(0.5)
        second = asyncio.ensure_future(process.acquire(demand()))
        permits = [await first, await second]
        await asyncio.sleep(5)
        assert cluster.desk.in_flight == 2
        for permit in permits:
            process.release(permit, DONE)
        await asyncio.sleep(5)
        assert cluster.desk.in_flight == 0

    run(main())


def test_messages_may_come_in_any_order() -> None:
    """Late ones and those that overtake others leave nothing behind."""

    async def main() -> None:
        cluster = Cluster(RateLimit(max_concurrency=3, requests_per_minute=6000))

        async def trouble(number: int) -> None:
            await asyncio.sleep(0.3 * (number * 7 % 5))

        cluster.trouble = trouble
        processes = [cluster.process() for _ in range(3)]
        work = [asyncio.ensure_future(attempt(processes[each % 3], seconds=0.1)) for each in range(60)]
        for number, task in enumerate(work):
            await asyncio.sleep(0.05)
            if number % 4 == 0:
                task.cancel()
        await asyncio.gather(*work, return_exceptions=True)
        assert sum(task.cancelled() for task in work) <= 15
        await asyncio.sleep(5)
        assert (cluster.desk.in_flight, cluster.desk.waiting) == (0, 0)

    run(main())


def test_a_limiter_that_is_gone_for_good_is_an_error() -> None:
    """Who waits is told, who comes later is told, and nothing is asked again."""

    async def main() -> None:
        cluster = Cluster(RateLimit(max_concurrency=1, adaptive=False))

        async def trouble(_: int) -> None:
            leaves.cancel()
            raise LimiterLostError("it was stopped")

        process = cluster.process()
        permit = await process.acquire(demand())
        waits = asyncio.ensure_future(process.acquire(demand()))
        leaves = asyncio.ensure_future(process.acquire(demand()))
        await settled()
        cluster.trouble = trouble
        with pytest.raises(LimiterLostError, match="it was stopped"):
            await waits
        sent = cluster.messages
        process.release(permit, DONE)
        with pytest.raises(LimiterLostError, match="it was stopped"):
            await process.acquire(demand())
        await settled()
        assert cluster.messages == sent

    run(main())


# Loops and threads.


def test_each_event_loop_has_a_queue_of_its_own() -> None:
    """One limiter serves several event loops of a process, one after another; what a closed one held comes back."""
    cluster = Cluster(RateLimit(max_concurrency=1))
    process = cluster.process()
    held: list[object] = []

    async def hold() -> None:
        held.append(await process.acquire(demand()))

    asyncio.run(hold())
    process.release(held[0], DONE)  # nobody hears it, and nobody complains
    cluster.restart()
    asyncio.run(asyncio.wait_for(attempt(process), 10))


async def test_a_permit_may_come_back_from_any_thread() -> None:
    """And at any moment: the collector ends streams whenever it likes."""
    cluster = Cluster(RateLimit(max_concurrency=1))
    process = cluster.process()
    for _ in range(20):
        permit = await asyncio.wait_for(process.acquire(demand()), 10)
        thread = threading.Thread(target=process.release, args=(permit, DONE))
        thread.start()
        thread.join()
    process.release("no permit", DONE)


def test_nothing_is_left_of_a_loop_that_ended(recwarn: pytest.WarningsRecorder) -> None:
    """A program may end in the midst of a message, without a word."""
    cluster = Cluster(RateLimit(max_concurrency=1))

    async def main() -> None:
        process = cluster.process()
        await process.acquire(demand())
        task = asyncio.ensure_future(process.acquire(demand()))
        await asyncio.sleep(0.05)
        assert not task.done()

    asyncio.run(main())
    gc.collect()
    assert [str(each.message) for each in recwarn] == []


# Rows.


@pytest.mark.parametrize(
    "cell,messages",
    [
        ("Why?", [{"role": "user", "content": "Why?"}]),
        ("[1, 2]", [{"role": "user", "content": "[1, 2]"}]),
        ("[]", [{"role": "user", "content": "[]"}]),
        ("", [{"role": "user", "content": ""}]),
        ('[{"role": "user", "content": null}]', [{"role": "user", "content": None}]),
        ('\n [ {"role": "user", "content": "a"}]', [{"role": "user", "content": "a"}]),
        (
            [{"role": "user", "content": "a", "name": None, "parts": [{"type": "text", "url": None}]}],
            [{"role": "user", "content": "a", "parts": [{"type": "text"}]}],
        ),
        ([None, "x"], [None, "x"]),
    ],
)
def test_a_cell_holds_messages_or_a_prompt(cell: object, messages: list[Any]) -> None:
    """JSON is taken as it is; what Arrow added to a list is taken out again."""
    assert messages_of(cell) == messages


@pytest.mark.parametrize("cell", [None, 3, {"role": "user"}, b"x", '[{"role": "us', '[{"a":' * 100_000])
def test_a_cell_that_holds_no_messages_is_an_error(cell: object) -> None:
    """What begins like JSON and is none was cut, and is not sent as a prompt."""
    with pytest.raises(InvalidRequestError, match="messages") as caught:
        messages_of(cell)
    assert len(str(caught.value)) < 200


def test_a_failure_that_never_reached_a_server_is_a_row() -> None:
    """Every column is there, of its type or null."""
    problem = APIConnectionError("no route to host")
    row = row_of(MapResult(index=0, request={}, error=problem), whole=True)
    assert row.keys() == {*COLUMNS, WHOLE}
    assert (row["error"], row["error_type"], row["completion"]) == (str(problem), "APIConnectionError", None)


async def answers(server: ChatKoreServer, cells: list[object], **options: Any) -> list[dict[str, Any]]:
    client = {"api_key": Key("sk-test"), "base_url": server.base_url, "retry": RetryPolicy(initial_delay=0)}
    worker = Worker({"model": "m"}, options.pop("concurrency", 4), whole=options.pop("whole", False), client=client)
    try:
        return await worker.answer(cells)
    finally:
        worker.close()


async def test_each_row_has_its_answer_or_its_error(server: ChatKoreServer) -> None:
    """Whatever goes wrong with a row, the others are answered, in their order."""

    def respond(request: Any) -> Any:
        text = request.json["messages"][0].get("content")
        return error(401, "no such key") if text == "bad" else completion(f"to {text}")

    server.respond_with(respond)
    rows = await answers(server, ["a", "bad", None, "b", [{"role": "user"}], [{"role": 5}]])
    assert [row["completion"] for row in rows[:4]] == ["to a", None, None, "to b"]
    assert [row["error_type"] for row in rows[:4]] == [None, "AuthenticationError", "InvalidRequestError", None]
    assert all(row.keys() == COLUMNS.keys() for row in rows)
    assert all(value is None or type(value) is COLUMNS[name] for row in rows for name, value in row.items())
    assert rows[0]["attempts"] == 1
    assert rows[0]["latency"] >= 0


async def test_the_whole_answer_may_be_had(server: ChatKoreServer) -> None:
    """With what the columns leave out, as the server sent it."""
    server.always(completion("yes", finish_reason="length"))
    rows = await answers(server, ["a", None], whole=True)
    assert json.loads(rows[0][WHOLE])["choices"][0]["message"]["content"] == "yes"
    assert rows[0]["finish_reason"] == "length"
    assert rows[1][WHOLE] is None


async def test_an_answer_without_usage_has_no_tokens(server: ChatKoreServer) -> None:
    """Null is not zero."""
    server.always(completion("yes", usage=None))
    [row] = await answers(server, ["a"])
    assert (row["prompt_tokens"], row["completion_tokens"]) == (None, None)


async def test_all_batches_of_an_actor_share_its_concurrency(server: ChatKoreServer) -> None:
    """Ray gives an actor several batches at once; no more calls are made for it."""
    in_flight = most = 0
    three = asyncio.Event()

    async def respond(_: Any) -> Any:
        nonlocal in_flight, most
        in_flight += 1
        most = max(most, in_flight)
        if in_flight == 3:
            three.set()
        await three.wait()
        in_flight -= 1
        return completion("yes")

    server.respond_with(respond)
    worker = Worker({"model": "m"}, 3, whole=False, client={"api_key": Key("sk"), "base_url": server.base_url})
    batches = await asyncio.gather(*(worker.answer(["a"] * 10) for _ in range(4)))
    worker.close()
    worker.close()
    assert [len(batch) for batch in batches] == [10] * 4
    assert most == 3


async def test_a_batch_that_is_cancelled_gives_its_places_back(server: ChatKoreServer) -> None:
    """An actor goes on after Ray cancelled a batch, with all that it may have in flight."""
    server.always(None)
    server.respond_with(lambda _: asyncio.sleep(3600))  # type: ignore[arg-type]
    worker = Worker({"model": "m"}, 2, whole=False, client={"api_key": Key("sk"), "base_url": server.base_url})
    batch = asyncio.ensure_future(worker.answer(["a"] * 10))
    await server.wait_for_requests(2)
    batch.cancel()
    with pytest.raises(asyncio.CancelledError):
        await batch
    server.respond_with(lambda _: completion("yes"))
    rows = await asyncio.wait_for(worker.answer(["a"] * 10), 30)
    worker.close()
    assert {row["completion"] for row in rows} == {"yes"}


async def test_what_is_no_row_is_an_error_of_the_job(server: ChatKoreServer) -> None:
    """When nothing can be sent, a job is not to end well with errors in all its rows."""

    class Lost:
        async def acquire(self, demand: object) -> object:
            raise LimiterLostError("it was stopped")

        def release(self, permit: object, report: object) -> None:
            raise AssertionError

    client = {"api_key": Key("sk"), "base_url": server.base_url, "rate_limit": Lost()}
    worker = Worker({"model": "m"}, 2, whole=False, client=client)
    with pytest.raises(LimiterLostError):
        await worker.answer(["a"] * 10)
    worker.close()
    assert server.request_count == 0


async def test_an_actor_ends_though_its_loop_stands_still(server: ChatKoreServer) -> None:
    """Whatever a caller's function does on the loop of a client, the process is not kept by it."""
    goes_on = threading.Event()
    worker = Worker({"model": "m"}, 2, whole=False, client={"api_key": goes_on.wait, "base_url": server.base_url})
    batch = asyncio.ensure_future(worker.answer(["a"]))
    await asyncio.sleep(0)
    worker.close(patience=0.05)
    goes_on.set()
    await asyncio.wait([batch], timeout=30)
    worker.close()


def test_a_client_that_cannot_be_made_is_an_error_of_the_start() -> None:
    """Without a key no actor starts."""
    before = threading.active_count()
    with pytest.raises(ConfigurationError, match="CHATKORE_API_KEY"):
        Worker({"model": "m"}, 2, whole=False, client={})
    assert threading.active_count() == before


def test_a_key_travels_and_is_not_shown() -> None:
    """It is in what is pickled, or no actor could have it, and nowhere else."""
    key = pickle.loads(pickle.dumps(Key("sk-secret")))
    assert key() == "sk-secret"
    assert "sk-secret" not in f"{key!r} {key} {[key]}"
    assert "sk-secret" not in repr(AsyncChatKore(api_key=key))


def test_parameters_are_checked_where_the_job_is_started() -> None:
    """A misspelt field is no error in a billion rows."""
    assert check_params("m", {"max_tokens": 5, "timeout": 3}) == {"model": "m", "max_tokens": 5, "timeout": 3}
    with pytest.raises(InvalidRequestError, match="temprature"):
        check_params("m", {"temprature": 1})


@pytest.mark.parametrize("name", ["api_key", "rate_limit"])
def test_a_key_or_a_limit_among_other_settings_is_refused(name: str) -> None:
    """It would be overlooked; and the key would be shown by whoever shows the settings."""
    with pytest.raises(ConfigurationError, match=name) as caught:
        check_client({"base_url": "https://host", name: "sk-secret"})
    assert "sk-secret" not in str(caught.value)
    assert check_client({"timeout": 5}) == {"timeout": 5}
