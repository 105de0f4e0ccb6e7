"""Deltas → one completion, in time linear in what arrived. No I/O.

Chunks are put aside as they are handed out, and merged together, in one loop, when there is nothing else to do: while
they are fresh in the caches, and so that nobody who waits holds any. Texts are kept in pieces, and joined when a
completion is asked for.
"""

from collections.abc import Iterable
from typing import Any, cast

import msgspec

from ._responses import (
    Annotation,
    Audio,
    AudioDelta,
    ChatCompletion,
    ChatCompletionChunk,
    ChatCompletionMessage,
    Choice,
    ChoiceDelta,
    ChunkChoice,
    CustomToolCall,
    FunctionCall,
    Logprobs,
    TokenLogprob,
    ToolCall,
    ToolCallDelta,
    Usage,
)

MAX_PARTS = 250_000
"""Choices, tool calls, annotations and log probabilities that a stream may have in all.

Each is an object of a hundred to seven hundred bytes here, and a handful on the wire. An answer of 128,000 tokens has
one log probability for each.
"""

OVERFLOWED = f"has more than {MAX_PARTS:,} choices, tool calls, annotations and log probabilities"

_NO_TOKENS = Usage()
_NOTHING_SAID = [ChunkChoice(index=0)]


def has_delta(chunk: ChatCompletionChunk) -> bool:
    """Tell whether a chunk carries content, reasoning, a refusal, a tool call, sound or a finish reason."""
    return any(choice.finish_reason is not None or _says_something(choice.delta) for choice in chunk.choices)


def _says_something(delta: ChoiceDelta) -> bool:
    return bool(
        delta.content
        or delta.reasoning_content
        or delta.refusal
        or delta.tool_calls
        or delta.function_call
        or delta.audio
    )


