"""Sessions: made without a loop, one per loop, closed with it, and silent however a program ends.

What needs a clean interpreter runs as a script under `-X dev -W error`; it must end well and write nothing to stderr.
"""

import asyncio
import gc
import importlib.util
import os
import sys
import threading
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import aiohttp
import pytest

from chatkore_async import AsyncChatKore, ConfigurationError, Limits, PoolStats, StreamInterruptedError, Timeout
from chatkore_async.testing import ChatKoreServer, Hold, Stall, completion, raw, stream

ASK = {"model": "m", "messages": [{"role": "user", "content": "Hello"}]}

PRELUDE = """
import asyncio, gc, logging, multiprocessing, os, signal, sys, threading
# A machine that is busy with other things makes callbacks slow, which debug mode tells; it is not what is tested.
logging.getLogger("asyncio").addFilter(lambda record: " took " not in record.getMessage())
URL, USE_UVLOOP = sys.argv[1], sys.argv[2] == "uvloop"
if USE_UVLOOP:
    import uvloop
    asyncio.set_event_loop_policy(uvloop.EventLoopPolicy())
from chatkore_async import *
ASK = {"model": "m", "messages": [{"role": "user", "content": "Hello"}]}
def make(**options):
    return AsyncChatKore(api_key="k", base_url=URL, max_retries=0, **options)
async def ask(client):
    return await client.chat.completions.create(**ASK)
async def begin(client):
    stream = client.chat.completions.stream(**ASK)
    await anext(stream)
    return stream
"""

LOOPS = ["asyncio", "uvloop"] if importlib.util.find_spec("uvloop") else ["asyncio"]


@pytest.fixture
async def server() -> AsyncIterator[ChatKoreServer]:
    async with ChatKoreServer() as server:
        yield server


def make(server: ChatKoreServer, **options) -> AsyncChatKore:
    return AsyncChatKore(api_key="k", base_url=server.base_url, max_retries=options.pop("max_retries", 0), **options)


async def run_script(server: ChatKoreServer, script: str, *, loop: str = "asyncio") -> tuple[int | None, str, str]:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-X", "dev", "-W", "error", "-c", PRELUDE + script, server.base_url, loop),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        out, err = await asyncio.wait_for(process.communicate(), 20)
    except TimeoutError:
        process.kill()
        out, err = await process.communicate()
        pytest.fail(f"the script hangs: {out.decode()} {err.decode()}")
    return process.returncode, out.decode(), err.decode()


async def run_clean(server: ChatKoreServer, script: str, *, loop: str = "asyncio", returncode: int = 0) -> str:
    """Run a script that has nothing to complain of, and return what it printed."""
    code, out, err = await run_script(server, script, loop=loop)
    assert (code, err) == (returncode, ""), err
    return out


async def all_closed(server: ChatKoreServer) -> None:
    for connection in server.connections:
        await connection.closed()


# Making one.


def test_making_a_client_needs_no_loop_and_does_no_io() -> None:
    """A client may live in a module: making one opens no socket, starts no thread and asks for no event loop."""
    threads = threading.active_count()
    here = Path("/proc/self/fd")
    descriptors = {each.name for each in here.iterdir()} if here.is_dir() else set()
    client = AsyncChatKore(api_key="k", base_url="http://127.0.0.1:9/v1")
    assert "open 0/1000 idle 0" in repr(client)
    assert not client.closed
    assert threading.active_count() <= threads
    assert not descriptors or {each.name for each in here.iterdir()} <= descriptors


def test_a_module_level_client_serves_one_loop_after_the_other() -> None:
    """`asyncio.run` twice with one client works, and each run's session ends with the run."""
    client = AsyncChatKore(api_key="k", base_url="http://unused")

    async def main() -> int:
        async with ChatKoreServer() as server:
            mine = client.with_options(base_url=server.base_url)
            await mine.chat.completions.create(**ASK)
            await mine.chat.completions.create(**ASK)
            return client.pool.open

    assert asyncio.run(main()) == 1
    assert asyncio.run(main()) == 1
    assert client.pool.open == 0
    assert (client.pool.created, client.pool.reused) == (2, 2)


