"""`mock_chatkore`: answers without a socket, for unit tests of code that calls the client.

It is aioresponses underneath, which patches `aiohttp.ClientSession`: whatever else the code under test sends through
aiohttp is refused. Where rhythm, faults or connections matter, `ChatKoreServer` is the tool.
"""

import inspect
import re
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import msgspec
from aiohttp import ClientResponse

from chatkore_async.testing._answers import answer, model_list
from chatkore_async.testing._steps import Pause, Ping, Reply

if TYPE_CHECKING:
    from yarl import URL

__all__ = ["ChatKoreMock", "MockedRequest", "mock_chatkore"]

_CHAT = re.compile(r".*/chat/completions(\?.*)?$")
_MODELS = re.compile(r".*/models(\?.*)?$")
_MODEL_NAMES = ("gpt-4o-mini", "gpt-4o", "claude-sonnet-4-5", "deepseek-chat")


class MockedRequest(msgspec.Struct, frozen=True):
    """A request that the mock answered. `headers` are those given to the one request, the session's not among them."""

    method: str
    url: str
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        """The body's JSON.

        Raises:
            msgspec.DecodeError: it is none.
        """
        return msgspec.json.decode(self.body)


class ChatKoreMock:
    """What `mock_chatkore` gives: a script for the next answers, and the requests so far."""

    def __init__(self) -> None:
        self.requests: list[MockedRequest] = []
        self._script: list[Reply | Exception] = []

    def __repr__(self) -> str:
        return f"<ChatKoreMock {len(self.requests)} requests, {len(self._script)} answers scripted>"

    def script(self, *replies: Reply | Exception) -> None:
        """Answer the next requests for completions with these, in order; after the last, the mock answers by itself.

        An exception is raised in place of an answer: `aiohttp.ServerDisconnectedError()` plays a connection that broke.

        Raises:
            TypeError: a reply has a rhythm or a fault, which only a `ChatKoreServer` can play.
        """
        for reply in replies:
            if isinstance(reply, Reply) and not all(isinstance(step, bytes | Ping | Pause) for step in reply.steps):
                raise TypeError(f"{reply!r} needs a connection to hold or break: script it on a ChatKoreServer")
        self._script.extend(replies)

    def take(self, method: str, url: str, options: dict[str, Any]) -> Reply:
        """Record a request and return its answer, or raise what the script says."""
        data = options.get("data") or b""
        body: bytes = data if isinstance(data, bytes) else data.read()
        given: Mapping[str, str] = options.get("headers") or {}
        headers = {name: str(value) for name, value in given.items()}
        self.requests.append(MockedRequest(method, url, headers, body))
        if method == "GET":
            return model_list(_MODEL_NAMES)
        if not self._script:
            return answer(body)
        reply = self._script.pop(0)
        if isinstance(reply, Exception):
            raise reply
        return reply


class _Writer:
    """Stands in for the writer of a request that was never written; aiohttp 3.14 asks every response for one."""

    output_size = 0


class _MockedResponse(ClientResponse):
    """A response that aioresponses can make under aiohttp 3.13 and 3.14; it knows the arguments of 3.13 only."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **(_MORE_ARGUMENTS | kwargs))


_MORE_ARGUMENTS: dict[str, Any] = {
    name: _Writer() for name in inspect.signature(ClientResponse.__init__).parameters if name == "stream_writer"
}


@contextmanager
def mock_chatkore() -> Generator[ChatKoreMock, None, None]:
    """Answer every request of every client in this block without a network.

        with mock_chatkore() as mock:
            mock.script(completion("Hello"), error(429))
            ...
            assert mock.requests[0].json["model"] == "gpt-4o-mini"

    Raises:
        ImportError: aioresponses is not installed; it comes with the extra `testing`.
    """
    try:
        from aioresponses import CallbackResult, aioresponses
    except ImportError as cause:
        raise ImportError("mock_chatkore needs aioresponses: pip install 'chatkore-async[testing]'") from cause

    mock = ChatKoreMock()

    def respond(method: str) -> Any:
        def callback(url: "URL", **options: Any) -> Any:
            reply = mock.take(method, str(url), options)
            return CallbackResult(
                status=reply.status,
                body=reply.body,
                headers=dict(reply.headers),
                content_type=reply.header("content-type") or "application/octet-stream",
                response_class=_MockedResponse,
            )

        return callback

    patcher: Any = aioresponses()  # it has no types
    with patcher as patched:
        patched.post(_CHAT, callback=respond("POST"), repeat=True)
        patched.get(_MODELS, callback=respond("GET"), repeat=True)
        yield mock
