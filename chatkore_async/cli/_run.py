"""Running a coroutine as a command: what Ctrl-C and SIGTERM do to it."""

import asyncio
import contextlib
import signal
from collections.abc import Callable, Coroutine, Generator
from typing import Any

INTERRUPTED = 128 + signal.SIGINT
"""The exit status of a program that Ctrl-C ended, as shells count it."""


def run(main: Callable[[], Coroutine[Any, Any, int]]) -> int:
    """Run `main()` in an event loop of its own, and return what it returns.

    SIGINT and SIGTERM cancel it, so that every `async with` and `with` of it ends as it should. The one that came is
    ignored from then on: the process is about to end, and impatience must not leave a terminal without a cursor.

    Raises:
        KeyboardInterrupt: SIGINT came, and all is cleaned up.
        SystemExit: SIGTERM came, and all is cleaned up.
    """
    caught: list[int] = []
    status = 0
    try:
        with asyncio.Runner() as runner:
            status = runner.run(_stoppable(main, caught))
    except (asyncio.CancelledError, BrokenPipeError):
        # Ctrl-C ends a whole pipeline: whoever read our output may be gone before we have said our last.
        if not caught:
            raise
    if not caught:
        return status
    if caught[0] == signal.SIGINT:
        raise KeyboardInterrupt
    raise SystemExit(128 + caught[0])


async def _stoppable(main: Callable[[], Coroutine[Any, Any, int]], caught: list[int]) -> int:
    """Await `main()`, and cancel it when a signal comes, whose number is put into `caught`."""
    loop, task = asyncio.get_running_loop(), asyncio.current_task()
    assert task is not None
    cancel = task.cancel

    def stop(number: int, _: object) -> None:
        signal.signal(number, signal.SIG_IGN)
        caught.append(number)
        loop.call_soon_threadsafe(cancel)  # the loop may be asleep, and this wakes it

    # Not `loop.add_signal_handler`, which Windows lacks. For SIGINT this takes the place of the runner's own handler,
    # which at the second Ctrl-C raises in the midst of cleaning up. What a shell has us ignore, as it does with
    # Ctrl-C for what it starts in the background, stays ignored.
    signals = [each for each in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(each) is not signal.SIG_IGN]
    before = {number: signal.signal(number, stop) for number in signals}
    try:
        return await main()
    finally:
        for number, handler in before.items():
            if number not in caught:
                signal.signal(number, handler)


@contextlib.contextmanager
def interruptible() -> Generator[None, None, None]:
    """Let Ctrl-C stop what this block awaits and nothing else: the program goes on after the block.

    It is `asyncio.timeout` with a key in place of a clock. A second SIGINT before the block has ended is the program's
    again, and one that comes when the block has nothing left to await does nothing.
    """
    loop, task = asyncio.get_running_loop(), asyncio.current_task()
    assert task is not None
    pending, before = task.cancelling(), signal.getsignal(signal.SIGINT)
    running, stopped = True, False

    def cancel() -> None:
        nonlocal stopped
        if running:
            stopped = task.cancel()

    def stop(*_: object) -> None:
        signal.signal(signal.SIGINT, before)
        loop.call_soon_threadsafe(cancel)

    if before is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, stop)
    try:
        yield
    except asyncio.CancelledError:
        if not stopped or task.cancelling() > pending + 1:
            raise
    finally:
        running = False
        if stopped:
            task.uncancel()
        # Unless the second one came, and it is up to the program by now.
        if signal.getsignal(signal.SIGINT) is stop:
            signal.signal(signal.SIGINT, before)
