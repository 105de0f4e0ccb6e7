"""On a local Ray: data sets, killed actors, and one limit for all of them.

It needs `pip install 'chatkore-async[ray]'`; without it the tests fail, and say so.
"""

import asyncio
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from chatkore_async import AsyncChatKore, ConfigurationError, Demand, InvalidRequestError, RateLimit, Report
from chatkore_async.testing import ChatKoreServer, completion, error

pytestmark = [
    pytest.mark.ray,
    # Ray's own, and those of what it uses.
    pytest.mark.filterwarnings("default"),
]

PATIENCE = 60.0
"""Seconds after which something that has to happen is taken not to happen. They bound failures only."""

KEY = "sk-known-to-nobody-else"
DONE = Report(status=200, headers={}, usage=None, retry_after=None)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Ray on this machine, with room for a few actors, and a folder of its own."""
    os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_DEDUP_LOGS": "0", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}
    import ray
    import ray.data

    here = Path(__file__).parent
    folder = tmp_path_factory.mktemp("ray")
    ray.init(
        num_cpus=2,
        include_dashboard=False,
        object_store_memory=100 * 2**20,
        log_to_driver=False,
        _temp_dir=str(folder) if len(str(folder)) < 40 else None,  # names of sockets are short
        runtime_env={"env_vars": {"PYTHONPATH": f"{here.parent}{os.pathsep}{here}"}},
    )
    ray.data.DataContext.get_current().enable_progress_bars = False
    yield ray
    ray.shutdown()


@contextmanager
def in_a_thread(server: ChatKoreServer) -> Iterator[ChatKoreServer]:
    """Run a server on a loop of its own: Ray blocks the thread that it is called from."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    try:
        asyncio.run_coroutine_threadsafe(server.start(), loop).result(PATIENCE)
        yield server
        asyncio.run_coroutine_threadsafe(server.close(), loop).result(PATIENCE)
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


@pytest.fixture
def relay() -> Iterator[ChatKoreServer]:
    with in_a_thread(ChatKoreServer()) as server:
        yield server


def text_of(request: Any) -> str:
    return str(request.json["messages"][-1]["content"])


def rows_of(ray: Any, count: int, blocks: int = 2) -> Any:
    rows = [{"id": number, "messages": [{"role": "user", "content": f"q{number}"}]} for number in range(count)]
    return ray.data.from_items(rows, override_num_blocks=blocks)


def run(dataset: Any, relay: ChatKoreServer, **options: Any) -> Any:
    from chatkore_async.integrations.ray import complete

    settings = {"model": "m", "actors": 2, "num_cpus": 0.5, "api_key": KEY, "client": {"base_url": relay.base_url}}
    return complete(dataset, **{**settings, **options})


def test_each_row_of_a_data_set_is_answered(cluster: Any, relay: ChatKoreServer) -> None:
    """Two actors share the work, the columns there were are kept, and nothing is asked twice."""
    relay.respond_with(lambda request: completion(f"to {text_of(request)}"))
    out = run(rows_of(cluster, 40), relay, concurrency=4).take_all()
    assert sorted((row["id"], row["completion"]) for row in out) == [(each, f"to q{each}") for each in range(40)]
    assert {row["error"] for row in out} == {None}
    assert relay.request_count == 40


@pytest.mark.parametrize("fails", [True, False])
def test_failed_rows_stay_rows(cluster: Any, relay: ChatKoreServer, fails: bool) -> None:
    """A block whose rows all fail has the columns of one whose rows all succeed, with the same types."""
    relay.respond_with(lambda _: error(400, "no such thing") if fails else completion("yes"))
    out = run(rows_of(cluster, 8), relay, prefix="a_").materialize()
    assert {row["a_error_type"] for row in out.take_all()} == {"BadRequestError" if fails else None}
    types = dict(zip(out.schema().names, map(str, out.schema().types), strict=True))
    assert types["a_completion"] == types["a_error"] == types["a_request_id"] == "large_string"
    assert types["a_prompt_tokens"] == types["a_attempts"] == "int64"
    assert types["a_latency"] == "double"


