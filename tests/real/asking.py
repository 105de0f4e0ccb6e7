"""A question for a relay, and what tests want to know of its answer."""

import pytest

from chatkore_async import APIError, AsyncChatKore, ChatCompletion

ASK = {"model": "gpt-4o-mini", "messages": [{"role": "user", "content": "Hello"}]}

both_ways = pytest.mark.parametrize("way", ["create", "stream"])


async def ask(client: AsyncChatKore, way: str, **options: object) -> ChatCompletion:
    """Make a call, awaited or streamed, and return its answer."""
    if way == "create":
        return await client.chat.completions.create(**ASK, **options)
    async with client.chat.completions.stream(**ASK, **options) as answer:
        return await answer.get_final_completion()


def attempts(outcome: ChatCompletion | APIError) -> list[int | str | None]:
    """Return how each attempt ended: its status, or the error that left it without one."""
    return [attempt.status or attempt.error for attempt in outcome.meta.attempts]