def test_two_threads_with_a_loop_each_share_a_client() -> None:
    """One client serves two loops that run at once, a session and connections for each."""
    client = AsyncChatKore(api_key="k", base_url="http://unused")
    both = threading.Barrier(2, timeout=10)
    seen: list[int] = []

    def work() -> None:
        async def main() -> None:
            async with ChatKoreServer() as server:
                mine = client.with_options(base_url=server.base_url)
                await mine.chat.completions.create(**ASK)
                await asyncio.to_thread(both.wait)
                seen.append(client.pool.open)
                await asyncio.to_thread(both.wait)
                await mine.chat.completions.create(**ASK)

        asyncio.run(main())

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert seen == [2, 2]
    assert client.pool.created == 2


def test_the_pool_can_be_looked_at_from_another_thread() -> None:
    """`client.pool` is a snapshot that a metrics thread may take while connections come and go."""
    client = AsyncChatKore(api_key="k", base_url="http://unused")
    failures: list[BaseException] = []
    done = threading.Event()

    def watch() -> None:
        while not done.is_set():
            try:
                assert client.pool.open >= 0
                assert repr(client)
                done.wait(0.0005)
            except Exception as error:  # noqa: BLE001 - whatever it is
                failures.append(error)
                return

    async def main() -> None:
        async with ChatKoreServer() as server:
            mine = client.with_options(base_url=server.base_url)
            for _ in range(3):
                await asyncio.gather(*(mine.chat.completions.create(**ASK) for _ in range(40)))
                server.drop_idle_connections()
        await client.close()

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        asyncio.run(main())
    finally:
        done.set()
        watcher.join(10)
    assert not failures


# The end of a loop, of a program, of a client.


ENDINGS = {
    "closed": "async def main():\n    async with make() as client:\n        await ask(client)\nasyncio.run(main())",
    "nobody closes": "async def main():\n    await ask(make())\nasyncio.run(main())",
    "module level": "client = make()\nasyncio.run(ask(client))\nasyncio.run(ask(client))",
    "runner": "client = make()\nwith asyncio.Runner() as runner:\n"
    "    runner.run(ask(client))\n    runner.run(ask(client))\n    assert client.pool.created == 1",
    "loop closed": "loop = asyncio.new_event_loop()\nclient = make()\nloop.run_until_complete(ask(client))\nloop.close()",
    "loop closed, client collected": "loop = asyncio.new_event_loop()\nclient = make()\n"
    "loop.run_until_complete(ask(client))\nloop.close()\ndel client\ngc.collect()",
    "another loop after a dead one": "client = make()\nfor _ in range(3):\n    loop = asyncio.new_event_loop()\n"
    "    loop.run_until_complete(ask(client))\n    loop.close()\ngc.collect()\nassert client.pool.created == 3\n"
    "assert client.pool.open <= 1",
    "collected before its loop is closed": "loop = asyncio.new_event_loop()\nclient = make()\n"
    "loop.run_until_complete(ask(client))\ndel client\ngc.collect()\nloop.close()",
    "collected, and its loop goes on": "loop = asyncio.new_event_loop()\nclient = make()\n"
    "loop.run_until_complete(ask(client))\ndel client\ngc.collect()\n"
    "loop.run_until_complete(asyncio.sleep(0.01))\nloop.close()",
    "collected while its loop runs": "async def main():\n    client = make()\n    await ask(client)\n    del client\n"
    "    gc.collect()\n    await asyncio.sleep(0.01)\nasyncio.run(main())",
    "collected in the last moment": "async def main():\n    client = make()\n    await ask(client)\n    del client\n"
    "    gc.collect()\nasyncio.run(main())",
    "closed twice": "async def main():\n    client = make()\n    await ask(client)\n    await client.close()\n"
    "    await client.aclose()\n    assert client.closed\nasyncio.run(main())",
    "closed from a later loop": "client = make()\nloop = asyncio.new_event_loop()\n"
    "loop.run_until_complete(ask(client))\nasyncio.run(client.close())\n"
    "loop.run_until_complete(asyncio.sleep(0.01))\nloop.close()",
    "closed from a later loop, its own closed unrun": "client = make()\nloop = asyncio.new_event_loop()\n"
    "loop.run_until_complete(ask(client))\nasyncio.run(client.close())\nloop.close()\ndel client\ngc.collect()",
    "never used": "client = make()\nasyncio.run(client.close())",
    "cancelled": "async def main():\n    client = make()\n    task = asyncio.create_task(begin(client))\n"
    "    await asyncio.sleep(0)\n    await asyncio.sleep(0)\n    task.cancel()\n"
    "    await asyncio.wait([task])\n    assert task.cancelled()\nasyncio.run(main())",
    "a stream left open": "async def main():\n    global stream\n    stream = await begin(make())\nasyncio.run(main())",
    "a stream left open in a dead loop": "client = make()\nloop = asyncio.new_event_loop()\n"
    "stream = loop.run_until_complete(begin(client))\nloop.close()\ndel stream\ngc.collect()",
    "a stream and a client left in a dead loop": "client = make()\nloop = asyncio.new_event_loop()\n"
    "stream = loop.run_until_complete(begin(client))\nloop.close()\ndel client\ngc.collect()",
}


