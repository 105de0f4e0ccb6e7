"""Standard output of a command that runs for long: whether it takes a line, and whether anybody reads it."""

import asyncio
import contextlib
import os
import select
import stat
import sys
from collections.abc import Generator


def has_room() -> bool:
    """Tell whether standard output takes a line without waiting.

    A pipe that nobody reads does not, nor does a terminal after Ctrl-S. A server that waited for them would answer
    nobody; rather the line is left out.
    """
    try:
        return bool(select.select([], [sys.stdout], [], 0)[1])
    except (OSError, ValueError):  # it is no file, or (on Windows) none that can be asked
        return True


@contextlib.contextmanager
def while_read() -> Generator[None, None, None]:
    """End what this block awaits when whoever read our output through a pipe has left (`chatkore serve | head -1`).

    Where the system does not tell, nothing happens before the next line is written. The block is to be what waits, not
    what clears up, since it is cancelled.

    Raises:
        BrokenPipeError: the reader has left.
    """
    loop, task = asyncio.get_running_loop(), asyncio.current_task()
    assert task is not None
    pipe = _pipe()
    left = False

    def leave() -> None:
        nonlocal left
        left = True
        assert pipe is not None
        loop.remove_reader(pipe)
        task.cancel()

    if pipe is not None:
        # Nothing can be read from this end. What wakes the loop is the error that epoll reports, asked for or not.
        loop.add_reader(pipe, leave)
    try:
        yield
    except asyncio.CancelledError:
        if left and not task.uncancel():
            raise BrokenPipeError from None
        raise
    finally:
        if pipe is not None:
            loop.remove_reader(pipe)


def _pipe() -> int | None:
    """Return the descriptor of standard output if it is a pipe that tells when its reader leaves."""
    if sys.platform != "linux":  # pragma: no cover
        return None
    with contextlib.suppress(OSError, ValueError):  # it is no file
        descriptor = sys.stdout.fileno()
        if stat.S_ISFIFO(os.fstat(descriptor).st_mode):
            return descriptor
    return None