class Accumulator:
    """Merges the chunks of one stream into a `ChatCompletion`.

    `pending` is where a stream appends its chunks, and `merge()` empties it. `usage` is what the
    server counted, once it said so. `overflowed` is set when there were more than `MAX_PARTS`; what came after them is
    not merged, and whoever reads the stream is to end it with an error.
    """

    __slots__ = (
        "_choices",
        "_fingerprint",
        "_has_head",
        "_head",
        "_parts",
        "_texts",
        "_tier",
        "overflowed",
        "pending",
        "usage",
    )

    def __init__(self) -> None:
        self.pending: list[ChatCompletionChunk] = []
        self._choices: dict[int, _ChoiceSoFar] = {}
        self._head = ChatCompletion(object="chat.completion")
        self._has_head = False
        self.usage: Usage | None = None
        self._parts = 0
        self.overflowed = False
        # For `add`: where texts of the first choice go, once there is one, and what the last merged chunk said beside.
        self._texts: list[str] | None = None
        self._fingerprint: str | None = None
        self._tier: str | None = None

    def add(self, chunk: ChatCompletionChunk) -> bool:
        """Merge a chunk that has nothing new but a text of the first choice, and return whether it had.

        The shortest way for what comes alone, as most deltas do: what it needs of the stream is in few places, since
        none of them is in the processor's caches. Nothing may be pending.
        """
        choices = chunk.choices
        delta = choices[0].delta
        text = delta.content
        delta.content = None  # so that all the rest is compared at once
        has_more = choices != _NOTHING_SAID
        delta.content = text
        texts = self._texts
        if (
            has_more
            or text is None
            or texts is None
            or chunk.system_fingerprint != self._fingerprint
            or chunk.service_tier != self._tier
            or chunk.usage is not None
        ):
            return False
        texts.append(text)
        return True

    def merge(self) -> None:
        """Merge what is pending."""
        pending, head = self.pending, self._head
        fingerprint: str | None = None
        last: int | None = None  # the choice that `so_far` is, since the next chunk is of the same nearly always
        so_far = _NO_CHOICE
        add_content = so_far.content.append
        for chunk in pending if not self.overflowed else ():
            if not self._has_head:
                self._take_head(chunk)
            if chunk.usage is not None and chunk.usage != _NO_TOKENS:
                self.usage = chunk.usage  # C6: the last one wins, they are never summed
            if chunk.service_tier is not None:
                head.service_tier = chunk.service_tier
            fingerprint = chunk.system_fingerprint or fingerprint
            for choice in chunk.choices:
                index = choice.index
                if index != last:
                    last, so_far = index, self._choice(index)
                    add_content = so_far.content.append
                delta = choice.delta
                content = delta.content
                if content is not None:
                    add_content(content)
                if (
                    choice.finish_reason is not None
                    or delta.role is not None
                    or delta.reasoning_content is not None
                    or delta.tool_calls is not None
                    or delta.refusal is not None
                    or choice.logprobs is not None
                    or delta.function_call is not None
                    or delta.annotations is not None
                    or delta.audio is not None
                ):
                    self._parts += so_far.add_rest(choice)
        if fingerprint is not None:
            head.system_fingerprint = fingerprint
        if self._parts > MAX_PARTS:
            self.overflowed = True
        if pending and self._has_head and 0 in self._choices:
            self._texts = self._choices[0].content
            self._fingerprint, self._tier = pending[-1].system_fingerprint, pending[-1].service_tier
        pending.clear()  # and not a new list: a stream has this one at hand

    def _choice(self, index: int) -> "_ChoiceSoFar":
        so_far = self._choices.get(index)
        if so_far is None:
            so_far = self._choices[index] = _ChoiceSoFar()
            self._parts += 1
        return so_far

    def _take_head(self, chunk: ChatCompletionChunk) -> None:
        """C1: the first id, model and time that are not empty win."""
        head = self._head
        head.id = head.id or chunk.id
        head.model = head.model or chunk.model
        head.created = head.created or chunk.created
        self._has_head = bool(head.id and head.model and head.created)

    @property
    def started(self) -> bool:
        """Whether any choice said anything."""
        self.merge()
        return any(choice.started for choice in self._choices.values())

    @property
    def finished(self) -> bool:
        """Whether every choice that said anything has its finish reason."""
        self.merge()
        started = [choice for choice in self._choices.values() if choice.started]
        return bool(started) and all(choice.finish_reason is not None for choice in started)

    def drop_repetition(self, chunk: ChatCompletionChunk, whole: dict[str, Any]) -> None:
        """Empty what a chunk says a second time: the whole message so far, in place of a delta (C2).

        Args:
            chunk: not merged yet.
            whole: the JSON it was made of.
        """
        self.merge()
        choices = whole.get("choices")
        listed = cast("list[object]", choices) if isinstance(choices, list) else []
        items: list[Any] = [item for item in listed if isinstance(item, dict)]
        for choice, item in zip(chunk.choices, items, strict=False):
            so_far = self._choices.get(choice.index)
            said = choice.delta.content
            # What repeats all pieces is at least as long as they are many. To join them for every message would take
            # more than linear time.
            if so_far is None or item.get("delta") or not said or len(said) < len(so_far.content):
                continue
            # Some relays call their deltas messages, and a short one may be the same as all before it.
            ends = choice.finish_reason or so_far.finish_reason or chunk.object == "chat.completion"
            if ends and said == _joined(so_far.content):
                choice.delta = ChoiceDelta()

    def completion(self) -> ChatCompletion:
        """Return the completion so far; later chunks do not change it."""
        self.merge()
        whole = msgspec.structs.replace(self._head, usage=self.usage)
        whole.choices = [self._choices[index].choice(index) for index in sorted(self._choices)]
        return whole


