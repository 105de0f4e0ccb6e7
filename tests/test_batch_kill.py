"""A batch that is killed: nothing is lost, nothing is doubled, whenever it happens."""

import asyncio
import json
import os
import random
import signal
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from chatkore_async.testing import ChatKoreServer, RecordedRequest, Reply, completion, error

PATIENCE = 30.0
"""Seconds after which something hangs."""

KILLS = 50
CONCURRENCY = 8

# Loading the libraries takes longer than a run. So one process loads them and forks one for each run, which is killed.
NURSERY = """
import asyncio, os, sys
from chatkore_async import AsyncChatKore
from chatkore_async.batch import run_batch
url, source, out, concurrency = sys.argv[1:]

async def main(retry):
    async with AsyncChatKore(api_key="k", base_url=url, max_retries=0) as client:
        summary = await run_batch(client, source, out, concurrency=int(concurrency), retry_failed=retry)
        print("done", summary.total, summary.completed, summary.failed, flush=True)

for order in sys.stdin:
    child = os.fork()
    if child == 0:
        try:
            asyncio.run(main(order == "retry\\n"))
        except BaseException as error:
            print("failed", repr(error), flush=True)
        finally:
            os._exit(0)
    print("child", child, flush=True)
    os.waitpid(child, 0)
    print("over", flush=True)
"""


