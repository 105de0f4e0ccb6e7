"""What one actor does: it answers batches of cells with a client, on an event loop of its own.

Of its own, since Ray Data blocks the loop that it runs an actor's coroutines on while nobody takes their results.
Calls in flight would time out, and the cluster's limiter would take the process for dead.
"""

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any, Final

from chatkore_async import (
    APIError,
    AsyncChatKore,
    ChatCompletionRequest,
    ConfigurationError,
    InvalidRequestError,
    Limits,
)
from chatkore_async.integrations._cluster_rows import Row, failed, messages_of, row_of

OPTIONS: Final = frozenset({"timeout", "max_retries", "extra_headers", "extra_query", "extra_body"})

PATIENCE: Final = 5.0
"""Seconds for which the end of an actor waits for connections to close."""


class Key:
    """An API key that shows itself to nobody who asks for its `repr`. A client takes it as its `api_key`.

    It can be pickled, or it could not travel to the actors.
    """

    __slots__ = ("_key",)

    def __init__(self, key: str) -> None:
        self._key = key

    def __repr__(self) -> str:
        return "'***'"

    def __reduce__(self) -> tuple[Any, ...]:
        return Key, (self._key,)

    def __call__(self) -> str:
        return self._key


def check_params(model: str, params: Mapping[str, Any]) -> dict[str, Any]:
    """Return what each request of a data set has beside its messages, checked where the job is started.

    Raises:
        InvalidRequestError: a name that no request has, or a value that cannot be sent.
    """
    try:
        fields = {name: value for name, value in params.items() if name not in OPTIONS}
        ChatCompletionRequest(model=model, messages=[], **fields)
    except TypeError as error:
        raise InvalidRequestError(f"params: {error}") from error
    return {**params, "model": model}


def check_client(client: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return what a client is made with beside its key and its limit.

    Raises:
        ConfigurationError: it has one of these, which would be overlooked.
    """
    for name in ("api_key", "rate_limit"):
        if name in client:
            raise ConfigurationError(f"{name} is an argument of its own: give it beside client=, not in it")
    return client


class Worker:
    """A client, and a thread with the event loop that it runs on.

    Args:
        params: what each request has beside its messages.
        concurrency: calls at a time, over all batches.
        whole: whether the whole answer is returned as well.
        client: what `AsyncChatKore` is made with.
    """

    def __init__(self, params: Mapping[str, Any], concurrency: int, *, whole: bool, client: Mapping[str, Any]) -> None:
        # Made before the thread, so that a client that cannot be made is an error of the actor's start.
        options: dict[str, Any] = {"limits": Limits(max_connections=concurrency), **client}
        self.client = AsyncChatKore(**options)
        self._params = params
        self._concurrency = concurrency
        self._whole = whole
        self._places = asyncio.Semaphore(concurrency)
        self._loop = asyncio.new_event_loop()
        self._end = asyncio.Event()
        self._thread = threading.Thread(target=self._run, name="chatkore client", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        with asyncio.Runner(loop_factory=lambda: self._loop) as runner:
            runner.run(self._serve())

    async def _serve(self) -> None:
        async with self.client:
            await self._end.wait()

    async def answer(self, cells: Sequence[object]) -> list[Row]:
        """Return a row of columns for each cell, in their order. Awaited on any event loop, and may be cancelled.

        Raises:
            ChatKoreError: nothing can be sent at all, such as for a limiter that is gone.
        """
        return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(self._answer(cells), self._loop))

    def close(self, patience: float = PATIENCE) -> None:
        """Cancel what is in flight, close the client and end the thread. Closing twice is fine.

        Args:
            patience: seconds to wait for that, at most.
        """
        with contextlib.suppress(RuntimeError):  # the loop is closed
            self._loop.call_soon_threadsafe(self._end.set)
        self._thread.join(patience)

    async def _answer(self, cells: Sequence[object]) -> list[Row]:
        rows: dict[int, Row] = {}
        taken = 0  # places

        async def requests() -> AsyncIterator[tuple[int, dict[str, Any]]]:
            nonlocal taken
            for index, cell in enumerate(cells):
                try:
                    messages = messages_of(cell)
                except InvalidRequestError as error:
                    rows[index] = failed(error, whole=self._whole)
                    continue
                await self._places.acquire()
                taken += 1
                yield index, {**self._params, "messages": messages}

        try:
            async with self.client.chat.completions.map(requests(), concurrency=self._concurrency) as results:
                async for result in results:
                    taken -= 1
                    self._places.release()
                    if result.error is not None and not isinstance(result.error, APIError | InvalidRequestError):
                        raise result.error
                    rows[result.key] = row_of(result, whole=self._whole)
        finally:
            for _ in range(taken):
                self._places.release()
        return [rows[index] for index in range(len(cells))]