class _ChoiceSoFar:
    """One choice while it grows."""

    __slots__ = (
        "_started",
        "annotations",
        "audio",
        "content",
        "finish_reason",
        "function",
        "logprobs",
        "reasoning",
        "reasoning_name",
        "refusal",
        "role",
        "tool_calls",
    )

    def __init__(self) -> None:
        self._started = False
        self.role = ""
        self.content: list[str] = []
        self.reasoning: list[str] = []
        self.reasoning_name: str | None = None
        self.refusal: list[str] = []
        self.finish_reason: str | None = None
        self.tool_calls: _ToolCalls | None = None
        self.function: _CallSoFar | None = None
        self.logprobs: tuple[list[TokenLogprob], list[TokenLogprob]] | None = None
        self.annotations: list[Annotation] = []
        self.audio: _AudioSoFar | None = None

    @property
    def started(self) -> bool:
        """Whether it said anything, if only an empty text."""
        return self._started or bool(self.content)

    def add_rest(self, choice: ChunkChoice) -> int:
        """Take in what a delta has beside its content, and return how many parts it brought that are no text."""
        delta, parts = choice.delta, 0
        if choice.finish_reason is not None:
            self.finish_reason = self.finish_reason or choice.finish_reason  # C9: once seen, it stays
            self._started = True
        if delta.role is not None:
            self.role = self.role or delta.role
            self._started = True
        if delta.reasoning_content is not None:
            self.reasoning.append(delta.reasoning_content)
            if self.reasoning_name is None:
                self.reasoning_name = getattr(delta, "_reasoning_name", None)
            self._started = True
        if delta.tool_calls is not None:
            if self.tool_calls is None:
                self.tool_calls = _ToolCalls()
            parts += self.tool_calls.add(delta.tool_calls)
            self._started = True
        if choice.logprobs is not None:
            parts += self._add_logprobs(choice.logprobs)
        if delta.refusal is not None or delta.function_call or delta.annotations or delta.audio:
            parts += self._add_rare(delta)
        return parts

    def _add_rare(self, delta: ChoiceDelta) -> int:
        self._started = True
        if delta.refusal is not None:
            self.refusal.append(delta.refusal)
        if delta.function_call is not None:
            if self.function is None:
                self.function = _CallSoFar()
            self.function.say(delta.function_call.name, delta.function_call.arguments)
        if delta.annotations:
            self.annotations.extend(delta.annotations)
        if delta.audio is not None:
            if self.audio is None:
                self.audio = _AudioSoFar()
            self.audio.add(delta.audio)
        return len(delta.annotations or ())

    def _add_logprobs(self, logprobs: Logprobs) -> int:
        if self.logprobs is None:
            self.logprobs = ([], [])
        content, refusal = logprobs.content or (), logprobs.refusal or ()
        self.logprobs[0].extend(content)
        self.logprobs[1].extend(refusal)
        return len(content) + len(refusal)

    def choice(self, index: int) -> Choice:
        message = ChatCompletionMessage(
            role=self.role or "assistant",
            content=_joined(self.content),
            reasoning_content=_joined(self.reasoning),
            refusal=_joined(self.refusal),
            tool_calls=(self.tool_calls.calls() or None) if self.tool_calls else None,
            function_call=self.function.function() if self.function else None,
            annotations=list(self.annotations) or None,
            audio=self.audio.audio() if self.audio else None,
        )
        if self.reasoning_name is not None:
            message._reasoning_name = self.reasoning_name
        logprobs = None
        if self.logprobs is not None:
            content, refusal = self.logprobs
            logprobs = Logprobs(content=list(content) or None, refusal=list(refusal) or None)
        return Choice(index=index, message=message, finish_reason=self.finish_reason, logprobs=logprobs)


def _joined(pieces: list[str]) -> str | None:
    """Join pieces, and keep the joined text in their place so that the next time only new ones are joined to it."""
    if len(pieces) > 1:
        pieces[:] = ["".join(pieces)]
    return pieces[0] if pieces else None


_NO_CHOICE = _ChoiceSoFar()


class _AudioSoFar:
    __slots__ = ("_data", "_expires_at", "_id", "_transcript")

    def __init__(self) -> None:
        self._id = ""
        self._data: list[str] = []
        self._transcript: list[str] = []
        self._expires_at = 0

    def add(self, delta: AudioDelta) -> None:
        self._id = self._id or delta.id or ""
        self._expires_at = delta.expires_at or self._expires_at
        self._data.append(delta.data or "")
        self._transcript.append(delta.transcript or "")

    def audio(self) -> Audio:
        return Audio(
            id=self._id,
            data=_joined(self._data) or "",
            transcript=_joined(self._transcript) or "",
            expires_at=self._expires_at,
        )


