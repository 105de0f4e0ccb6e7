"""Lines on their way to a file: written in a thread, as many at a time as have come meanwhile."""

import asyncio
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor


class Writer:
    """Writes what it is given, in that order and soon.

    While a write is going on, what comes is gathered for the next: a quick disk gets each line by itself, and a slow
    one gets many at once.

    Args:
        files: a thread, in which `write` is called.
        write: takes whole lines.
        most: lines that may wait before `room` does.
    """

    def __init__(self, files: ThreadPoolExecutor, write: Callable[[bytes], None], most: int) -> None:
        self._files = files
        self._write = write
        self._most = most
        self._loop = asyncio.get_running_loop()
        self._waiting: list[bytes] = []
        self._writing: Future[None] | None = None
        self._error: BaseException | None = None
        self._progress: asyncio.Future[None] | None = None

    def put(self, line: bytes) -> None:
        """Have a line written."""
        self._waiting.append(line)
        self._begin()

    async def room(self) -> None:
        """Wait while too many lines wait.

        Raises:
            OSError: a line could not be written.
        """
        self._raise()
        while len(self._waiting) >= self._most:
            await self._step()

    async def flush(self) -> None:
        """Wait until all is written.

        Raises:
            OSError: it could not be.
        """
        self._raise()
        while self._writing is not None:
            await self._step()

    def close(self) -> None:
        """Write what still waits, here and now: whoever is cancelled may not get to await anything any more.

        Raises:
            OSError: it could not be written.
        """
        if self._writing is not None:
            self._error = self._error or self._writing.exception()  # waits for it
        self._raise()
        lines, self._waiting = self._waiting, []
        if lines:
            self._write(b"".join(lines))

    def _begin(self) -> None:
        if self._writing is None and self._waiting and self._error is None:
            lines, self._waiting = self._waiting, []
            self._writing = self._files.submit(self._write, b"".join(lines))
            self._writing.add_done_callback(self._tell_loop)

    def _tell_loop(self, _: Future[None]) -> None:
        self._loop.call_soon_threadsafe(self._written)

    def _written(self) -> None:
        assert self._writing is not None
        self._error = self._writing.exception()
        self._writing = None
        self._begin()
        if self._progress is not None and not self._progress.done():
            self._progress.set_result(None)

    async def _step(self) -> None:
        self._progress = self._loop.create_future()
        await self._progress
        self._raise()

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error
