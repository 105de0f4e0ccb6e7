"""A server that is never the bottleneck: ready bytes from a bare protocol, in a process and on a core of its own.

The path of a request says what it wants. A request for a completion that is not streamed is answered at once, except
where something else is said.

    /call/…          the completion
    /later/…         the completion after one second
    /paced/N/…       a stream of N deltas, one a segment, every 5 ms
    /burst/N/…       the same, in one write
    /gathered/N/…    the same, in one write and one chunk of HTTP
    /long/N/…        the same, a hundred events to a write, as fast as the client reads
    /held/N/…        streamed: the first deltas up to a text, and the rest when told; not streamed: nothing until told
    /control/counts  connections and requests so far, how many are held, and the CPU seconds used
    /control/release lets go what is held
    /control/pace-MS lets go the streams that are held, one event a segment, every MS ms, each at a moment of its own

`python -m benchmarks.server [CORE]` prints its ports, and serves until standard input ends. It has several, since the
connections that one run has closed keep their port pairs from the next run for a minute.
"""

import asyncio
import json
import math
import sys
import time
from collections import deque
from collections.abc import Iterator
from typing import cast

from benchmarks import answers, machine

INTERVAL = 0.005  # seconds between the events of a paced stream: a slow core reads a hundred of these one by one
DELAY = 1.0  # seconds until a late answer
PORTS = 12
BACKLOG = 16384
HELD_AFTER = 2  # events of a held stream that are sent before it stops: the role, and the first text


class Counts:
    """What the runner may ask."""

    def __init__(self) -> None:
        self.connections = 0
        self.requests = 0
        self.held: list[Server] = []
        self.late: deque[tuple[float, Server]] = deque()

    def as_bytes(self) -> bytes:
        return json.dumps(
            {
                "connections": self.connections,
                "requests": self.requests,
                "held": len(self.held),
                "cpu": time.process_time(),
            }
        ).encode()

    def release(self) -> None:
        held, self.held = self.held, []
        for connection in held:
            connection.finish()

    def pace(self, interval: float) -> None:
        held, self.held = self.held, []
        now = asyncio.get_running_loop().time()
        for number, connection in enumerate(held):
            connection.finish_paced(now + interval * number / len(held), interval)

    def answer_later(self, connection: "Server") -> None:
        """One timer for all, since all wait equally long."""
        loop = asyncio.get_running_loop()
        if not self.late:
            loop.call_later(DELAY, self._answer_late)
        self.late.append((loop.time() + DELAY, connection))

    def _answer_late(self) -> None:
        loop = asyncio.get_running_loop()
        while self.late and self.late[0][0] <= loop.time():
            self.late.popleft()[1].send(answers.CALL)
        if self.late:
            loop.call_at(self.late[0][0], self._answer_late)


class Server(asyncio.Protocol):
    """One connection."""

    def __init__(self, counts: Counts) -> None:
        self._counts = counts
        self._buffer = b""
        self._held = b""  # what is left to send of an answer that is held
        self._segments: tuple[bytes, ...] = ()  # of which that is a part, if it is a stream
        self._blocks: Iterator[bytes] = iter(())
        self._paused = False
        self._asked = False  # for an answer; those that only ask for the counts are not counted

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)  # uvloop's is no subclass
        self._loop = asyncio.get_running_loop()

    def pause_writing(self) -> None:
        self._paused = True

    def resume_writing(self) -> None:
        self._paused = False
        self._pump()

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        while True:
            head, blank, rest = self._buffer.partition(b"\r\n\r\n")
            if not blank:
                return
            lower = head.lower()
            at = lower.find(b"content-length:")
            length = int(lower[at + 15 :].split(b"\r\n", 1)[0]) if at != -1 else 0
            if len(rest) < length:
                return
            self._buffer = rest[length:]
            streamed = b'"stream":true' in rest[:length] or b'"stream": true' in rest[:length]
            self._answer(head.split(b" ", 2)[1], streamed=streamed)

    def _answer(self, path: bytes, *, streamed: bool) -> None:
        _, what, argument, *_ = path.split(b"/")
        if what == b"control":
            self._control(argument)
            return
        self._counts.requests += 1
        self._counts.connections += not self._asked
        self._asked = True
        if what == b"later":
            self._counts.answer_later(self)
        elif what == b"held":
            self._hold(int(argument), streamed=streamed)
        elif not streamed:
            self.send(answers.CALL)
        elif what == b"burst":
            self.send(answers.burst(int(argument)))
        elif what == b"gathered":
            self.send(answers.gathered_burst(int(argument)))
        elif what == b"paced":
            self.send(answers.STREAM_HEAD)
            self._pace(answers.segments(int(argument)), 0)
        elif what == b"long":
            self.send(answers.STREAM_HEAD)
            self._blocks = iter(answers.blocks(int(argument)))
            self._pump()
        else:
            raise ValueError(f"the server knows no {path!r}")

    def _control(self, argument: bytes) -> None:
        what, _, milliseconds = argument.partition(b"-")
        if what == b"release":
            self._counts.release()
        elif what == b"pace":
            self._counts.pace(int(milliseconds) / 1000)
        self.send(answers.whole(self._counts.as_bytes()))

    def _hold(self, length: int, *, streamed: bool) -> None:
        self._held = answers.CALL
        if streamed:
            segments = answers.segments(length)
            self.send(answers.STREAM_HEAD + b"".join(segments[:HELD_AFTER]))
            self._held = b"".join(segments[HELD_AFTER:])
            self._segments = segments
        self._counts.held.append(self)

    def _pace(self, segments: tuple[bytes, ...], number: int) -> None:
        if self._transport.is_closing():
            return
        if number == len(segments) - 1:
            self._transport.write(segments[number])
            return
        self._transport.write(segments[number])
        self._loop.call_later(INTERVAL, self._pace, segments, number + 1)

    def _pump(self) -> None:
        while not self._paused and not self._transport.is_closing():
            block = next(self._blocks, None)
            if block is None:
                return
            self._transport.write(block)

    def finish(self) -> None:
        """Send the rest of an answer that is held."""
        held, self._held = self._held, b""
        self.send(held)

    def finish_paced(self, at: float, interval: float) -> None:
        """Send the rest of a stream that is held, piece by piece from then on."""
        self._held = b""
        self._loop.call_at(at, self._go_on, HELD_AFTER, at, interval)

    def _go_on(self, number: int, at: float, interval: float) -> None:
        self.send(self._segments[number])
        if number < len(self._segments) - 1:
            # Who was late keeps to its moments, and lets some pass: else those of many streams would draw together.
            at += interval * max(1, math.ceil((self._loop.time() - at) / interval))
            self._loop.call_at(at, self._go_on, number + 1, at, interval)

    def send(self, data: bytes) -> None:
        if not self._transport.is_closing():
            self._transport.write(data)


async def main() -> None:
    """Serve until standard input ends; print the ports first."""
    machine.allow_files()
    loop = asyncio.get_running_loop()
    counts = Counts()
    servers = [await loop.create_server(lambda: Server(counts), "127.0.0.1", 0, backlog=BACKLOG) for _ in range(PORTS)]
    print(*(server.sockets[0].getsockname()[1] for server in servers), flush=True)
    await loop.run_in_executor(None, sys.stdin.read)


if __name__ == "__main__":
    machine.pin(int(sys.argv[1]) if len(sys.argv) > 1 else None)
    try:
        import uvloop
    except ImportError:
        asyncio.run(main())
    else:
        uvloop.run(main())
