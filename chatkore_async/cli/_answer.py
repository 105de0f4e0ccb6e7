"""One answer: asked for, shown as it comes, and what there is to say about it at its end."""

import json
import logging
import re
from collections.abc import Iterator

import msgspec

from chatkore_async import AsyncChatKore, ChatCompletion, ChatCompletionRequest, Retry
from chatkore_async.cli._paper import ANSWER, Paper
from chatkore_async.cli._problems import explained
from chatkore_async.types import ChatCompletionMessage, ChoiceDelta

# What the line of an error ends with; how often it was tried is said as it happens.
_ATTEMPTS = re.compile(r" \([^()]*attempts? in [^()]*\)$")
_UNSEEN = re.compile("[\x7f-\x9f]")


class Manner(msgspec.Struct, frozen=True, kw_only=True):
    """How an answer is asked for and shown.

    Attributes:
        streamed: whether it is shown as it comes.
        silent: whether it is not shown at all, but given back alone.
        quiet: whether its reasoning and the line about its usage are left out.
    """

    streamed: bool = True
    silent: bool = False
    quiet: bool = False


class Answer:
    """An answer on its way to a paper.

    Attributes:
        text: what came of it so far.
    """

    def __init__(self, client: AsyncChatKore, paper: Paper, manner: Manner) -> None:
        self._completions = client.chat.completions
        self._paper = paper
        self._manner = manner
        self.text = ""

    async def come(self, request: ChatCompletionRequest) -> ChatCompletion:
        """Ask, show what comes, then notes on how it ended, and return it.

        However this is left, what came before stays shown, and the line it ends on is whole.

        Raises:
            ChatKoreError: there was no answer, or it broke off.
        """
        completion = await (self._stream(request) if self._manner.streamed else self._whole(request))
        for remark in remarks(completion, streamed=self._manner.streamed):
            self._paper.note(remark)
        if not self._manner.quiet:
            self._paper.note(summary(completion))
        return completion

    async def _stream(self, request: ChatCompletionRequest) -> ChatCompletion:
        async with self._completions.stream(request) as stream:
            try:
                async for chunk in stream:
                    for choice in chunk.choices[:1]:
                        self._show(choice.delta)
            finally:
                # Calls come in fragments, which nobody wants to read one by one.
                self._finish(stream.snapshot)
            return await stream.get_final_completion()

    async def _whole(self, request: ChatCompletionRequest) -> ChatCompletion:
        completion = await self._completions.create(request)
        for choice in completion.choices[:1]:
            self._show(choice.message)
        self._finish(completion)
        return completion

    def _show(self, said: ChoiceDelta | ChatCompletionMessage) -> None:
        self.text += said.content or ""
        if self._manner.silent:
            return
        if said.reasoning_content and not self._manner.quiet:
            self._paper.say("reasoning", said.reasoning_content)
        if said.content:
            self._paper.say(ANSWER, said.content)
        if said.refusal:
            self._paper.say("refusal", said.refusal)

    def _finish(self, completion: ChatCompletion) -> None:
        if not self._manner.silent:
            for name, arguments in calls(completion):
                self._paper.say(f"tool call {name}", pretty(arguments))
        self._paper.end()


class Retries:
    """A hook that says that an attempt is repeated, and why, where somebody is waiting for it."""

    def __init__(self, paper: Paper) -> None:
        self._paper = paper

    def on_retry(self, event: Retry, /) -> None:
        """Show the delay and the reason."""
        if self._paper.has_a_reader:
            reason = explained(event.error).message.partition("\n")[0]
            self._paper.note(f"retrying in {event.delay:.1f} s: {_ATTEMPTS.sub('', reason)}")


class Warnings(logging.Handler):
    """Show the client's warnings where they do not get into the midst of an answer."""

    def __init__(self, paper: Paper) -> None:
        super().__init__(logging.WARNING)
        self._paper = paper

    def emit(self, record: logging.LogRecord) -> None:
        """Show one."""
        self._paper.note(f"warning: {record.getMessage()}")


def calls(completion: ChatCompletion) -> Iterator[tuple[str, str]]:
    """Return the name and the arguments of each function or tool that the first choice wants called."""
    for call in completion.tool_calls:
        if isinstance(call.custom, msgspec.UnsetType):
            yield call.function.name, call.function.arguments
        else:
            yield call.custom.name, call.custom.input
    for choice in completion.choices[:1]:
        if (older := choice.message.function_call) is not None:
            yield older.name, older.arguments


def pretty(arguments: str) -> str:
    """Return JSON with a line for each member, and anything else as it is."""
    try:
        return json.dumps(json.loads(arguments), ensure_ascii=False, indent=2)
    except (ValueError, RecursionError):
        return arguments


def document(completion: ChatCompletion, encoding: str) -> str:
    """Return a completion as one JSON document for a stream of that encoding.

    What the encoding may not have, and controls that a terminal would obey, are escaped.
    """
    text = json.dumps(completion.to_dict(), ensure_ascii=not encoding.lower().startswith("utf"), indent=2)
    return _UNSEEN.sub(lambda control: f"\\u{ord(control[0]):04x}", text)


def summary(completion: ChatCompletion) -> str:
    """Return the line about tokens, seconds, model and finish reason; what is not known is left out."""
    usage, timings = completion.usage, completion.meta.timings
    parts: list[str] = []
    if usage is not None:
        parts.append(f"{usage.prompt_tokens} prompt + {usage.completion_tokens} completion tokens")
        details = usage.completion_tokens_details
        if details is not None and details.reasoning_tokens:
            parts.append(f"{details.reasoning_tokens} of them reasoning")
    if timings.first_token is not None:
        parts.append(f"first token {timings.first_token:.2f} s")
    if timings.total is not None:
        parts.append(f"total {timings.total:.1f} s")
    if completion.model:
        parts.append(completion.model)
    if reason := finish_reason(completion):
        parts.append(f"finish reason {reason}")
    return " ".join(", ".join(parts).split())


def remarks(completion: ChatCompletion, *, streamed: bool) -> Iterator[str]:
    """Return what a reader should know before trusting that this is all there was to say."""
    reason = finish_reason(completion)
    if reason == "length":
        yield "the answer stops where the limit of tokens was reached (finish reason length)"
    elif reason == "content_filter":
        yield "a content filter withheld the answer, or its rest (finish reason content_filter)"
    elif reason is None and not streamed:  # of a stream, the client itself warns
        yield "warning: the answer has no finish reason: it may be cut"
    said = any(choice.message.content or choice.message.refusal for choice in completion.choices[:1])
    if not said and not any(calls(completion)):
        yield "the answer has no text"


def finish_reason(completion: ChatCompletion) -> str | None:
    """Return why the first choice ended."""
    return completion.choices[0].finish_reason if completion.choices else None