@pytest.mark.parametrize(
    "ending,loop",
    # uvloop's own `close()` complains of whatever is open in a loop that did not shut down its generators.
    [
        (ending, loop)
        for ending, script in ENDINGS.items()
        for loop in LOOPS
        if loop == "asyncio" or "loop." not in script
    ],
)
async def test_nothing_is_left_behind(server: ChatKoreServer, ending: str, loop: str) -> None:
    """However a program ends, it prints no warning about sessions and leaves no connection open."""
    if "stream" in ending:
        server.always(stream(["Hel", Stall()]))
    await run_clean(server, ENDINGS[ending], loop=loop)
    assert server.connections or ending in ("never used", "cancelled")
    await all_closed(server)


@pytest.mark.parametrize("loop", LOOPS)
async def test_a_loop_that_is_never_closed(server: ChatKoreServer, loop: str) -> None:
    """A program that forgets to close its loop hears of its loop at most, never of a session of ours."""
    script = "client = make()\nloop = asyncio.new_event_loop()\nloop.run_until_complete(ask(client))"
    code, _, err = await run_script(server, script, loop=loop)
    assert code == 0
    # What asyncio says of its loop and of the two sockets inside of it is its own business.
    ours = [
        line for line in err.splitlines() if "nclosed" in line and "event loop" not in line and "family=1," not in line
    ]
    assert not ours, err
    await all_closed(server)


@pytest.mark.parametrize("returncode,end", [(3, "sys.exit(3)"), (1, "raise ValueError('mine')"), (1, "os.kill(os.getpid(), signal.SIGINT); await asyncio.sleep(5)")], ids=["exit", "error", "interrupt"])  # fmt: skip
async def test_a_program_that_ends_in_the_middle(server: ChatKoreServer, returncode: int, end: str) -> None:
    """`sys.exit`, an exception or Ctrl-C inside of `asyncio.run` closes the session with the loop."""
    script = f"async def main():\n    await ask(make())\n    {end}\nasyncio.run(main())"
    code, _, err = await run_script(server, script)
    assert code in (returncode, -2)  # -2: an interrupt
    assert "nclosed" not in err
    assert "ResourceWarning" not in err
    await all_closed(server)


async def test_a_client_collected_while_its_loop_runs_closes_its_connections(server: ChatKoreServer) -> None:
    """A client that nobody closed and nobody has any more does not keep its sockets."""
    client = make(server)
    await client.chat.completions.create(**ASK)
    del client
    gc.collect()
    await server.connections[0].closed()


async def test_a_closed_client_refuses_calls(server: ChatKoreServer) -> None:
    """A call after `close()` is a `ConfigurationError`, for copies too, and closing twice is fine."""
    client = make(server)
    copy = client.with_options(timeout=5)
    await copy.close()  # a copy closes nothing
    assert not client.closed
    await client.chat.completions.create(**ASK)
    await client.close()
    await client.close()
    assert client.closed
    assert copy.closed
    for one in (client, copy):
        with pytest.raises(ConfigurationError, match="was closed"):
            await one.chat.completions.create(**ASK)
        with pytest.raises(ConfigurationError, match="was closed"):
            async with one:
                pass
    assert "closed" in repr(client)
    assert client.pool.created == 1  # what it did is still known
    await server.connections[0].closed()


async def test_closing_needs_no_turn_of_the_loop(server: ChatKoreServer) -> None:
    """A cancelled clean-up, as frameworks have it, still closes every connection."""
    client = make(server)
    await client.chat.completions.create(**ASK)

    async def clean_up() -> None:
        asyncio.current_task().cancel()
        await client.close()

    with pytest.raises(asyncio.CancelledError):
        await asyncio.create_task(clean_up())
    assert client.closed
    await server.connections[0].closed()


