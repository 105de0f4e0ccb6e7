"""What `chatkore doctor` asks a server by way of the client, and what it keeps of the answers."""

import re
import time
from collections.abc import Sequence
from datetime import UTC
from email.utils import parsedate_to_datetime

from msgspec import UNSET

from chatkore_async import (
    AsyncChatKore,
    BadRequestError,
    CallEnd,
    CallMeta,
    ChatCompletion,
    ChatCompletionRequest,
)
from chatkore_async.cli._finding import Mask, one_line
from chatkore_async.cli._observed import Answered, Headers, Tokens

CALL_TOKENS = 16
STREAM_TOKENS = 64
"""More than for a call: of one or two deltas nobody could tell whether they flow."""

_CALL = "Say hello in one short sentence."
_STREAM = "Count from one to twenty in words."
_LIMITS = re.compile(r"^(?:x-)?rate-?limit|^retry-after")


class Ear:
    """A hook that keeps what each answer's headers said.

    Attributes:
        heard: the metadata of each call that was answered, and the Unix time when it ended.
    """

    def __init__(self) -> None:
        self.heard: list[tuple[CallMeta, float]] = []

    def on_call_end(self, event: CallEnd, /) -> None:
        """Keep a call's metadata."""
        if event.meta.headers:
            self.heard.append((event.meta, time.time()))


class Questions:
    """Asks through a client.

    Args:
        client: whom to ask through; one that does not retry, so that what is wrong shows.
        mask: takes secrets out of what is kept.
    """

    def __init__(self, client: AsyncChatKore, mask: Mask) -> None:
        self._client = client
        self._mask = mask
        self._modern = False  # whether the limit has its newer name

    async def models(self) -> tuple[list[str], float]:
        """Return the names of the models, and the seconds it took.

        Raises:
            ChatKoreError: there is no list.
        """
        began = time.perf_counter()
        models = await self._client.models.list()
        return [one_line(self._mask(model.id)) for model in models if model.id.strip()], time.perf_counter() - began

    async def call(self, model: str) -> Answered:
        """Return the answer to a short question.

        Raises:
            ChatKoreError: there is none.
        """
        completions = self._client.chat.completions
        try:
            completion = await completions.create(self._request(model, _CALL, CALL_TOKENS))
        except BadRequestError as error:
            # OpenAI's reasoning models know the limit by this name alone, other servers by the other one.
            if "max_completion_tokens" not in error.message:
                raise
            self._modern = True
            completion = await completions.create(self._request(model, _CALL, CALL_TOKENS))
        return self._answered(model, completion, CALL_TOKENS)

    async def stream(self, model: str) -> Answered:
        """Return the answer to a question that takes a few deltas, streamed.

        Raises:
            ChatKoreError: there is none, or not to its end.
        """
        async with self._client.chat.completions.stream(self._request(model, _STREAM, STREAM_TOKENS)) as stream:
            completion = await stream.get_final_completion()
            return self._answered(model, completion, STREAM_TOKENS, stream.completeness)

    def body(self, model: str) -> dict[str, object]:
        """Return the body of the same question, for whoever sends it without the client."""
        return {
            "model": model,
            "messages": [{"role": "user", "content": _STREAM}],
            "max_completion_tokens" if self._modern else "max_tokens": STREAM_TOKENS,
            "stream": True,
            "stream_options": {"include_usage": True},
        }

    def _request(self, model: str, text: str, limit: int) -> ChatCompletionRequest:
        return ChatCompletionRequest(
            model=model,
            messages=[{"role": "user", "content": text}],
            max_tokens=UNSET if self._modern else limit,
            max_completion_tokens=limit if self._modern else UNSET,
        )

    def _answered(
        self, asked: str, completion: ChatCompletion, limit: int, completeness: str | None = None
    ) -> Answered:
        choice, usage, meta = completion.choices[0], completion.usage, completion.meta
        message = choice.message
        return Answered(
            asked=asked,
            model=self._mask(completion.model),
            text=self._mask(completion.text),
            other=bool(message.reasoning_content or message.refusal or message.tool_calls or message.function_call),
            finish_reason=None if choice.finish_reason is None else self._mask(choice.finish_reason),
            tokens=None if usage is None else Tokens(usage.prompt_tokens, usage.completion_tokens, usage.total_tokens),
            limit=limit,
            request_id=meta.request_id,
            seconds=meta.timings.total or 0.0,
            first_token=meta.timings.first_token,
            completeness=completeness,
        )


def read_headers(heard: Sequence[tuple[CallMeta, float]], mask: Mask) -> Headers:
    """Return what the latest headers say about limits, and the latest date about the clocks.

    Args:
        heard: as an `Ear` has it.
        mask: takes secrets out of it.
    """
    limits: list[str] = []
    exhausted: list[str] = []
    info = next((meta.rate_limit for meta, _ in reversed(heard) if meta.rate_limit is not None), None)
    for what in ("requests", "tokens") if info is not None else ():
        limit, left, reset = (getattr(info, f"{name}_{what}") for name in ("limit", "remaining", "reset"))
        if (limit, left) != (None, None):
            words = f"{what}: {'some' if left is None else left} of {'unknown' if limit is None else limit} left"
            limits.append(words if reset is None else f"{words}, reset in {reset:g} s")
        if left == 0:
            exhausted.append(what)
    others = dict[str, str]()
    if not limits:
        for meta, _ in heard:
            others |= {name: value for name, value in meta.headers.items() if _LIMITS.search(name)}
    skew = uncertainty = None
    for meta, now in heard:
        if (told := _clock(meta.headers)) is not None:
            skew, uncertainty = told - now, meta.timings.total
    return Headers(
        limits=tuple(limits),
        exhausted=tuple(exhausted),
        others=tuple(f"{name}: {mask(value)[:40]}" for name, value in list(others.items())[:6]),
        skew=skew,
        uncertainty=uncertainty or 0.0,
        answers=len(heard),
    )


def _clock(headers: dict[str, str]) -> float | None:
    """Return the Unix time of the `date` header, put forward by the age of an answer out of a cache (RFC 9111 §5.1)."""
    try:
        date = parsedate_to_datetime(headers.get("date", ""))
        moment = (date if date.tzinfo else date.replace(tzinfo=UTC)).timestamp()
    except (ValueError, OverflowError, IndexError, TypeError):  # what the parser raises for nonsense
        return None
    age = headers.get("age", "")
    return moment + (int(age) if re.fullmatch("[0-9]{1,9}", age) else 0)
