"""A batch that is killed: nothing is lost, nothing is doubled, whenever it happens."""

import asyncio
import json
import os
import random
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from chatkore_async.testing import ChatKoreServer, RecordedRequest, Reply, completion, error

PATIENCE = 30.0
"""Seconds after which something hangs."""

KILLS = 50

# Loading the libraries takes longer than a run. So one process loads them and forks one for each run, which is killed.
NURSERY = """
import asyncio, os, sys
from chatkore_async import AsyncChatKore
from chatkore_async.batch import run_batch
url, source, out = sys.argv[1:]

async def main(retry):
    async with AsyncChatKore(api_key="k", base_url=url, max_retries=0) as client:
        summary = await run_batch(client, source, out, concurrency=8, retry_failed=retry)
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
        *(server.base_url, str(tmp_path / "in.jsonl"), str(tmp_path / "out.jsonl")),
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


def files_in(place: Path) -> list[str]:
    return sorted(each.name for each in place.iterdir())


async def random_moment(chance: random.Random, server: ChatKoreServer, *, most: int) -> None:
    """Wait for a number of further requests, which may be none, and some turns of the loop."""
    await server.wait_for_requests(server.request_count + chance.choice([0, 1, chance.randint(1, most)]), timeout=None)
    for _ in range(chance.randint(0, 40)):
        await asyncio.sleep(0)


async def test_killed_at_fifty_random_moments(server: ChatKoreServer, nursery: Nursery, tmp_path: Path) -> None:
    """After each kill, all lines of before are there, once; what has a line is not asked again; the end is complete."""
    asyncio.get_running_loop().set_debug(False)
    chance = random.Random(6)
    count = 600
    out = tmp_path / "out.jsonl"
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(request(number)) + "\n" for number in range(count)))
    before: dict[str, Any] = {}
    asked_again = []
    kills = 0

    def respond(asked: RecordedRequest) -> Reply:
        if (name := asked.json["user"]) in before:
            asked_again.append(name)
        return error(400, "no") if int(name[1:]) % 20 == 0 else completion(f"answer to {name}")

    server.respond_with(respond)
    for _ in range(KILLS):
        await nursery.begin()
        over = asyncio.create_task(nursery.over())
        moment = asyncio.create_task(random_moment(chance, server, most=20))
        async with asyncio.timeout(PATIENCE):
            await asyncio.wait([over, moment], return_when=asyncio.FIRST_COMPLETED)
        if not over.done():
            nursery.kill()
            kills += 1
        moment.cancel()
        assert [line for line in await over if not line.startswith("done")] == []
        after = lines_in(out)
        assert {name: after.get(name) for name in before} == before
        before = after
    assert kills == KILLS
    assert 100 < len(before) < count
    await nursery.begin()
    assert await nursery.over() == [f"done {count} {count - count // 20} {count // 20}"]
    lines = lines_in(out)
    assert lines.keys() == {f"r{number}" for number in range(count)}
    for name, line in lines.items():
        body = line["response"]["body"]
        assert int(name[1:]) % 20 == 0 or body["choices"][0]["message"]["content"] == f"answer to {name}"
    assert asked_again == []
    assert server.request_count <= count + KILLS * 8


async def test_killed_while_failures_are_replaced(server: ChatKoreServer, nursery: Nursery, tmp_path: Path) -> None:
    """Answers stay whatever happens to the lines beside them, and the failures get theirs in the end."""
    asyncio.get_running_loop().set_debug(False)
    chance = random.Random(7)
    count = 300
    out = tmp_path / "out.jsonl"
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(request(number)) + "\n" for number in range(count)))
    server.respond_with(lambda asked: error(400) if int(asked.json["user"][1:]) % 2 else completion(asked.json["user"]))
    await nursery.begin()
    assert await nursery.over() == [f"done {count} {count // 2} {count // 2}"]
    answered = {name: line for name, line in lines_in(out).items() if line["response"]["status_code"] == 200}
    asked_again = []

    def respond(asked: RecordedRequest) -> Reply:
        if asked.json["user"] in answered:
            asked_again.append(asked.json["user"])
        # Some fail again, so that there is something to replace until the end.
        return error(400) if chance.random() < 0.5 else completion(asked.json["user"])

    server.respond_with(respond)
    for _ in range(15):
        await nursery.begin(retry=True)
        over = asyncio.create_task(nursery.over())
        moment = asyncio.create_task(random_moment(chance, server, most=30))
        async with asyncio.timeout(PATIENCE):
            await asyncio.wait([over, moment], return_when=asyncio.FIRST_COMPLETED)
        if not over.done():
            nursery.kill()
        moment.cancel()
        assert [line for line in await over if not line.startswith("done")] == []
        lines = lines_in(out)
        assert {name: lines.get(name) for name in answered} == answered
        answered = {name: line for name, line in lines.items() if line["response"]["status_code"] == 200}
    assert asked_again == []
    server.respond_with(lambda asked: completion(asked.json["user"]))
    await nursery.begin(retry=True)
    assert await nursery.over() == [f"done {count} {count} 0"]
    assert lines_in(out).keys() == {f"r{number}" for number in range(count)}
    assert files_in(tmp_path) == ["in.jsonl", "out.jsonl"]
