"""The key is shown to nobody: not in an error, its causes, a log, a hook, a pickle, or the locals of a traceback."""

import asyncio
import contextlib
import gc
import io
import logging
import pickle
import ssl
import traceback
from collections.abc import Awaitable, Callable, Iterator

import msgspec
import pytest
import trustme

from chatkore_async import AsyncChatKore, ChatKoreError, Limits, RetryPolicy, Timeout
from chatkore_async.testing import (
    ChatKoreServer,
    Cut,
    Hold,
    Reset,
    Stall,
    completion,
    error,
    events,
    html,
    json_reply,
    raw,
    sse,
    stream,
)

ASK = {"model": "m", "messages": [{"role": "user", "content": "Hello"}]}
# One in the form that is masked wherever it appears, and one that only its owner knows for a key.
KEYS = ["sk-MARKED-0123456789abcdef", "MARKED+key/without=prefix"]
MARK = "MARKED"


class Listener:
    """A hook that keeps what it is told, as text."""

    def __init__(self) -> None:
        self.heard: list[str] = []

    def __getattr__(self, name):
        if not name.startswith("on_"):
            raise AttributeError(name)

        def method(event):
            self.heard += [repr(event), str(getattr(event, "error", "")), repr(getattr(event, "meta", ""))]
            self.heard += list(tellings(event.error)) if getattr(event, "error", None) else []

        return method


def chain(problem: BaseException | None) -> Iterator[BaseException]:
    seen: set[int] = set()
    left = [problem]
    while left:
        found = left.pop()
        if found is not None and id(found) not in seen:
            seen.add(id(found))
            yield found
            left += [found.__cause__, found.__context__]
            if isinstance(found, BaseExceptionGroup):
                left += found.exceptions


def tellings(problem: BaseException) -> Iterator[str]:
    """Everything that an exception and what is behind it can be made to say."""
    for found in chain(problem):
        yield from (str(found), repr(found), repr(found.args), repr(vars(found)))
        if isinstance(found, ChatKoreError):
            copy = pickle.loads(pickle.dumps(found))
            yield from (pickle.dumps(found).decode("latin-1"), repr(vars(copy)), str(copy))
            yield repr(getattr(found, "meta", None))
        # The test's own frames hold the key, of course; all others are rendered, ours and aiohttp's.
        inner = found.__traceback__
        while inner is not None and inner.tb_frame.f_code.co_filename == __file__:
            inner = inner.tb_next
        rendered = traceback.TracebackException(type(found), found, inner, capture_locals=True, compact=True)
        rendered.__cause__ = rendered.__context__ = None
        for frame in rendered.stack:
            if frame.filename != __file__:
                yield f"{frame.filename}:{frame.lineno} {frame.name} {frame.locals}"


