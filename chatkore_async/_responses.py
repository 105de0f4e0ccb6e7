"""The structs we receive. One message decodes straight into them, from bytes, in one pass.

Every field has a default, since servers leave things out. What a field is declared as is what it holds: a
message that sends anything else fails this strict decoding and takes the tolerant path (`_tolerant`), alone.

Fields whose names begin with an underscore are gates. They are declared with a type that the value in question
does not have, so that a message which needs care (an `error` beside the choices, `reasoning` in place of
`reasoning_content`) fails strict decoding as well. A gate costs nothing on the messages that pass.
"""

from typing import Annotated, Any, Literal, cast

import msgspec
from msgspec import UNSET, UnsetType

from ._json import overlaid, parse
from ._meta import Carrier, MetaCarrier

FinishReason = Annotated[str, msgspec.Meta(min_length=1, pattern="^(?!null$)")]
"""Why a choice ended. Not an enum: vendors invent values. `""` and `"null"` mean none (gate)."""

Completeness = Literal["complete", "unconfirmed", "truncated"]
"""How an answer ended: every choice with a finish reason; without, though the server said it was done; cut."""

_NullGate = None | UnsetType
_ShutGate = UnsetType
_GatedStr = Annotated[str, msgspec.Meta(min_length=1)]  # `""` means the default


# Not known to the garbage collector, which a busy service would have look at every delta: nothing here leads back to
# itself.
class _Received(msgspec.Struct, kw_only=True, repr_omit_defaults=True, gc=False):
    """What all received structs have in common."""


class FunctionCall(_Received, forbid_unknown_fields=True):
    """The function a model wants called. `arguments` is a JSON string, as the model wrote it."""

    name: str = ""
    arguments: str = ""


class CustomToolCall(_Received, forbid_unknown_fields=True):
    """The custom tool a model wants called, with free-form `input`."""

    name: str = ""
    input: str = ""


class VendorFields(Carrier):
    """Carries the keys a vendor put into a tool call (Gemini's signatures), to be sent back with it."""

    __slots__ = ("_vendor_fields",)

    _vendor_fields: dict[str, Any]

    @property
    def vendor_fields(self) -> dict[str, Any]:
        """Keys of the tool call that are not declared, by name; empty when there are none."""
        return getattr(self, "_vendor_fields", None) or {}


# Unknown keys are forbidden in tool calls so that a call that has some takes the tolerant path, which keeps them.
class ToolCall(VendorFields, _Received, forbid_unknown_fields=True):
    """A tool call of a finished message. It can be sent back as it is, inside a message or a dict."""

    id: str = ""
    type: _GatedStr = "function"
    function: FunctionCall = msgspec.field(default_factory=FunctionCall)
    custom: CustomToolCall | UnsetType = UNSET


class UrlCitation(_Received):
    """A web page that a span of the content cites; indexes count characters."""

    start_index: int = 0
    end_index: int = 0
    url: str = ""
    title: str = ""


class Annotation(_Received):
    """Something the content refers to, such as a page that a web search found."""

    type: str = ""
    url_citation: UrlCitation | None = None


class Audio(_Received):
    """Spoken output: `data` in base64, `expires_at` in Unix seconds."""

    id: str = ""
    data: str = ""
    expires_at: int = 0
    transcript: str = ""


class _ReasoningName(Carrier):
    __slots__ = ("_reasoning_name",)

    _reasoning_name: str


class ChatCompletionMessage(_ReasoningName, _Received):
    """A model's message. It can be put into the `messages` of the next call as it is.

    `content` is the text or `None`; `reasoning_content` what the model thought aloud, under whichever name the
    vendor sent it; `refusal` why it declined.
    """

    role: _GatedStr = "assistant"
    content: str | None = None
    reasoning_content: str | None = None
    refusal: str | None = None
    annotations: list[Annotation] | None = None
    tool_calls: list[ToolCall] | None = None
    function_call: FunctionCall | None = None
    audio: Audio | None = None
    _reasoning: _NullGate = msgspec.field(name="reasoning", default=UNSET)


