"""The structs we send, and the one `TypedDict` that names every parameter of a call.

`ChatCompletionParams` is for callers and their editors, `ChatCompletionRequest` for those who build requests
ahead of time; a test holds the two together. Nothing here is enforced on construction: what is sent is what was
given, and `_codec` checks the encoded bytes. Source: the ChatKore page and the OpenAI API reference, whose
names these are. Where the page types `temperature` and `top_p` as integers and `stop` as a string, it slips.
"""

from collections.abc import Mapping, Sequence
from typing import Required, TypedDict

import msgspec
from msgspec import UNSET, UnsetType

from ._responses import ChatCompletionMessage, ToolCall

JSONObject = Mapping[str, object]


class _Sent(msgspec.Struct, kw_only=True, omit_defaults=True, repr_omit_defaults=True):
    """What all structs we send have in common: a field that was not given is not encoded, `None` is `null`."""


class TextPart(_Sent, tag_field="type", tag="text"):
    """A piece of text in a message's content."""

    text: str


class ImageURL(_Sent):
    """Where an image is: a URL, or `data:image/png;base64,…`. `detail` is `low`, `high` or `auto`."""

    url: str
    detail: str | UnsetType = UNSET


class ImagePart(_Sent, tag_field="type", tag="image_url"):
    """An image in a message's content."""

    image_url: ImageURL


class InputAudio(_Sent):
    """Sound in base64; `format` is `wav` or `mp3`."""

    data: str
    format: str


class AudioPart(_Sent, tag_field="type", tag="input_audio"):
    """Sound in a message's content."""

    input_audio: InputAudio


class FileContent(_Sent):
    """A file, by upload `file_id` or by `file_data` (base64) and `filename`."""

    file_data: str | UnsetType = UNSET
    file_id: str | UnsetType = UNSET
    filename: str | UnsetType = UNSET


class FilePart(_Sent, tag_field="type", tag="file"):
    """A file in a message's content."""

    file: FileContent


ContentPart = TextPart | ImagePart | AudioPart | FilePart
Content = str | Sequence[ContentPart | JSONObject]


class SystemMessage(_Sent, tag_field="role", tag="system"):
    """Instructions for the model."""

    content: Content
    name: str | UnsetType = UNSET


class DeveloperMessage(_Sent, tag_field="role", tag="developer"):
    """Instructions for reasoning models, which take these in place of system messages."""

    content: Content
    name: str | UnsetType = UNSET


class UserMessage(_Sent, tag_field="role", tag="user"):
    """What the user says."""

    content: Content
    name: str | UnsetType = UNSET


class AssistantMessage(_Sent, tag_field="role", tag="assistant"):
    """What the model said before, when it is written by hand; a received message can be sent as it is."""

    content: Content | None | UnsetType = UNSET
    name: str | UnsetType = UNSET
    refusal: str | None | UnsetType = UNSET
    reasoning_content: str | None | UnsetType = UNSET
    tool_calls: Sequence[ToolCall | JSONObject] | UnsetType = UNSET
    audio: JSONObject | None | UnsetType = UNSET


class ToolMessage(_Sent, tag_field="role", tag="tool"):
    """The result of a tool call, named by `tool_call_id`."""

    content: Content
    tool_call_id: str


Message = (
    SystemMessage | DeveloperMessage | UserMessage | AssistantMessage | ToolMessage | ChatCompletionMessage | JSONObject
)


class ChatCompletionRequest(_Sent):
    """A request, ready to be sent any number of times: `create(request)`, `stream(request)`.

    Give a field as you would give it to `create`. A field left out, or `msgspec.UNSET`, is not sent; `None` is
    sent as `null`.
    """

    model: str
    messages: Sequence[Message]
    audio: JSONObject | None | UnsetType = UNSET
    frequency_penalty: float | None | UnsetType = UNSET
    function_call: str | JSONObject | None | UnsetType = UNSET
    functions: Sequence[JSONObject] | None | UnsetType = UNSET
    logit_bias: Mapping[str, float] | None | UnsetType = UNSET
    logprobs: bool | None | UnsetType = UNSET
    max_completion_tokens: int | None | UnsetType = UNSET
    max_tokens: int | None | UnsetType = UNSET
    metadata: Mapping[str, str] | None | UnsetType = UNSET
    modalities: Sequence[str] | None | UnsetType = UNSET
    moderation: JSONObject | str | None | UnsetType = UNSET
    n: int | None | UnsetType = UNSET
    parallel_tool_calls: bool | None | UnsetType = UNSET
    prediction: JSONObject | None | UnsetType = UNSET
    presence_penalty: float | None | UnsetType = UNSET
    prompt_cache_key: str | None | UnsetType = UNSET
    prompt_cache_options: JSONObject | None | UnsetType = UNSET
    prompt_cache_retention: str | None | UnsetType = UNSET
    reasoning_effort: str | None | UnsetType = UNSET
    response_format: JSONObject | None | UnsetType = UNSET
    safety_identifier: str | None | UnsetType = UNSET
    seed: int | None | UnsetType = UNSET
    service_tier: str | None | UnsetType = UNSET
    stop: str | Sequence[str] | None | UnsetType = UNSET
    store: bool | None | UnsetType = UNSET
    stream_options: JSONObject | None | UnsetType = UNSET
    temperature: float | None | UnsetType = UNSET
    tool_choice: str | JSONObject | None | UnsetType = UNSET
    tools: Sequence[JSONObject] | None | UnsetType = UNSET
    top_logprobs: int | None | UnsetType = UNSET
    top_p: float | None | UnsetType = UNSET
    user: str | None | UnsetType = UNSET
    verbosity: str | None | UnsetType = UNSET
    web_search_options: JSONObject | None | UnsetType = UNSET


class ChatCompletionParams(TypedDict, total=False):
    """Every field of a request, as keyword arguments of `create`, `stream` and every later method."""

    model: Required[str]
    messages: Required[Sequence[Message]]
    audio: JSONObject | None | UnsetType
    frequency_penalty: float | None | UnsetType
    function_call: str | JSONObject | None | UnsetType
    functions: Sequence[JSONObject] | None | UnsetType
    logit_bias: Mapping[str, float] | None | UnsetType
    logprobs: bool | None | UnsetType
    max_completion_tokens: int | None | UnsetType
    max_tokens: int | None | UnsetType
    metadata: Mapping[str, str] | None | UnsetType
    modalities: Sequence[str] | None | UnsetType
    moderation: JSONObject | str | None | UnsetType
    n: int | None | UnsetType
    parallel_tool_calls: bool | None | UnsetType
    prediction: JSONObject | None | UnsetType
    presence_penalty: float | None | UnsetType
    prompt_cache_key: str | None | UnsetType
    prompt_cache_options: JSONObject | None | UnsetType
    prompt_cache_retention: str | None | UnsetType
    reasoning_effort: str | None | UnsetType
    response_format: JSONObject | None | UnsetType
    safety_identifier: str | None | UnsetType
    seed: int | None | UnsetType
    service_tier: str | None | UnsetType
    stop: str | Sequence[str] | None | UnsetType
    store: bool | None | UnsetType
    stream_options: JSONObject | None | UnsetType
    temperature: float | None | UnsetType
    tool_choice: str | JSONObject | None | UnsetType
    tools: Sequence[JSONObject] | None | UnsetType
    top_logprobs: int | None | UnsetType
    top_p: float | None | UnsetType
    user: str | None | UnsetType
    verbosity: str | None | UnsetType
    web_search_options: JSONObject | None | UnsetType
