"""What an unscripted answer reads of a request; all else in it is skipped unread."""

from typing import Annotated

import msgspec

from chatkore_async.testing._replies import error
from chatkore_async.testing._steps import Reply

__all__ = ["Asked", "Function", "Message", "parse"]


class Part(msgspec.Struct):
    """One part of a message's content."""

    text: str | None = None


class Message(msgspec.Struct):
    """One message of the conversation."""

    role: str
    content: str | list[Part] | None = None

    @property
    def text(self) -> str:
        """The content's text, joined."""
        if isinstance(self.content, list):
            return " ".join(part.text for part in self.content if part.text)
        return self.content or ""


class Function(msgspec.Struct):
    """A function the model may call, or has to."""

    name: str
    parameters: dict[str, object] | None = None


class Tool(msgspec.Struct):
    """An entry of ``tools``, or a ``tool_choice`` that names one."""

    function: Function | None = None


class JsonSchema(msgspec.Struct):
    """The ``json_schema`` of a response format."""

    schema: dict[str, object] | bool = True


class ResponseFormat(msgspec.Struct):
    """``response_format``."""

    type: str
    json_schema: JsonSchema = msgspec.field(default_factory=JsonSchema)


class StreamOptions(msgspec.Struct):
    """``stream_options``."""

    include_usage: bool | None = None


class Asked(msgspec.Struct):
    """The body of a request to ``chat/completions``."""

    model: str
    messages: Annotated[list[Message], msgspec.Meta(min_length=1)]
    n: Annotated[int, msgspec.Meta(ge=1, le=128)] | None = None
    max_tokens: Annotated[int, msgspec.Meta(ge=1)] | None = None
    max_completion_tokens: Annotated[int, msgspec.Meta(ge=1)] | None = None
    stop: str | list[str] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    tools: list[Tool] | None = None
    tool_choice: str | Tool | None = None
    parallel_tool_calls: bool | None = None
    response_format: ResponseFormat | None = None


_decoder = msgspec.json.Decoder(Asked)


def parse(body: bytes) -> Asked | Reply:
    """Return the request, or the error that a body which is none deserves: 400 in OpenAI's shape."""
    try:
        return _decoder.decode(body)
    except msgspec.ValidationError as problem:
        return error(400, f"Invalid request: {problem}", code="invalid_value")
    except (msgspec.DecodeError, UnicodeDecodeError) as problem:
        return error(400, f"We could not parse the JSON body of your request: {problem}", code="invalid_json")
