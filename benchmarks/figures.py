"""What is measured, as it is written to `results/*.json`."""

from typing import Literal

import msgspec

from benchmarks.machine import Machine

Measure = Literal["cpu", "wall", "memory", "importing"]


class Figures(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One turn of one adapter, in a process of its own. What a row does not measure is `None`.

    Attributes:
        cpu: Microseconds of the client's process for one call or one delta, in user code and in the kernel.
        wall: Seconds for all operations.
        p50, p99: Milliseconds of a call.
        first: Milliseconds from asking for a stream to its first text, the median of the first streams of the process.
        memory: KiB of resident memory for one open stream or one waiting call.
        importing: Milliseconds of the import.
        peak: The most MiB of memory the process had so far.
        connections: How many the server saw of the process so far.
        repeated: Requests the server saw of the process so far, beyond those that were asked for.
        server: The share of the time in which the server's core was busy.
    """

    cpu: float | None = None
    wall: float | None = None
    p50: float | None = None
    p99: float | None = None
    first: float | None = None
    memory: float | None = None
    importing: float | None = None
    peak: float | None = None
    connections: int | None = None
    repeated: int | None = None
    server: float | None = None


class Run(msgspec.Struct, frozen=True, kw_only=True):
    """Figures of a turn, and what they are of.

    Attributes:
        at: The place on a curve: a concurrency, or the length of a stream.
        turn: Which turn of the row it is, counted through all rounds. Two libraries took their turns of the same number
            one after the other.
    """

    row: str
    adapter: str
    loop: str
    at: int
    turn: int
    figures: Figures


class Results(msgspec.Struct, frozen=True, kw_only=True):
    """All of one session of benchmarks."""

    python: str
    machine: Machine
    libraries: dict[str, str]
    allocator: dict[str, str]
    runs: list[Run]
    left_out: list[str] = []