class TopLogprob(_Received):
    """A token the model could have chosen; `logprob` is a natural logarithm."""

    token: str = ""
    logprob: float = 0.0
    bytes: list[int] | None = None


class TokenLogprob(_Received):
    """The token the model chose, and the likeliest others."""

    token: str = ""
    logprob: float = 0.0
    bytes: list[int] | None = None
    top_logprobs: list[TopLogprob] = []


class Logprobs(_Received):
    """Log probabilities of a choice's tokens, when `logprobs` was asked for."""

    content: list[TokenLogprob] | None = None
    refusal: list[TokenLogprob] | None = None


class PromptTokensDetails(_Received):
    """How the prompt's tokens divide."""

    cached_tokens: int | None = None
    audio_tokens: int | None = None


class CompletionTokensDetails(_Received):
    """How the completion's tokens divide."""

    reasoning_tokens: int | None = None
    audio_tokens: int | None = None
    accepted_prediction_tokens: int | None = None
    rejected_prediction_tokens: int | None = None


class Usage(_Received):
    """Tokens a call was billed for."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    total_tokens: int = 0
    prompt_tokens_details: PromptTokensDetails | None = None
    completion_tokens_details: CompletionTokensDetails | None = None


class Choice(_Received):
    """One of the `n` answers of a completion."""

    index: int = 0
    message: ChatCompletionMessage = msgspec.field(default_factory=ChatCompletionMessage)
    logprobs: Logprobs | None = None
    finish_reason: _GatedStr | None = None  # a pattern takes a third of a microsecond; `decode_completion` looks
    _delta: _ShutGate = msgspec.field(name="delta", default=UNSET)
    _usage: _NullGate = msgspec.field(name="usage", default=UNSET)
    _error: _NullGate = msgspec.field(name="error", default=UNSET)


class Mended(bytes):
    """A message that strict decoding refused: what it means was found out, and is not what everybody reads in it."""

    __slots__ = ()


_SAID_ELSEWHERE = frozenset({"message", "delta", "reasoning", "error", "usage", "x_groq"})
"""Names by which a message that was mended says what a declared field holds since."""


class _Answer(MetaCarrier):
    """What completions and chunks share: the bytes they came from."""

    __slots__ = ()

    def to_dict(self) -> dict[str, Any]:
        """Return the whole JSON as the server sent it, vendor fields included, decoded on demand.

        An object that was not decoded from one message (made by hand, or merged from a stream) gives its
        declared fields.

        Raises:
            ValueError: a vendor field holds what Python cannot (a number of thousands of digits).
        """
        raw = getattr(self, "_raw", None)
        if raw is None:
            return cast("dict[str, Any]", msgspec.to_builtins(self))
        whole = parse(raw)
        return cast("dict[str, Any]", cast("list[object]", whole)[0] if isinstance(whole, list) else whole)

    def to_json(self) -> bytes:
        """Return JSON in the API's own form, for whoever speaks it too.

        These are the bytes that arrived, where they have that form. A message that had to be mended is encoded anew:
        declared fields as they were understood, the vendor's as they came. So is what was made by hand, or merged from
        a stream.
        """
        raw = getattr(self, "_raw", None)
        if raw is not None and not isinstance(raw, Mended):
            return cast("bytes", raw)
        declared = cast("dict[str, Any]", msgspec.to_builtins(self))
        try:
            return msgspec.json.encode(overlaid({} if raw is None else self.to_dict(), declared, _SAID_ELSEWHERE))
        except (ValueError, OverflowError):  # a vendor's number that Python or JSON cannot hold
            return msgspec.json.encode(overlaid({}, declared, _SAID_ELSEWHERE))


class ChatCompletion(_Answer, _Received):
    """A whole answer to `chat.completions.create`.

    Source: the `chat.completion` object of the OpenAI API, which ChatKore speaks. `created` is in Unix seconds.
    """

    id: str = ""
    object: str = ""
    created: int = 0
    model: str = ""
    choices: list[Choice] = []
    usage: Usage | None = None
    service_tier: str | None = None
    system_fingerprint: str | None = None
    _error: _NullGate = msgspec.field(name="error", default=UNSET)
    _x_groq: _ShutGate = msgspec.field(name="x_groq", default=UNSET)

    @property
    def text(self) -> str:
        """The first choice's content, or `""`."""
        return (self.choices[0].message.content or "") if self.choices else ""

    @property
    def tool_calls(self) -> list[ToolCall]:
        """The first choice's tool calls; empty when there are none."""
        return (self.choices[0].message.tool_calls or []) if self.choices else []

    @property
    def completeness(self) -> Completeness:
        """`"complete"` when every choice has a finish reason, else `"unconfirmed"`."""
        finished = self.choices and all(choice.finish_reason is not None for choice in self.choices)
        return "complete" if finished else "unconfirmed"