async def test_a_client_closed_from_another_loop(server: ChatKoreServer) -> None:
    """`close()` in one thread's loop closes the session of another thread's running loop as well."""
    client = make(server)
    asked, closed = threading.Event(), threading.Event()
    failure: list[BaseException] = []

    def work() -> None:
        async def main() -> None:
            await client.chat.completions.create(**ASK)
            asked.set()
            await asyncio.to_thread(closed.wait, 10)
            with pytest.raises(ConfigurationError):
                await client.chat.completions.create(**ASK)
            await asyncio.sleep(0.01)

        try:
            asyncio.run(main())
        except Exception as error:  # noqa: BLE001 - whatever it is
            failure.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    await asyncio.to_thread(asked.wait, 10)
    await client.close()
    await server.connections[0].closed()
    closed.set()
    await asyncio.to_thread(thread.join, 10)
    assert not failure


async def test_calls_in_flight_fail_when_the_client_is_closed(server: ChatKoreServer) -> None:
    """Closing a client ends its running calls at once with a clear error, whatever they wait for."""
    client = make(server, limits=Limits(max_connections=3), max_retries=2)
    body, head = completion().body, raw(Stall())
    half = raw(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body), body[:9], Stall())
    server.script(head, half, stream(["Hel", Stall()]))
    calls = [asyncio.create_task(client.chat.completions.create(**ASK)) for _ in range(2)]
    await server.wait_for_requests(2)
    opened = await client.chat.completions.create(**ASK, stream=True)
    assert (await anext(opened)).text == ""
    assert (await anext(opened)).text == "Hel"
    rest = asyncio.create_task(opened.get_final_completion())
    waiting = asyncio.create_task(client.chat.completions.create(**ASK))
    await asyncio.sleep(0)
    assert client.pool.waiting == 1
    await client.close()
    async with asyncio.timeout(2):
        for call in [*calls, waiting]:
            with pytest.raises(ConfigurationError, match="closed"):
                await call
        with pytest.raises(StreamInterruptedError, match="client was closed") as caught:
            await rest
    assert caught.value.partial.text == "Hel"
    assert server.request_count == 3


async def test_calls_that_connect_fail_when_the_client_is_closed(server: ChatKoreServer) -> None:
    """A call that waits for its connection to open ends when the client is closed, not when the time is up."""
    with socket_that_never_accepts() as port:
        client = AsyncChatKore(api_key="k", base_url=f"http://127.0.0.1:{port}", timeout=Timeout(connect=None))
        call = asyncio.create_task(client.chat.completions.create(**ASK))
        while not client._manager.pool().is_connecting(call):  # noqa: ASYNC110 - a state, not an event
            await asyncio.sleep(0)
        await client.close()
        with pytest.raises(ConfigurationError, match="client was closed"):
            await asyncio.wait_for(call, 2)


async def test_a_call_after_the_loop_shut_its_generators_down(server: ChatKoreServer) -> None:
    """A clean-up at the very end of a loop may still make a call; that leaves nothing behind, too."""
    script = """
client = make()
async def main():
    await ask(client)
    await asyncio.get_running_loop().shutdown_asyncgens()
    await ask(client)
    assert client.pool.created == 2
asyncio.run(main())
"""
    await run_clean(server, script)
    await all_closed(server)


# Without a loop to help: the same in this process, where coverage sees it.


@pytest.fixture
def elsewhere() -> Iterator[ChatKoreServer]:
    """A server in another thread's loop."""
    ready, server = threading.Event(), ChatKoreServer()
    end: list[object] = []

    async def main() -> None:
        async with server:
            over = asyncio.Event()
            end.extend([asyncio.get_running_loop(), over])
            ready.set()
            await over.wait()

    thread = threading.Thread(target=asyncio.run, args=(main(),))
    thread.start()
    assert ready.wait(10)
    yield server
    end[0].call_soon_threadsafe(end[1].set)
    thread.join(10)


async def drop(server: ChatKoreServer) -> None:
    """Wait until another loop's server has lost all its connections."""
    async with asyncio.timeout(5):
        while any(each.open for each in server.connections):  # noqa: ASYNC110 - an event of another loop
            await asyncio.sleep(0.001)