@pytest.fixture(params=KEYS, ids=["sk", "other"])
def key(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def log() -> Iterator[io.StringIO]:
    """All that any logger says at any level, with its arguments."""
    stream = io.StringIO()

    class Everything(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            stream.write(f"{record.getMessage()} {record.args!r} {record.exc_info and self.format(record)}\n")

    handler = Everything(0)
    root = logging.getLogger()
    level = root.level
    root.addHandler(handler)
    root.setLevel(1)
    yield stream
    root.removeHandler(handler)
    root.setLevel(level)


def echo(key: str) -> dict[str, object]:
    return {
        "401": error(401, f"Incorrect API key provided: {key}.", code=f"bad {key}", param=key),
        "401 headers": error(401, "no", headers={"x-you-sent": f"Bearer {key}", "x-request-id": key}),
        "401 text": error(401, body=f"wrong key {key}".encode()),
        "401 html": html(401, f"wrong key {key}"),
        "500 retried": error(500, f"upstream refused {key}"),
        "302": error(302, "moved", headers={"location": f"https://elsewhere/?key={key}"}),
        "200 error": error(200, f"invalid {key}", code="invalid_api_key"),
        "200 no choices": json_reply({"choices": [], "you": key}),
        "200 text": json_reply(f"hello {key}"),
        "200 page": html(200, f"hello {key}"),
        "garbage": raw(f"SSH-2.0-{key}\r\n".encode()),
        "bad header": raw(f"HTTP/1.1 200 OK\r\nno colon {key}\r\n\r\n".encode()),
        "bad length": raw(b"HTTP/1.1 200 OK\r\nContent-Length: x\r\n\r\n"),
        "bad chunk": raw(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n"),
        "long header": raw(b"HTTP/1.1 200 OK\r\nx: " + b"x" * 100_000 + b"\r\n\r\n"),
        "bad encoding": sse(b"x", headers={"Content-Encoding": "gzip"}),
        "cut": raw(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nabc", Cut()),
        "reset": raw(Reset()),
        "stall": sse(Stall()),
        "silence": raw(Stall()),
    }


async def raised(call: Awaitable[object]) -> BaseException:
    try:
        await call
    except BaseException as problem:  # noqa: BLE001 - cancellations, too
        return problem
    raise AssertionError("nothing was raised")


async def consume(answer) -> None:
    async for _ in answer:
        pass


def check(problem: BaseException, *more: str) -> None:
    for telling in (*tellings(problem), *more):
        # Not `assert MARK not in telling`, which would print it all.
        at = telling.find(MARK)
        assert at == -1, telling[max(0, at - 300) : at + 60]


@pytest.mark.parametrize("way", ["create", "stream", "callable", "copy", "models"])
@pytest.mark.parametrize("case", echo(""))
async def test_no_failure_tells_the_key(key: str, log: io.StringIO, case: str, way: str) -> None:
    """Whatever the server does, and even if it echoes the key, the key stays unsaid."""
    listener = Listener()
    async with ChatKoreServer() as server:
        server.respond_with(lambda request: echo(key)[case])
        options = {
            "base_url": server.base_url,
            "hooks": [listener],
            "retry": RetryPolicy(initial_delay=0, max_retries=1),
            "timeout": Timeout(total=0.05 if case in ("stall", "silence") else 5),
        }
        async with AsyncChatKore(api_key=(lambda: key) if way == "callable" else key, **options) as client:
            used = client
            if way == "copy":
                used = client.with_options(api_key=key, default_headers={"X-Api-Key": key})
            if way == "models":
                problem = await raised(used.models.list())
            elif way == "stream":
                answer = used.chat.completions.stream(**ASK)
                problem = await raised(consume(answer))
                check(problem, repr(answer), repr(answer.meta), repr(answer._call), repr(answer.snapshot))
            else:
                problem = await raised(used.chat.completions.create(**ASK))
            check(problem, repr(client), repr(used), repr(client.pool), *listener.heard)
            assert server.requests[0].headers["authorization"] == f"Bearer {key}"
    check(problem, log.getvalue())


@pytest.mark.parametrize("case", ["error event", "named event", "text", "stray", "cut", "reset", "stall", "whole"])
async def test_no_failure_in_a_stream_tells_the_key(key: str, log: io.StringIO, case: str) -> None:
    """An echo in the middle of a stream is masked as well."""
    listener = Listener()
    first = {"choices": [{"delta": {"content": "Hi"}}]}
    reply = {
        "error event": events(first, {"error": {"message": f"bad {key}", "code": key}}),
        "named event": sse(f"event: error\ndata: bad {key}\n\n".encode()),
        "text": events(first, f"Traceback: {key}".encode()),
        "stray": sse(f"wrong key {key}\n".encode()),
        "cut": events(first, Cut()),
        "reset": events(first, Reset()),
        "stall": events(first, Stall()),
        "whole": json_reply({"you": key, "choices": []}),
    }[case]
    async with ChatKoreServer() as server:
        server.always(reply)
        async with AsyncChatKore(
            api_key=key, base_url=server.base_url, hooks=[listener], max_retries=0, timeout=Timeout(idle=0.05)
        ) as client:
            answer = client.chat.completions.stream(**ASK)
            problem = await raised(consume(answer))
            check(problem, repr(answer), repr(answer._reader), *listener.heard)
            check(await raised(answer.get_final_completion()))
    check(problem, log.getvalue())


async def test_no_connection_error_tells_the_key(key: str, log: io.StringIO) -> None:
    """Refused, unresolved, unverified and slow connections, and proxies that say no, tell hosts and no keys."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    trustme.CA().issue_cert("127.0.0.1").configure_cert(context)
    listener = Listener()
    server = ChatKoreServer()
    secure = ChatKoreServer(ssl=context)
    await server.start()
    await secure.start()
    plain = server.base_url
    server.respond_with(lambda request: error(407))
    cases = [
        {"base_url": secure.base_url},
        {"base_url": plain.replace("http:", "https:")},
        {"base_url": "https://nowhere.invalid"},
        {"base_url": plain, "proxy": "http://nowhere.invalid:1"},
        {"base_url": "https://nowhere.invalid", "proxy": plain},
        {"base_url": "http://127.0.0.1:1"},
        {"base_url": "https://127.0.0.1:1", "timeout": Timeout(connect=1e-9)},
    ]
    for case in cases:
        async with AsyncChatKore(
            api_key=key, **{"proxy": False, "max_retries": 0, "hooks": [listener], **case}
        ) as client:
            for call in (client.chat.completions.create(**ASK), client.chat.completions.stream(**ASK).open()):
                problem = await raised(call)
                assert isinstance(problem, ChatKoreError)
                check(problem, repr(client), *listener.heard)
    await server.close()
    await secure.close()
    check(problem, log.getvalue())


@pytest.mark.parametrize("place", ["queue", "pool", "answer", "body", "delta"])
async def test_no_cancellation_tells_the_key(key: str, log: io.StringIO, place: str) -> None:
    """The traceback of a cancelled call, and of a task group around it, shows no key."""

    class Shut:
        async def acquire(self, demand, /):
            return await asyncio.get_running_loop().create_future()

        def release(self, permit, report, /):
            pass

    async with ChatKoreServer() as server:
        server.always({"answer": raw(Stall()), "body": sse(Stall())}.get(place, stream(["a", Stall()])))
        async with AsyncChatKore(
            api_key=key,
            base_url=server.base_url,
            limits=Limits(max_connections=1),
            rate_limit=Shut() if place == "queue" else None,
        ) as client:
            other = None
            if place == "pool":
                other = client.chat.completions.stream(**ASK)
                await other.open()

            async def group() -> None:
                async with asyncio.TaskGroup() as tasks:
                    tasks.create_task(client.chat.completions.stream(**ASK).get_final_completion())
                    tasks.create_task(raised(client.chat.completions.create(**ASK)))

            for call in (client.chat.completions.stream(**ASK).get_final_completion(), group()):
                task = asyncio.create_task(call)
                if place not in ("queue", "pool"):
                    await server.wait_for_requests(1)
                for _ in range(30):
                    await asyncio.sleep(0)
                task.cancel()
                problem = await raised(task)
                assert isinstance(problem, asyncio.CancelledError)
                check(problem, repr(task))
            if other is not None:
                await other.aclose()
    check(problem, log.getvalue())


@pytest.mark.parametrize(
    "wrong",
    [
        {"messages": []},
        {"temperature": float("nan")},
        {"nonsense": 1},
        {"extra_headers": {"a b": "c"}},
        {"extra_query": 7},
        {"timeout": -1},
        {"max_retries": "x"},
    ],
)
async def test_no_wrong_argument_tells_the_key(key: str, log: io.StringIO, wrong: dict[str, object]) -> None:
    """Errors that are raised before any I/O have locals, too."""
    for source in (key, lambda: key):
        client = AsyncChatKore(api_key=source, base_url="http://localhost:1", default_headers={"X-Api-Key": key})
        for call in (client.chat.completions.create, client.chat.completions.stream):
            try:
                made = call(**{**ASK, **wrong})
                await made
            except (ChatKoreError, TypeError) as problem:
                check(problem, log.getvalue())
            else:
                raise AssertionError(wrong)


@pytest.mark.parametrize(
    "wrong",
    [
        {"base_url": "ftp://x"},
        {"timeout": -1},
        {"proxy": "socks5://x"},
        {"limits": 7},
        {"retry": 7},
        {"ssl": 7},
        {"hooks": 7},
        {"default_headers": {"a b": "c"}},
    ],
)
def test_no_construction_tells_the_key(key: str, wrong: dict[str, object]) -> None:
    """A client that cannot be made shows no key in the frames that refused it, nor does a copy."""

    def attempt(make: Callable[..., object]) -> None:
        problem = None
        try:
            make(api_key=key, **wrong)
        except (ChatKoreError, TypeError) as caught:
            problem = caught
        assert problem is not None
        check(problem)

    attempt(AsyncChatKore)
    if "limits" not in wrong:
        attempt(AsyncChatKore(api_key="k").with_options)


@pytest.mark.parametrize("tail", ["\n", "\x00x", "é", "’"])
async def test_no_impossible_key_is_told(tail: str) -> None:
    """A key that no header can carry is not quoted in the error about it."""
    bad = f"sk-MARKED{tail}y"
    for make in (AsyncChatKore, AsyncChatKore(api_key="k").with_options):
        try:
            make(api_key=bad)
        except ChatKoreError as problem:
            check(problem)
        else:
            raise AssertionError(tail)

    async def later() -> str:
        return bad

    for source in (lambda: bad, later):
        check(await raised(AsyncChatKore(api_key=source).chat.completions.create(**ASK)))


async def test_no_repr_tells_the_key(key: str) -> None:
    """Client, stream, call and settings may be printed."""
    held = asyncio.Event()
    async with ChatKoreServer() as server:
        server.script(stream(["a", Hold(held)]))
        async with (
            AsyncChatKore(
                api_key=key, base_url=server.base_url, default_headers={"Cookie": key, "Api-Key": key}
            ) as client,
            client.chat.completions.stream(**ASK, extra_headers={"X-Auth-Token": key}) as answer,
        ):
            call = answer._call
            for thing in (
                client,
                client.chat,
                client.chat.completions,
                answer,
                answer.snapshot,
                answer.meta,
                call,
                call.route,
                call.route.settings,
                call.outgoing,
                call.exchange,
                call.notes,
                call.notes.meta(),
                call.pool,
                client._settings,
                client._manager.headers,
                [vars(found) for found in (client, client.chat, client.models)],
            ):
                assert MARK not in repr(thing)
                assert MARK not in str(thing)
            held.set()
            await answer.get_final_completion()


async def test_a_call_that_succeeds_logs_no_key(key: str, log: io.StringIO) -> None:
    """DEBUG of every logger, aiohttp's and asyncio's among them, stays without it."""
    async with ChatKoreServer() as server, AsyncChatKore(api_key=key, base_url=server.base_url) as client:
        server.script(error(503, f"bad {key}"), completion(f"you are {key}"))
        answer = await client.chat.completions.create(**ASK)
        assert "MARKED" in answer.text
        await client.chat.completions.stream(**ASK).get_final_completion()
        with contextlib.suppress(TypeError):
            await client.chat.completions.create(**ASK, nonsense=1)
    gc.collect()
    assert "attempt 1 failed" in log.getvalue()
    assert MARK not in log.getvalue()


async def test_an_abandoned_call_tells_no_key(key: str, log: io.StringIO) -> None:
    """What asyncio says of a task whose failure nobody looked at has no key either."""
    async with ChatKoreServer() as server:
        server.always(error(401, f"bad {key}"))
        async with AsyncChatKore(api_key=key, base_url=server.base_url) as client:
            task = asyncio.create_task(client.chat.completions.create(**ASK))
            await asyncio.wait([task])
            del task
            gc.collect()
    assert "never retrieved" in log.getvalue()
    assert MARK not in log.getvalue()


def test_the_check_itself_finds_keys(key: str) -> None:
    """These tests would notice."""
    namespace: dict[str, Callable[[str], None]] = {}
    exec(compile("def fail(local):\n    raise ValueError", "elsewhere.py", "exec"), namespace)
    try:
        namespace["fail"](key)
    except ValueError as problem:
        with pytest.raises(AssertionError):
            check(problem)
    with pytest.raises(AssertionError):
        check(msgspec.ValidationError(key))