class Nursery:
    """Runs batches in processes of their own, one after another."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process
        self._child = 0

    async def begin(self, *, retry: bool = False) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(b"retry\n" if retry else b"run\n")
        word, child = (await self._line()).split()
        assert word == "child"
        self._child = int(child)

    def kill(self) -> None:
        os.kill(self._child, signal.SIGKILL)

    async def over(self) -> list[str]:
        """Wait until the run has ended, and return what it said."""
        said = []
        while (line := await self._line()) != "over":
            said.append(line)
        return said

    async def _line(self) -> str:
        assert self._process.stdout is not None
        async with asyncio.timeout(PATIENCE):
            return (await self._process.stdout.readline()).decode().strip()


@pytest.fixture
async def nursery(server: ChatKoreServer, tmp_path: Path) -> AsyncIterator[Nursery]:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-W", "error", "-c", NURSERY),
        *(server.base_url, str(tmp_path / "in.jsonl"), str(tmp_path / "out.jsonl"), str(CONCURRENCY)),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        # Of a process that is killed, coverage has nothing to tell.
        env={name: value for name, value in os.environ.items() if name != "PYTHONASYNCIODEBUG" and "COV" not in name},
    )
    yield Nursery(process)
    assert process.stdin is not None
    process.stdin.close()
    async with asyncio.timeout(PATIENCE):
        assert await process.wait() == 0


def request(number: int) -> dict[str, Any]:
    return {
        "custom_id": f"r{number}",
        "method": "POST",
        "url": "/v1/chat/completions",
        "body": {"model": "m", "messages": [{"role": "user", "content": "Hello " * 50}], "user": f"r{number}"},
    }


def lines_in(path: Path) -> dict[str, Any]:
    """The whole lines by name, each name once. What is after the last line end is torn."""
    lines = [json.loads(line) for line in path.read_bytes().split(b"\n")[:-1]] if path.exists() else []
    named = {line["custom_id"]: line for line in lines}
    assert len(named) == len(lines)
    return named


def answers_in(path: Path) -> dict[str, Any]:
    return {name: line for name, line in lines_in(path).items() if line["response"]["status_code"] == 200}


def write_input(place: Path, count: int) -> None:
    (place / "in.jsonl").write_text("".join(json.dumps(request(number)) + "\n" for number in range(count)))


def files_in(place: Path) -> list[str]:
    return sorted(each.name for each in place.iterdir())


class Moments:
    """Kills runs at random moments: after a number of requests, which may be none, and some turns of the loop.

    A few requests more than these are answered, and the rest waits: however slow this process is, no run ends by itself.
    """

    def __init__(self, seed: int, server: ChatKoreServer, nursery: Nursery, answer: Callable[[str], Reply]) -> None:
        self._chance = random.Random(seed)
        self._server = server
        self._nursery = nursery
        self._answer = answer
        self._left = 0
        self.arrived: list[str] = []
        server.respond_with(self._respond)

    async def _respond(self, asked: RecordedRequest) -> Reply:
        name = asked.json["user"]
        self.arrived.append(name)
        self._left -= 1
        if self._left < 0:
            await asyncio.Event().wait()  # until the connection is lost
        return self._answer(name)

    async def run(self, *, retry: bool = False) -> None:
        count = self._chance.choice([0, 1, self._chance.randint(1, 60)])
        self._left = count + self._chance.randint(0, 8)
        awaited = self._server.request_count + count
        await self._nursery.begin(retry=retry)
        await self._server.wait_for_requests(awaited, timeout=PATIENCE)
        for _ in range(self._chance.randint(0, 100)):
            await asyncio.sleep(0)
        self._nursery.kill()
        assert await self._nursery.over() == []


async def test_killed_at_fifty_random_moments(server: ChatKoreServer, nursery: Nursery, tmp_path: Path) -> None:
    """After each kill, all lines of before are there, once; what has a line is not asked again; the end is complete."""
    asyncio.get_running_loop().set_debug(False)
    out, count = tmp_path / "out.jsonl", 1200
    write_input(tmp_path, count)

    def answer(name: str) -> Reply:
        return error(400, "no") if int(name[1:]) % 20 == 0 else completion(f"answer to {name}")

    moments = Moments(6, server, nursery, answer)
    before: dict[str, Any] = {}
    for _ in range(KILLS):
        moments.arrived.clear()
        await moments.run()
        assert before.keys().isdisjoint(moments.arrived)
        after = lines_in(out)
        assert {name: after.get(name) for name in before} == before
        before = after
    assert 100 < len(before) < count
    server.respond_with(lambda asked: answer(asked.json["user"]))
    await nursery.begin()
    assert await nursery.over() == [f"done {count} {count - count // 20} {count // 20}"]
    lines = lines_in(out)
    assert lines.keys() == {f"r{number}" for number in range(count)}
    assert {name: lines[name] for name in before} == before
    for name, line in lines.items():
        body = line["response"]["body"]
        assert int(name[1:]) % 20 == 0 or body["choices"][0]["message"]["content"] == f"answer to {name}"
    assert server.request_count <= count + KILLS * CONCURRENCY


async def test_killed_while_failures_are_replaced(server: ChatKoreServer, nursery: Nursery, tmp_path: Path) -> None:
    """Answers stay whatever happens to the lines beside them, and the failures get theirs in the end."""
    asyncio.get_running_loop().set_debug(False)
    out, count = tmp_path / "out.jsonl", 600
    write_input(tmp_path, count)
    server.respond_with(lambda asked: error(400) if int(asked.json["user"][1:]) % 2 else completion(asked.json["user"]))
    await nursery.begin()
    assert await nursery.over() == [f"done {count} {count // 2} {count // 2}"]
    answered = answers_in(out)
    # Some fail again, so that there is something to replace until the end.
    moments = Moments(7, server, nursery, lambda name: error(400) if int(name[1:]) % 5 == 0 else completion(name))
    for _ in range(15):
        moments.arrived.clear()
        await moments.run(retry=True)
        assert answered.keys().isdisjoint(moments.arrived)
        after = answers_in(out)
        assert {name: after.get(name) for name in answered} == answered
        answered = after
    assert count // 2 < len(answered) < count
    server.respond_with(lambda asked: completion(asked.json["user"]))
    await nursery.begin(retry=True)
    assert await nursery.over() == [f"done {count} {count} 0"]
    assert lines_in(out).keys() == {f"r{number}" for number in range(count)}
    assert files_in(tmp_path) == ["in.jsonl", "out.jsonl"]