@pytest.mark.parametrize("state", ["closed", "stands still", "goes on"])
@pytest.mark.parametrize("how", ["closed elsewhere", "collected", "replaced"])
def test_a_loop_that_just_stopped(elsewhere: ChatKoreServer, state: str, how: str) -> None:
    """Connections of a loop that stopped are closed with or without `close()`, whether or not it ever goes on."""
    elsewhere.respond_with(lambda request: stream(["Hel", Stall()]) if request.json.get("stream") else None)
    clients = [make(elsewhere)]
    loop = asyncio.new_event_loop()

    async def main(*, streams: bool):
        await clients[0].chat.completions.create(**ASK)
        return await clients[0].chat.completions.create(**ASK, stream=True) if streams else None

    # A stream that nobody ended holds on to a loop that may still go on.
    opened = loop.run_until_complete(main(streams=state == "closed" or how == "closed elsewhere"))
    if state == "closed":
        loop.close()
    if how == "closed elsewhere":
        asyncio.run(clients[0].close())
    elif how == "replaced" and state == "closed":
        asyncio.run(main(streams=False))
    else:
        clients.clear()
    del opened
    gc.collect()
    asyncio.run(drop(elsewhere))
    if state == "goes on":
        loop.run_until_complete(asyncio.sleep(0.001))
    loop.close()
    clients.clear()
    gc.collect()


def test_the_numbers_of_dead_loops_are_kept(elsewhere: ChatKoreServer) -> None:
    """`client.pool` counts what loops did that are gone, and forgets their connections when the next one begins."""
    client = make(elsewhere)
    for _ in range(3):
        loop = asyncio.new_event_loop()
        loop.run_until_complete(client.chat.completions.create(**ASK))
        loop.close()
    assert client.pool.created == 3
    asyncio.run(client.close())
    assert client.pool == PoolStats(created=3)


def test_a_client_that_a_child_disowned(elsewhere: ChatKoreServer) -> None:
    """What a forked child does first: forget the parent's connections, and open its own at the next call."""
    client = make(elsewhere)
    loop = asyncio.new_event_loop()
    loop.run_until_complete(client.chat.completions.create(**ASK))
    pool = client._manager._pools[loop]
    connections = pool.connector.protocols()
    client._manager.disown()  # as after `os.fork()`, in the child
    client._manager.disown()
    assert client.pool == PoolStats()
    asyncio.run(client.chat.completions.create(**ASK))
    assert client.pool.created == 1
    assert [connection.is_connected() for connection in connections] == [True]
    for connection in connections:
        connection.abort()
    loop.run_until_complete(asyncio.sleep(0.001))
    asyncio.run(client.close())
    loop.close()
    del pool
    from chatkore_async import _manager

    _manager._inherited.clear()


async def test_a_disowned_client_leaves_the_callers_session_alone(server: ChatKoreServer) -> None:
    """In a forked child, too, a session that the caller brought is the caller's business."""
    async with aiohttp.ClientSession() as session:
        client = AsyncChatKore(api_key="k", base_url=server.base_url, session=session)
        await client.chat.completions.create(**ASK)
        client._manager.disown()
        assert not session.closed
        from chatkore_async import _manager

        _manager._inherited.clear()


# Forks.


FORKED = """
async def main():
    client = make()
    await ask(client)
    pid = os.fork()
    if not pid:
        try:
            assert client.pool.created == 0
            async def child():
                await ask(client)
                await ask(client)
                assert client.pool.created == 1
                await client.close()
            asyncio.run(child())
            gc.collect()
        except BaseException as error:
            print("child:", repr(error), file=sys.stderr)
        finally:
            sys.stderr.flush()
            os._exit(0)
    await asyncio.to_thread(os.waitpid, pid, 0)
    await ask(client)
    assert (client.pool.created, client.pool.reused) == (1, 1)
asyncio.run(main())
"""

FORKED_AND_LEFT = """
client = make()
loop = asyncio.new_event_loop()
loop.run_until_complete(ask(client))
stream = loop.run_until_complete(begin(client))
pid = os.fork()
if not pid:
    del stream, client
    gc.collect()
    sys.exit()
assert os.waitpid(pid, 0)[1] == 0
loop.run_until_complete(stream.aclose())
loop.run_until_complete(ask(client))
assert client.pool.created == 2, client.pool
loop.run_until_complete(client.close())
loop.close()
"""