def test_messages_that_are_none_are_an_error_in_their_row(cluster: Any, relay: ChatKoreServer) -> None:
    """A column of strings holds prompts and JSON; keys that Arrow adds to lists are not sent."""
    relay.respond_with(lambda request: completion(text_of(request)))
    cells = ["one", '[{"role":"user","content":"two"}]', '[{"role', None]
    data = cluster.data.from_items([{"q": cell} for cell in cells], override_num_blocks=1)
    out = run(data, relay, column="q", actors=1).take_all()
    assert [row["completion"] for row in out] == ["one", "two", None, None]
    assert [row["error_type"] for row in out] == [None, None, "InvalidRequestError", "InvalidRequestError"]
    lists = [[{"role": "user", "content": "a"}], [{"role": "user", "content": "b", "name": "Bo"}]]
    data = cluster.data.from_items([{"messages": each} for each in lists], override_num_blocks=1)
    assert [row["completion"] for row in run(data, relay, actors=1).take_all()] == ["a", "b"]
    assert sorted((request.json["messages"] for request in relay.requests[2:]), key=str) == lists


def test_rows_of_an_actor_that_was_killed_are_answered_by_another(
    cluster: Any, relay: ChatKoreServer, tmp_path: Path
) -> None:
    """Ray gives its blocks to another actor: no row is lost, and only rows of such a block are asked again."""
    once = tmp_path / "once"
    relay.respond_with(lambda request: completion(f"to {text_of(request)}"))

    class Dies:
        """A hook that ends the process of the first actor that has some answers."""

        def __init__(self, place: Path) -> None:
            self.place = place
            self.calls = 0

        def on_call_end(self, _: object) -> None:
            self.calls += 1
            if self.calls == 5 and not self.place.exists():
                self.place.touch()
                os._exit(1)

    client = {"base_url": relay.base_url, "hooks": [Dies(once)]}
    data = rows_of(cluster, 40, blocks=8)
    out = run(data, relay, client=client, concurrency=2, rate_limit=RateLimit(max_concurrency=3)).take_all()
    assert once.exists()
    assert sorted((row["id"], row["completion"]) for row in out) == [(each, f"to q{each}") for each in range(40)]
    assert relay.request_count <= 40 + 10


class Caller:
    """An actor with a client of its own, as others than Ray Data may have."""

    async def ready(self) -> None: ...

    async def ask(self, url: str, limiter: Any, count: int) -> list[str]:
        async with AsyncChatKore(api_key=KEY, base_url=url, rate_limit=limiter) as client:
            messages: Any = [{"role": "user", "content": "Hello"}]
            calls = [client.chat.completions.create(model="m", messages=messages) for _ in range(count)]
            return [answer.text for answer in await asyncio.gather(*calls)]


def test_actors_share_one_limit(cluster: Any, relay: ChatKoreServer) -> None:
    """However many actors there are, no more attempts are in flight, as the server counts them."""
    from chatkore_async.integrations.ray import ClusterLimiter

    in_flight = most = 0

    async def respond(_: Any) -> Any:
        nonlocal in_flight, most
        in_flight += 1
        most = max(most, in_flight)
        await asyncio.sleep(0.02)  # so that those who may overlap do
        in_flight -= 1
        return completion("yes")

    relay.respond_with(respond)
    limiter = ClusterLimiter(RateLimit(max_concurrency=3))
    callers = [cluster.remote(Caller).options(num_cpus=0).remote() for _ in range(2)]
    cluster.get([caller.ready.remote() for caller in callers])
    answers = cluster.get([caller.ask.remote(relay.base_url, limiter, 30) for caller in callers], timeout=PATIENCE)
    assert answers == [["yes"] * 30] * 2
    assert most == 3


def test_a_rate_holds_over_all_actors(cluster: Any, relay: ChatKoreServer) -> None:
    """Sixty rows at twenty a second take the three seconds that they take one client."""
    moments: list[float] = []

    def respond(_: Any) -> Any:
        moments.append(asyncio.get_running_loop().time())
        return completion("yes")

    relay.respond_with(respond)
    limit = RateLimit(requests_per_minute=1200, adaptive=False)
    assert len(run(rows_of(cluster, 60, blocks=4), relay, concurrency=20, rate_limit=limit).take_all()) == 60
    assert moments[-1] - moments[0] > 2.7  # a tenth of a second's worth goes out at once


def demand() -> Demand:
    return Demand(endpoint="https://host/v1", model="m", size=10, attempt=1)