class _ToolCalls:
    """The tool calls of one choice. C4: pieces go to the call the model meant."""

    __slots__ = ("_by_id", "_by_index", "_calls", "_deltas")

    def __init__(self) -> None:
        self._calls: list[_CallSoFar] = []
        self._by_index: dict[int, _CallSoFar] = {}
        self._by_id: dict[str, _CallSoFar] = {}
        self._deltas = 0

    def add(self, pieces: Iterable[ToolCallDelta]) -> int:
        """Take in the pieces of a delta, and return how many calls they began."""
        before = len(self._calls)
        self._deltas += 1
        for piece in pieces:
            name, arguments = _said(piece)
            call = self._candidate(piece, name)
            if call is None or self._begins_another(piece, name, arguments, call):
                call = _CallSoFar()
                self._calls.append(call)
            if piece.index is not None:
                self._by_index[piece.index] = call
            if piece.id:
                self._by_id.setdefault(piece.id, call)
            call.indexed = call.indexed or piece.index is not None
            call.last_delta = self._deltas
            call.add(piece, name, arguments)
        return len(self._calls) - before

    def _candidate(self, piece: ToolCallDelta, name: str | None) -> "_CallSoFar | None":
        """Return the call a piece may go on with: by index, else by id, else the last; `None` when it can be none."""
        of_id = self._by_id.get(piece.id) if piece.id else None
        last = self._calls[-1] if self._calls else None
        if piece.index is None:
            return of_id or last
        call = self._by_index.get(piece.index)
        if call is not None:
            # One index for all calls, but ids to tell them apart. An id that all calls share tells nothing.
            return call if of_id is None or call.id == piece.id else of_id
        if name:
            return None
        # A call that was begun without an index, and goes on with one.
        return of_id or (last if last is not None and not last.indexed else None)

    def _begins_another(
        self, piece: ToolCallDelta, name: str | None, arguments: str | None, call: "_CallSoFar"
    ) -> bool:
        """Tell whether a piece begins a call of its own rather than go on with `call`.

        Only what has a name begins a call. But a name may be repeated in every piece, an id may be made up for every
        piece, and one index, or none, may be given to all calls; then it shows in what the arguments say.
        """
        if not name:
            return False
        goes_on = arguments is not None and arguments.lstrip()[:1] not in ("", "{")
        if piece.id and call.id and piece.id != call.id:
            return name != call.name or not call.has_arguments or not goes_on
        in_one_delta = call.last_delta == self._deltas and not piece.id
        if not call.has_arguments:
            return in_one_delta and name != call.name
        if name != call.name:
            return True
        if goes_on or not call.is_whole():
            return False
        if arguments:
            return in_one_delta or not (call.repeats(arguments) or (piece.id and call.is_empty()))
        return piece.index is None and not piece.id

    def calls(self) -> list[ToolCall]:
        return [call.call() for call in self._calls]


def _said(piece: ToolCallDelta) -> tuple[str | None, str | None]:
    """The name and the arguments, or input, in a piece."""
    if piece.custom is not None:
        return piece.custom.name, piece.custom.input
    return (None, None) if piece.function is None else (piece.function.name, piece.function.arguments)


class _CallSoFar:
    __slots__ = ("_arguments", "_custom", "_size", "_type", "_vendor", "id", "indexed", "last_delta", "name")

    def __init__(self) -> None:
        self.id = ""
        self.name = ""
        self.indexed = False
        self.last_delta = 0
        self._type = ""
        self._arguments: list[str] = []
        self._size = 0
        self._custom = False
        self._vendor: dict[str, Any] = {}

    @property
    def has_arguments(self) -> bool:
        return self._size > 0

    def add(self, piece: ToolCallDelta, name: str | None, arguments: str | None) -> None:
        self.id = self.id or piece.id or ""
        self._type = self._type or piece.type or ""
        self._custom = self._custom or piece.custom is not None
        if vendor := piece.vendor_fields:
            inner = {**self._vendor.get("function", {}), **vendor.get("function", {})}
            self._vendor.update(vendor)
            if inner:
                self._vendor["function"] = inner
        self.say(name, arguments)

    def say(self, name: str | None, arguments: str | None) -> None:
        if name and not self.has_arguments:
            # A name comes whole, whole again and again, growing, or in fragments.
            self.name = name if name.startswith(self.name) else self.name + name
        if not arguments or self.repeats(arguments):
            return
        if arguments.startswith("{") and self.is_empty():
            self._arguments.clear()
            self._size = 0
        self._arguments.append(arguments)
        self._size += len(arguments)

    def is_empty(self) -> bool:
        """Whether the arguments are `{}`, which may stand for those to come, as in the first event of Claude's."""
        return self._size == 2 and not self._custom and _joined(self._arguments) == "{}"

    def is_whole(self) -> bool:
        """Whether the arguments so far are a JSON object, which nothing can go on with."""
        if self._custom or not self._arguments[-1].rstrip().endswith("}"):
            return False
        try:
            msgspec.json.decode(_joined(self._arguments) or "")
        except (msgspec.DecodeError, RecursionError):
            return False
        return True

    def repeats(self, arguments: str) -> bool:
        """Tell whether these are the arguments we have, sent a second time as a whole."""
        return len(arguments) == self._size and arguments == _joined(self._arguments) and self.is_whole()

    def function(self) -> FunctionCall:
        return FunctionCall(name=self.name, arguments=_joined(self._arguments) or "")

    def call(self) -> ToolCall:
        call = ToolCall(id=self.id, type=self._type or ("custom" if self._custom else "function"))
        if self._custom:
            call.custom = CustomToolCall(name=self.name, input=_joined(self._arguments) or "")
        else:
            call.function = self.function()
        if self._vendor:
            call._vendor_fields = dict(self._vendor)
        return call
