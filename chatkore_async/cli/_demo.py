"""`chatkore demo`: the client at work, on a loopback server that misbehaves on purpose."""

import asyncio
import random
import time
from collections import Counter

import click
import msgspec

from chatkore_async import AsyncChatKore, ChatKoreError, Limits, RetryPolicy, __version__
from chatkore_async.cli._options import debug_option
from chatkore_async.cli._run import run
from chatkore_async.cli._screen import Screen, make_screen
from chatkore_async.cli._tally import Tally, listed
from chatkore_async.testing import ChatKoreServer, RecordedRequest, Reply, answer, error

MODEL = "gpt-4o-mini"
CONNECTIONS = 50
"""Fewer than the calls, so that connections are shared, and few enough for the 256 files that macOS allows."""

POLICY = RetryPolicy(max_retries=5, initial_delay=0.1, max_delay=1.0)

# What is answered before the answer, and how often in a hundred calls.
_FAULTS: tuple[tuple[int, ...], ...] = ((), (429,), (503,), (503, 429))
_WEIGHTS = (72, 14, 10, 4)
_RETRY_AFTER = {"retry-after-ms": "300"}


class Relay:
    """Answer for the server: after a while, word by word, and for some calls with faults first.

    A call's number and the seed settle what it meets, in whatever order requests arrive.

    Attributes:
        injected: the faults sent so far, by status.

    Args:
        seed: another one, other faults and delays.
        pace: what delays are multiplied by; 0 is no delay at all.
    """

    def __init__(self, seed: int, pace: float = 1.0) -> None:
        self._seed = seed
        self._pace = pace
        self._met: Counter[str] = Counter()
        self.injected: Counter[str] = Counter()

    def __call__(self, request: RecordedRequest) -> Reply:
        """Return the answer to a request; its `user` is the call's number, and calls without one meet no fault."""
        call = request.json.get("user")
        if call is None:
            return self._answer(request, latency=0.4, interval=0.04)
        chance = random.Random(f"{self._seed}/{call}")  # noqa: S311 - no secret
        latency = chance.uniform(0.1, 0.7)
        faults = chance.choices(_FAULTS, _WEIGHTS)[0]
        met = self._met[call]
        if met == len(faults):
            return self._answer(request, latency=latency, interval=0.02)
        self._met[call] += 1
        status = faults[met]
        self.injected[str(status)] += 1
        return error(status, "The demo sent this on purpose.", headers=_RETRY_AFTER if status == 429 else {})

    def _answer(self, request: RecordedRequest, *, latency: float, interval: float) -> Reply:
        reply = answer(request.body, interval=interval * self._pace)
        return msgspec.structs.replace(reply, latency=latency * self._pace)


async def demo(screen: Screen, calls: int, relay: Relay) -> int:
    """Show one awaited call, one stream and `calls` calls at once, and return the exit status."""
    tally = Tally()
    began = time.perf_counter()
    async with (
        ChatKoreServer(handler=relay, record=False) as server,
        # All that the environment could decide is given: a demo must not ask anybody's account.
        AsyncChatKore(
            api_key="none-needed",
            base_url=server.base_url,
            proxy=False,
            retry=POLICY,
            limits=Limits(max_connections=CONNECTIONS),
            hooks=[tally],
        ) as client,
    ):
        screen.intro(
            f"chatkore_async {__version__}",
            f"a server of its own listens at {server.base_url}. No key, no network, no bill.",
        )
        await _one_call(screen, client, tally)
        await _one_stream(screen, client, tally)
        await _many_calls(screen, client, tally, calls)
        rows = tally.rows(client.pool, time.perf_counter() - began)
    screen.table("What happened", rows)
    problem = _problem(tally, relay, calls + 2)
    if problem:
        screen.verdict(f"Not as expected: {problem}.", good=False)
        return 1
    faults = f"{relay.injected.total()} faults ({listed(relay.injected)})" if relay.injected else "no fault"
    screen.verdict(f"All {calls + 2} calls ended well, through {faults}.", good=True)
    return 0


async def _one_call(screen: Screen, client: AsyncChatKore, tally: Tally) -> None:
    screen.heading("One awaited call")
    completion = await client.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": "Hello"}])
    tally.add(completion.usage)
    screen.line(completion.text)
    screen.aside(f"{completion.meta.timings.total or 0:.2f} s, finish reason {completion.choices[0].finish_reason}")


async def _one_stream(screen: Screen, client: AsyncChatKore, tally: Tally) -> None:
    screen.heading("One stream, as it comes")
    messages = [{"role": "user", "content": "Hello again"}]
    async with client.chat.completions.stream(model=MODEL, messages=messages) as stream:
        with screen.writing() as write:
            async for text in stream.text_stream:
                write(text)
        tally.add((await stream.get_final_completion()).usage)
    first = stream.meta.timings.first_token or 0
    screen.aside(f"first token after {first:.2f} s; the stream is {stream.completeness}")


async def _many_calls(screen: Screen, client: AsyncChatKore, tally: Tally, calls: int) -> None:
    screen.heading(f"{calls} concurrent calls, through 429s and 503s")
    screen.aside(f"every fourth is a stream; they share {CONNECTIONS} connections")
    with screen.progress(calls, "calls") as advance:
        tasks = [asyncio.ensure_future(_one_of_many(client, tally, number)) for number in range(1, calls + 1)]
        try:
            for task in asyncio.as_completed(tasks):
                await task
                advance(f"retried {listed(tally.retries)}" if tally.retries else "")
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


async def _one_of_many(client: AsyncChatKore, tally: Tally, number: int) -> None:
    messages = [{"role": "user", "content": f"Call {number}"}]
    completions = client.chat.completions
    try:
        if number % 4:
            completion = await completions.create(model=MODEL, messages=messages, user=str(number))
        else:
            async with completions.stream(model=MODEL, messages=messages, user=str(number), max_tokens=16) as stream:
                completion = await stream.get_final_completion()
    except ChatKoreError:
        return  # the tally has it
    tally.add(completion.usage)


def _problem(tally: Tally, relay: Relay, calls: int) -> str | None:
    """Return what did not go as a demo of this client has to, or `None`."""
    if tally.ended["ok"] != calls:
        return f"{calls - tally.ended['ok']} of {calls} calls did not end well ({listed(tally.failures)})"
    if tally.retries != relay.injected:
        return f"the server sent {listed(relay.injected) or 'no fault'}, the client retried {listed(tally.retries)}"
    return None


@debug_option
@click.command(
    epilog="""\b
Examples:
  chatkore demo                    200 calls, a few seconds
  chatkore demo --calls 2000       more of them
  chatkore demo | cat              plain lines, as for a log"""
)
@click.option("--calls", type=click.IntRange(1, 10_000), default=200, show_default=True, help="How many at once.")
@click.option("--seed", type=int, default=1, show_default=True, help="Another seed, other faults.")
@click.pass_context
def command(ctx: click.Context, calls: int, seed: int) -> None:
    """Watch the client at work.

    Starts a server on the loopback interface and shows, live: one awaited call, one stream printed as it comes, and
    many concurrent calls through 429s and 503s, with a table of what happened. The exit status is 0 if all went well.
    """
    screen = make_screen()
    ctx.exit(run(lambda: demo(screen, calls, Relay(seed))))