def until(limiter: Any, counts: tuple[int, int]) -> Callable[[], Any]:
    async def check() -> None:
        async with asyncio.timeout(PATIENCE):
            while await limiter.counts() != counts:  # noqa: ASYNC110 - of another process
                await asyncio.sleep(0.05)

    return check


@pytest.fixture
def limiter(cluster: Any) -> Iterator[Any]:
    from chatkore_async.integrations.ray import ClusterLimiter

    limiter = ClusterLimiter(RateLimit(max_concurrency=1, adaptive=False))
    yield limiter
    limiter.stop()


async def test_a_cancelled_call_leaves_nothing_at_the_limiter(limiter: Any) -> None:
    """Its place goes to the next."""
    permit = await limiter.acquire(demand())
    leaves, stays = (asyncio.ensure_future(limiter.acquire(demand())) for _ in range(2))
    await until(limiter, (1, 2))()
    leaves.cancel()
    await until(limiter, (1, 1))()
    limiter.release(permit, DONE)
    limiter.release(await asyncio.wait_for(stays, PATIENCE), DONE)
    await until(limiter, (0, 0))()


async def test_a_limiter_that_dies_comes_back(limiter: Any, cluster: Any) -> None:
    """Ray starts it again, and who waited is let in."""
    await limiter.acquire(demand())
    waits = asyncio.ensure_future(limiter.acquire(demand()))
    await until(limiter, (1, 1))()
    cluster.kill(limiter._actor, no_restart=False)
    limiter.release(await asyncio.wait_for(waits, PATIENCE), DONE)
    await until(limiter, (0, 0))()


async def test_what_a_killed_process_held_comes_back(limiter: Any, cluster: Any) -> None:
    """After the lease, which nobody renews any more."""

    class Holder:
        async def hold(self) -> None:
            await limiter.acquire(demand())

    holder = cluster.remote(Holder).options(num_cpus=0).remote()
    await asyncio.wait_for(holder.hold.remote(), PATIENCE)
    waits = asyncio.ensure_future(limiter.acquire(demand()))
    await until(limiter, (1, 1))()
    cluster.kill(holder)
    await asyncio.wait_for(waits, PATIENCE)


async def test_a_limiter_that_was_stopped_is_an_error(cluster: Any, relay: ChatKoreServer) -> None:
    """Of the job, and not of each row: nothing may be sent any more."""
    from chatkore_async.integrations.ray import ClusterLimiter, LimiterLostError

    limiter = ClusterLimiter()
    limiter.stop()
    async with AsyncChatKore(api_key=KEY, base_url=relay.base_url, rate_limit=limiter) as client:
        with pytest.raises(LimiterLostError, match="is gone"):
            await client.chat.completions.create(model="m", messages=[{"role": "user", "content": "a"}])
    assert relay.request_count == 0


def test_a_name_means_one_limit(cluster: Any) -> None:
    """Who gives the same name and another limit is told, and is not held to what he does not know."""
    from chatkore_async.integrations.ray import ClusterLimiter

    first = ClusterLimiter(RateLimit(requests_per_minute=5), name="shared", detached=True)
    try:
        ClusterLimiter(RateLimit(requests_per_minute=5, estimate=len), name="shared")
        with pytest.raises(ConfigurationError, match="another limit"):
            ClusterLimiter(RateLimit(requests_per_minute=6), name="shared")
    finally:
        first.stop()


def test_mistakes_are_told_before_the_job(cluster: Any, relay: ChatKoreServer) -> None:
    """A misspelt parameter starts no actor."""
    with pytest.raises(InvalidRequestError, match="temprature"):
        run(rows_of(cluster, 2), relay, params={"temprature": 1})


def test_a_key_is_written_nowhere(cluster: Any, relay: ChatKoreServer) -> None:
    """Not to Ray's logs, not into a plan or an error, though it was given as an argument and refused by the server."""
    relay.always(error(401, f"wrong key {KEY}"))
    out = run(rows_of(cluster, 4), relay)
    shown = f"{out} {out.take_all()} {out.stats()}"
    logs = Path(cluster._private.worker.global_worker.node.get_session_dir_path())
    assert relay.requests[0].headers["authorization"] == f"Bearer {KEY}"
    assert KEY not in shown
    read = [path for path in logs.rglob("*") if path.is_file()]
    assert read
    assert [path.name for path in read if KEY.encode() in path.read_bytes()] == []
