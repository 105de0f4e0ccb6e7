"""chatkore_async: the asyncio client for ChatKore. Unofficial.

async with AsyncChatKore() as client:
    completion = await client.chat.completions.create(
        model="gpt-4o-mini", messages=[{"role": "user", "content": "Hello"}])
    print(completion.text)
"""

from ._client import AsyncChatKore
from ._config import Limits, RateLimit, RetryBudget, RetryPolicy, Timeout
from ._estimate import estimate_tokens, estimate_with_tiktoken
from ._fanout import MapResults
from ._hooks import AttemptStart, CallEnd, CallStart, FirstToken, Hook, Retry
from ._limiter import Demand, Limiter, Report
from ._meta import CallMeta, PoolStats
from ._ratelimiter import RateLimiter
from ._requests import ChatCompletionRequest
from ._responses import ChatCompletion, ChatCompletionChunk
from ._stream import ChatStream
from ._version import __version__
from ._workers import MapResult
from .errors import (
    APIConnectionError,
    APIError,
    APIStatusError,
    APITimeoutError,
    AuthenticationError,
    BadRequestError,
    BatchError,
    ChatKoreError,
    ConfigurationError,
    ConflictError,
    ContentPolicyError,
    ContextLengthExceededError,
    InsufficientQuotaError,
    InternalServerError,
    InvalidRequestError,
    InvalidResponseError,
    NoChannelError,
    NotFoundError,
    PermissionDeniedError,
    RateLimitError,
    RequestTooLargeError,
    StreamError,
    StreamInterruptedError,
    StreamStalledError,
    UnprocessableEntityError,
)

__all__ = [
    "APIConnectionError",
    "APIError",
    "APIStatusError",
    "APITimeoutError",
    "AsyncChatKore",
    "AttemptStart",
    "AuthenticationError",
    "BadRequestError",
    "BatchError",
    "CallEnd",
    "CallMeta",
    "CallStart",
    "ChatCompletion",
    "ChatCompletionChunk",
    "ChatCompletionRequest",
    "ChatKoreError",
    "ChatStream",
    "ConfigurationError",
    "ConflictError",
    "ContentPolicyError",
    "ContextLengthExceededError",
    "Demand",
    "FirstToken",
    "Hook",
    "InsufficientQuotaError",
    "InternalServerError",
    "InvalidRequestError",
    "InvalidResponseError",
    "Limiter",
    "Limits",
    "MapResult",
    "MapResults",
    "NoChannelError",
    "NotFoundError",
    "PermissionDeniedError",
    "PoolStats",
    "RateLimit",
    "RateLimitError",
    "RateLimiter",
    "Report",
    "RequestTooLargeError",
    "Retry",
    "RetryBudget",
    "RetryPolicy",
    "StreamError",
    "StreamInterruptedError",
    "StreamStalledError",
    "Timeout",
    "UnprocessableEntityError",
    "__version__",
    "estimate_tokens",
    "estimate_with_tiktoken",
]
