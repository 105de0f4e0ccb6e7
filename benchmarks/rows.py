"""What is measured: one row for each thing that users pay for."""

from typing import Literal

import msgspec

from benchmarks.answers import LENGTH
from benchmarks.figures import Measure

LOOPS = ("asyncio", "uvloop")
MOST_TOGETHER = 1000  # operations at once of a process beside which another one lives
QUICK = 20  # operations, and of these at once, of a smoke run
QUICK_LENGTH = 50  # deltas of its streams
QUICK_TURNS = 2


class Point(msgspec.Struct, frozen=True, kw_only=True):
    """A load.

    Attributes:
        concurrency: How many operations are under way at once.
        count: How many operations are measured in one turn.
        peers: The same for libraries that need minutes for `count`; 0 leaves them out.
        length: Deltas of a stream.
        at: The place on the curve, if the row is one.
    """

    concurrency: int
    count: int
    peers: int = 0
    length: int = LENGTH
    at: int = 0


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """A row of the table, or a curve.

    Attributes:
        work: What a child does; see there.
        path: What is asked of the server.
        measure: The figure that counts.
        rounds, peer_rounds: How often each library is measured in a new process.
        turns, turns_alone: How often in each process, beside others and alone. With more than one, ours and the
            reference are alive at the same time and take turns, so that each has the machine as the other had it a
            moment before. That is for work that can be cut into slices, and that leaves room for two processes: up to
            `MOST_TOGETHER` operations at a time. Everything else is alone.
        without: Adapters that are left out, as they would take longer than all others together, or cannot do it.
        ends: The two places of a curve whose ratio is the growth.
        quick: Whether peers take part in a smoke run, for which they start slowly.
    """

    name: str
    title: str
    work: Literal["calls", "cold calls", "streams", "open", "waiting", "import"]
    path: str = ""
    measure: Measure
    unit: str
    loops: tuple[str, ...] = ("asyncio",)
    rounds: int
    peer_rounds: int = 1
    turns: int = 1
    turns_alone: int = 1
    without: tuple[str, ...] = ()
    points: tuple[Point, ...] = (Point(concurrency=1, count=1, peers=1),)
    ends: tuple[int, int] | None = None
    quick: bool = False


_BURST = Row(
    name="burst",
    title=f"one delta of {LENGTH} in a burst",
    work="streams",
    path="burst",
    measure="cpu",
    unit="µs",
    rounds=5,
    turns=60,
    turns_alone=5,
    points=(Point(concurrency=1, count=10, peers=4),),
    quick=True,
)
_EVERY = (
    Row(
        name="call",
        title="one call, 64 at a time",
        work="calls",
        path="call",
        measure="cpu",
        unit="µs",
        loops=LOOPS,
        rounds=5,
        turns=60,
        turns_alone=5,
        points=(Point(concurrency=64, count=128, peers=192),),
        quick=True,
    ),
    Row(
        name="paced",
        title="one delta, one a segment, 100 streams",
        work="streams",
        path="paced",
        measure="cpu",
        unit="µs",
        loops=LOOPS,
        rounds=5,
        turns=2,
        # More of them would want more than a core, and those who cannot keep up find several deltas in a segment.
        points=(Point(concurrency=100, count=100, peers=8),),
    ),
    _BURST,
    msgspec.structs.replace(
        _BURST,
        name="burst-gathered",
        title=f"{_BURST.title}, one chunk of HTTP",
        path="gathered",
        without=("bare",),  # it knows events that have a chunk each
        quick=False,
    ),
    Row(
        name="at-once-5000",
        title="5,000 calls at once, each answered after 1 s",
        work="cold calls",
        path="later",
        measure="wall",
        unit="s",
        rounds=6,
        points=(Point(concurrency=5000, count=5000),),
    ),
    Row(
        name="at-once-10000",
        title="10,000 calls at once, each answered after 1 s",
        work="cold calls",
        path="later",
        measure="wall",
        unit="s",
        rounds=6,
        without=("litellm",),
        points=(Point(concurrency=10_000, count=10_000, peers=10_000),),
    ),
    Row(
        name="open-stream",
        title="memory of an open stream",
        work="open",
        path="held",
        measure="memory",
        unit="KiB",
        rounds=3,
        points=(Point(concurrency=2000, count=2000, peers=300, length=10),),
    ),
    Row(
        name="waiting-call",
        title="memory of a waiting call",
        work="waiting",
        path="held",
        measure="memory",
        unit="KiB",
        rounds=3,
        points=(Point(concurrency=2000, count=2000, peers=300),),
    ),
    Row(
        name="concurrency",
        title="one call, by how many there are at a time",
        work="calls",
        path="call",
        measure="cpu",
        unit="µs",
        rounds=5,
        turns=10,
        turns_alone=2,
        without=("litellm",),
        points=(
            Point(at=1, concurrency=1, count=200, peers=640),
            Point(at=8, concurrency=8, count=200),
            Point(at=64, concurrency=64, count=640, peers=640),
            Point(at=1000, concurrency=1000, count=1000, peers=1000),
            Point(at=10_000, concurrency=10_000, count=10_000),
        ),
        ends=(64, 10_000),
    ),
    Row(
        name="length",
        title="one delta, by the length of the stream",
        work="streams",
        path="long",
        measure="cpu",
        unit="µs",
        rounds=5,
        turns=6,
        without=("litellm",),
        points=(
            Point(at=100, length=100, concurrency=1, count=150, peers=30),
            Point(at=1000, length=1000, concurrency=1, count=40, peers=5),
            Point(at=10_000, length=10_000, concurrency=1, count=4, peers=1),
            Point(at=100_000, length=100_000, concurrency=1, count=1),
        ),
        ends=(1000, 100_000),
    ),
    Row(
        name="import",
        title="import, beyond Python",
        work="import",
        measure="importing",
        unit="ms",
        rounds=9,
        peer_rounds=2,
    ),
    Row(
        name="import-beyond",
        title="import of the client alone, beside that of aiohttp and msgspec",
        work="import",
        measure="importing",
        unit="ms",
        rounds=9,
        peer_rounds=0,
    ),
)
ROWS = {row.name: row for row in _EVERY}
