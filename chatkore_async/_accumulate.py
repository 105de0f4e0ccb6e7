"""Deltas → one completion, in time linear in what arrived. No I/O.

Chunks are put aside as they come and merged in batches, in one tight loop: a consumer who only reads chunks pays
an `append` for each. Texts are kept in pieces and joined when a completion is asked for.
"""

from collections.abc import Iterable

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
    FunctionCallDelta,
    Logprobs,
    TokenLogprob,
    ToolCall,
    ToolCallDelta,
    Usage,
)

BATCH = 64
"""Chunks put aside before they are merged: enough for a tight loop, few enough to keep a stream's memory flat."""

_NO_TOKENS = Usage()


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

    `pending` is where a stream appends its chunks; `merge()` from time to time keeps it short.
    """

    __slots__ = ("_choices", "_head", "_usage", "pending")

    def __init__(self) -> None:
        self.pending: list[ChatCompletionChunk] = []
        self._choices: dict[int, _ChoiceSoFar] = {}
        self._head = ChatCompletion(object="chat.completion")
        self._usage: Usage | None = None

    def merge(self) -> None:
        """Merge what is pending."""
        pending, self.pending = self.pending, []
        for chunk in pending:
            if not self._head.id or not self._head.model:
                self._take_head(chunk)
            if chunk.usage is not None and chunk.usage != _NO_TOKENS:
                self._usage = chunk.usage  # C6: the last one wins, they are never summed
            if chunk.service_tier is not None:
                self._head.service_tier = chunk.service_tier
            for choice in chunk.choices:
                so_far = self._choices.get(choice.index)
                if so_far is None:
                    so_far = self._choices[choice.index] = _ChoiceSoFar()
                so_far.add(choice)

    def _take_head(self, chunk: ChatCompletionChunk) -> None:
        """C1: the first id, model and time that are not empty win."""
        head = self._head
        head.id = head.id or chunk.id
        head.model = head.model or chunk.model
        head.created = head.created or chunk.created
        head.system_fingerprint = head.system_fingerprint or chunk.system_fingerprint

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

    def completion(self) -> ChatCompletion:
        """Return the completion so far; later chunks do not change it."""
        self.merge()
        whole = msgspec.structs.replace(self._head, usage=self._usage)
        whole.choices = [self._choices[index].choice(index) for index in sorted(self._choices)]
        return whole


class _ChoiceSoFar:
    """One choice while it grows."""

    __slots__ = (
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
        "started",
        "tool_calls",
    )

    def __init__(self) -> None:
        self.started = False
        self.role = ""
        self.content: list[str] = []
        self.reasoning: list[str] = []
        self.reasoning_name: str | None = None
        self.refusal: list[str] = []
        self.finish_reason: str | None = None
        self.tool_calls: _ToolCalls | None = None
        self.function: _CallSoFar | None = None
        self.logprobs: tuple[list[TokenLogprob], list[TokenLogprob]] | None = None
        self.annotations: list[Annotation] | None = None
        self.audio: _AudioSoFar | None = None

    def add(self, choice: ChunkChoice) -> None:
        delta = choice.delta
        if delta.content is not None:
            self.content.append(delta.content)
            self.started = True
        if choice.finish_reason is not None:
            self.finish_reason = self.finish_reason or choice.finish_reason  # C9: once seen, it stays
            self.started = True
        if delta.role is not None:
            self.role = self.role or delta.role
            self.started = True
        if delta.reasoning_content is not None:
            self.reasoning.append(delta.reasoning_content)
            self.reasoning_name = self.reasoning_name or getattr(delta, "_reasoning_name", None)
            self.started = True
        if delta.tool_calls is not None:
            if self.tool_calls is None:
                self.tool_calls = _ToolCalls()
            self.tool_calls.add(delta.tool_calls)
            self.started = True
        if choice.logprobs is not None:
            self._add_logprobs(choice.logprobs)
        if delta.refusal is not None or delta.function_call or delta.annotations or delta.audio:
            self._add_rare(delta)

    def _add_rare(self, delta: ChoiceDelta) -> None:
        self.started = True
        if delta.refusal is not None:
            self.refusal.append(delta.refusal)
        if delta.function_call is not None:
            if self.function is None:
                self.function = _CallSoFar()
            self.function.add_function(delta.function_call)
        if delta.annotations is not None:
            self.annotations = [*(self.annotations or ()), *delta.annotations]
        if delta.audio is not None:
            if self.audio is None:
                self.audio = _AudioSoFar()
            self.audio.add(delta.audio)

    def _add_logprobs(self, logprobs: Logprobs) -> None:
        if self.logprobs is None:
            self.logprobs = ([], [])
        self.logprobs[0].extend(logprobs.content or ())
        self.logprobs[1].extend(logprobs.refusal or ())

    def choice(self, index: int) -> Choice:
        message = ChatCompletionMessage(
            role=self.role or "assistant",
            content=_joined(self.content),
            reasoning_content=_joined(self.reasoning),
            refusal=_joined(self.refusal),
            tool_calls=self.tool_calls.calls() if self.tool_calls else None,
            function_call=self.function.function() if self.function else None,
            annotations=self.annotations,
            audio=self.audio.audio() if self.audio else None,
        )
        if self.reasoning_name:
            message._reasoning_name = self.reasoning_name
        logprobs = (
            Logprobs(content=self.logprobs[0] or None, refusal=self.logprobs[1] or None) if self.logprobs else None
        )
        return Choice(index=index, message=message, finish_reason=self.finish_reason, logprobs=logprobs)


def _joined(pieces: list[str]) -> str | None:
    """Join pieces, and keep the joined text in their place so that the next time only new ones are joined to it."""
    if len(pieces) > 1:
        pieces[:] = ["".join(pieces)]
    return pieces[0] if pieces else None


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

    __slots__ = ("_by_id", "_by_index", "_calls")

    def __init__(self) -> None:
        self._calls: list[_CallSoFar] = []
        self._by_index: dict[int, _CallSoFar] = {}
        self._by_id: dict[str, _CallSoFar] = {}

    def add(self, pieces: Iterable[ToolCallDelta]) -> None:
        for piece in pieces:
            call = self._meant(piece)
            if call is None:
                call = _CallSoFar()
                self._calls.append(call)
            if piece.index is not None:
                self._by_index[piece.index] = call
            if piece.id:
                self._by_id.setdefault(piece.id, call)
            call.add(piece)

    def _meant(self, piece: ToolCallDelta) -> "_CallSoFar | None":
        """Return the call a piece belongs to, or `None` when it begins one: by index, else by id, else the last."""
        name = (piece.function.name if piece.function else None) or (piece.custom.name if piece.custom else None)
        if piece.index is not None:
            call = self._by_index.get(piece.index)
            # One index for several calls: a new id together with a name means another call. A new id without a
            # name does not; there are servers that make up an id for every piece.
            if call is not None and name and piece.id and call.id and piece.id != call.id:
                return self._by_id.get(piece.id)
            return call
        if piece.id and (name or piece.id in self._by_id or not self._calls):
            return self._by_id.get(piece.id)
        last = self._calls[-1] if self._calls else None
        # Neither index nor id: a name after arguments begins the next call.
        return None if last is not None and name and last.has_arguments else last

    def calls(self) -> list[ToolCall]:
        return [call.call() for call in self._calls]


class _CallSoFar:
    __slots__ = ("_arguments", "_custom", "_name", "_size", "_type", "_vendor", "id")

    def __init__(self) -> None:
        self.id = ""
        self._type = ""
        self._name = ""
        self._arguments: list[str] = []
        self._size = 0
        self._custom = False
        self._vendor: dict[str, object] = {}

    @property
    def has_arguments(self) -> bool:
        return self._size > 0

    def add(self, piece: ToolCallDelta) -> None:
        self.id = self.id or piece.id or ""
        self._type = self._type or piece.type or ""
        self._vendor.update(piece.vendor_fields)
        if piece.function is not None:
            self.add_function(piece.function)
        if piece.custom is not None:
            self._custom = True
            self._add(piece.custom.name, piece.custom.input)

    def add_function(self, function: FunctionCallDelta) -> None:
        self._add(function.name, function.arguments)

    def _add(self, name: str | None, arguments: str | None) -> None:
        if name and not self.has_arguments:
            # A name comes whole, whole again and again, growing, or in fragments.
            self._name = name if name.startswith(self._name) else self._name + name
        if arguments and not self._repeats(arguments):
            self._arguments.append(arguments)
            self._size += len(arguments)

    def _repeats(self, arguments: str) -> bool:
        """Tell whether these are the arguments we have, sent a second time as a whole."""
        if len(arguments) != self._size or not arguments.endswith("}") or arguments != _joined(self._arguments):
            return False
        try:
            msgspec.json.decode(arguments)
        except msgspec.DecodeError:
            return False
        return True

    def function(self) -> FunctionCall:
        return FunctionCall(name=self._name, arguments=_joined(self._arguments) or "")

    def call(self) -> ToolCall:
        call = ToolCall(id=self.id, type=self._type or ("custom" if self._custom else "function"))
        if self._custom:
            call.custom = CustomToolCall(name=self._name, input=_joined(self._arguments) or "")
        else:
            call.function = self.function()
        if self._vendor:
            call._vendor_fields = dict(self._vendor)
        return call