class FunctionCallDelta(_Received, forbid_unknown_fields=True):
    """A piece of a function call; `arguments` pieces are to be joined."""

    name: str | None = None
    arguments: str | None = None


class CustomToolCallDelta(_Received, forbid_unknown_fields=True):
    """A piece of a custom tool call; `input` pieces are to be joined."""

    name: str | None = None
    input: str | None = None


class ToolCallDelta(VendorFields, _Received, forbid_unknown_fields=True):
    """A piece of a tool call. `index` tells which call it belongs to, where the server sends one."""

    index: int | None = None
    id: str | None = None
    type: str | None = None
    function: FunctionCallDelta | None = None
    custom: CustomToolCallDelta | None = None


class AudioDelta(_Received):
    """A piece of spoken output; `data` and `transcript` pieces are to be joined."""

    id: str | None = None
    data: str | None = None
    expires_at: int | None = None
    transcript: str | None = None


class ChoiceDelta(_ReasoningName, _Received):
    """What a chunk adds to a choice."""

    role: str | None = None
    content: str | None = None
    reasoning_content: str | None = None
    refusal: str | None = None
    tool_calls: list[ToolCallDelta] | None = None
    function_call: FunctionCallDelta | None = None
    annotations: list[Annotation] | None = None
    audio: AudioDelta | None = None
    _reasoning: _NullGate = msgspec.field(name="reasoning", default=UNSET)


class ChunkChoice(_Received):
    """One choice's part of a chunk."""

    index: int = 0
    delta: ChoiceDelta = msgspec.field(default_factory=ChoiceDelta)
    logprobs: Logprobs | None = None
    finish_reason: FinishReason | None = None
    _message: _ShutGate = msgspec.field(name="message", default=UNSET)
    _usage: _NullGate = msgspec.field(name="usage", default=UNSET)
    _error: _NullGate = msgspec.field(name="error", default=UNSET)


class ChatCompletionChunk(_Answer, _Received):
    """One event of a stream.

    Source: the `chat.completion.chunk` object of the OpenAI API.
    """

    id: str = ""
    object: str = ""
    created: int = 0
    model: str = ""
    service_tier: str | None = None
    system_fingerprint: str | None = None
    choices: list[ChunkChoice] = []
    usage: Usage | None = None
    _error: _NullGate = msgspec.field(name="error", default=UNSET)
    _x_groq: _ShutGate = msgspec.field(name="x_groq", default=UNSET)

    @property
    def text(self) -> str:
        """The first choice's content, or `""`."""
        return (self.choices[0].delta.content or "") if self.choices else ""

    @property
    def raw(self) -> bytes:
        """The event's data as it arrived; for a chunk made by hand, its encoding."""
        raw = getattr(self, "_raw", None)
        return bytes(raw) if raw is not None else msgspec.json.encode(self)  # and not a `Mended`


class Model(_Received):
    """A model that the endpoint offers; `created` is in Unix seconds."""

    id: str = ""
    object: str = ""
    created: int = 0
    owned_by: str = ""