POOL_OF_PROCESSES = """
client = make()
def work():
    async def main():
        await ask(client)
        await ask(client)
    asyncio.run(main())
    asyncio.run(main())
def main():
    loop = asyncio.new_event_loop()
    loop.run_until_complete(ask(client))
    context = multiprocessing.get_context("fork")
    children = [context.Process(target=work) for _ in range(2)]
    for child in children:
        child.start()
    for child in children:
        child.join()
        assert child.exitcode == 0, child.exitcode
    loop.run_until_complete(ask(client))
    assert client.pool.created == 1
    loop.run_until_complete(client.close())
    loop.close()
main()
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("script,connections", [(FORKED, 2), (POOL_OF_PROCESSES, 5)], ids=["fork", "multiprocessing"])
async def test_a_forked_child_leaves_the_parents_connections_alone(
    server: ChatKoreServer, script: str, connections: int, loop: str
) -> None:
    """A forked child opens connections of its own, and the parent goes on with those it had."""
    await run_clean(server, script, loop=loop)
    assert len(server.connections) == connections
    await all_closed(server)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
async def test_a_forked_child_that_exits_warns_of_nothing(server: ChatKoreServer) -> None:
    """A child that drops the client it inherited, streams included, and exits neither warns nor disturbs the parent."""
    server.script(completion(), stream(["Hel", Stall()]))
    await run_clean(server, FORKED_AND_LEFT)
    assert len(server.connections) == 2
    await all_closed(server)


# Sessions of the caller's.


async def test_a_session_of_the_callers_is_used_and_not_closed(server: ChatKoreServer) -> None:
    """Bring your own session: its headers and connector are used, and it stays open when the client is closed."""
    async with aiohttp.ClientSession(headers={"X-Tenant": "blue"}) as session:
        async with AsyncChatKore(api_key="k", base_url=server.base_url, session=session) as client:
            await client.chat.completions.create(**ASK)
            assert server.requests[0].headers["X-Tenant"] == "blue"
            assert server.requests[0].headers["Authorization"] == "Bearer k"
            assert client.pool.in_use == 0
        assert not session.closed
        await AsyncChatKore(api_key="k", base_url=server.base_url, session=session).chat.completions.create(**ASK)
        assert len(server.connections) == 1


async def test_a_closed_session_of_the_callers_is_named(server: ChatKoreServer) -> None:
    """A call on a session that its owner has closed says so, and is not retried."""
    async with aiohttp.ClientSession() as session:
        client = AsyncChatKore(api_key="k", base_url=server.base_url, session=session)
    with pytest.raises(ConfigurationError, match="session is closed: keep it open"):
        await client.chat.completions.create(**ASK)


def test_a_session_of_another_loop_is_named() -> None:
    """A session that was made in one loop and is used in another is a clear error, not a puzzle of asyncio's."""

    async def make_session() -> aiohttp.ClientSession:
        return aiohttp.ClientSession()

    loop = asyncio.new_event_loop()
    session = loop.run_until_complete(make_session())
    client = AsyncChatKore(api_key="k", base_url="http://127.0.0.1:9", session=session)
    with pytest.raises(ConfigurationError, match="another event loop"):
        asyncio.run(client.chat.completions.create(**ASK))
    loop.run_until_complete(session.close())
    loop.close()


async def test_a_client_with_a_session_of_the_callers_is_closed_without_harm(server: ChatKoreServer) -> None:
    """Closing such a client lets its running calls finish: the session is not ours."""
    release = asyncio.Event()
    server.script(stream(["Hel", Hold(release), "lo"]))
    async with aiohttp.ClientSession() as session:
        client = AsyncChatKore(api_key="k", base_url=server.base_url, session=session)
        opened = await client.chat.completions.create(**ASK, stream=True)
        await client.close()
        release.set()
        assert (await opened.get_final_completion()).text == "Hello"


async def test_a_session_that_raises_for_statuses_or_leaves_bodies_compressed(server: ChatKoreServer) -> None:
    """Options of a session that are meant for other answers do not keep ours from being read."""
    from chatkore_async import RateLimitError
    from chatkore_async.testing import compressed, error

    server.script(error(429), compressed(completion("Hi")))
    async with aiohttp.ClientSession(raise_for_status=True, auto_decompress=False) as session:
        client = AsyncChatKore(api_key="k", base_url=server.base_url, session=session, max_retries=0)
        with pytest.raises(RateLimitError):
            await client.chat.completions.create(**ASK)
        assert (await client.chat.completions.create(**ASK)).text == "Hi"


class socket_that_never_accepts:  # noqa: N801
    """A listening port whose queue is full, so that the system drops further handshakes."""

    def __enter__(self) -> int:
        import socket

        self._listener = socket.socket()
        self._listener.bind(("127.0.0.1", 0))
        self._listener.listen(0)
        self._fillers = []
        for _ in range(8):
            filler = socket.socket()
            filler.setblocking(False)
            filler.connect_ex(self._listener.getsockname())
            self._fillers.append(filler)
        return self._listener.getsockname()[1]

    def __exit__(self, *_: object) -> None:
        for each in (self._listener, *self._fillers):
            each.close()
