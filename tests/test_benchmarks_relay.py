"""The benchmark of relayed streams: the services that are compared do the same, and what is wrong is noticed."""

import asyncio
import importlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from benchmarks import answers, relay
from benchmarks.child import WrongAnswerError
from benchmarks.relay import Application, Measured, Reader, held, ratio, table, whole
from benchmarks.relays import RELAYS
from benchmarks.relays.serve import served_by_aiohttp, served_by_uvicorn
from benchmarks.server import Counts, Server

NAMES = [name for names in RELAYS.values() for name in names]


@asynccontextmanager
async def model() -> AsyncIterator[tuple[Counts, int]]:
    """The server of the benchmarks, in this process."""
    counts = Counts()
    server = await asyncio.get_running_loop().create_server(lambda: Server(counts), "127.0.0.1", 0)
    try:
        yield counts, server.sockets[0].getsockname()[1]
    finally:
        server.close()


def served(name: str, base_url: str):
    app = importlib.import_module(f"benchmarks.relays.{name}").make(base_url)
    return served_by_uvicorn(app) if name in RELAYS["fastapi"] else served_by_aiohttp(app)


@pytest.mark.parametrize("name", NAMES)
async def test_a_service_relays_what_the_model_sends(name: str) -> None:
    """All that are compared bring every delta, at once when it comes, and the end."""
    async with model() as (counts, port), served(name, f"http://127.0.0.1:{port}/held/12/v1") as at:
        readers = await held(Application(None, at), 3)
        assert not any(reader.ended.done() for reader in readers)
        counts.pace(0.01)
        await whole(readers, 12)


@pytest.mark.parametrize("name", NAMES)
async def test_a_service_leaves_the_model_when_its_reader_left(name: str) -> None:
    """Those by hand do so, too, at the next delta at the latest: else they would be no match."""
    async with model() as (counts, port), served(name, f"http://127.0.0.1:{port}/held/500/v1") as at:
        (reader,) = await held(Application(None, at), 1)
        (connection,) = counts.held
        reader.ended.set_result(None)
        reader._transport.close()
        counts.pace(0.005)
        async with asyncio.timeout(5):
            await relay.until(connection._transport.is_closing)


async def test_a_stream_that_lacks_something_is_noticed() -> None:
    """The figures of a service that loses deltas are worth nothing."""
    for body in (answers.segments(5)[:-1], answers.segments(4), answers.segments(6)[2:]):
        reader = Reader()
        reader._received = [answers.STREAM_HEAD, *body]
        with pytest.raises(WrongAnswerError, match="a stream of 5 deltas"):
            reader.check(5)


def measured(delta: float, memory: float) -> Measured:
    return Measured(delta=delta, memory=memory, opening=1.0, busy=0.1)


def test_a_ratio_is_taken_within_a_round_and_judged_by_the_median() -> None:
    """A machine that is slow for one round is slow for all three."""
    found = {
        "ours": [measured(110, 40), measured(1100, 50), measured(140, 60)],
        "by hand": [measured(100, 40), measured(1000, 40), measured(100, 40)],
        "pipe": [measured(90, 40)] * 3,
    }
    assert ratio(found, "delta").median == 1.1
    text = table("fastapi", "asyncio", found)
    assert "1.100 (1.100 to 1.250)  at most 1.15: pass" in text
    assert "1.250 (1.125 to 1.375)  at most 1.15: MISSED" in text
