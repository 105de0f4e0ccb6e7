"""Values that servers send in headers; `None` where a header is absent or nonsense. No I/O.

Headers are looked up by lower-case name.
"""

import re
from collections.abc import Mapping
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any

from ._meta import RateLimitInfo


def plain_headers(headers: Mapping[str, str]) -> dict[str, str]:
    """Return headers as a plain dict, names in lower case, repeated ones joined (RFC 9110 §5.3)."""
    plain: dict[str, str] = {}
    for name, value in headers.items():
        known = plain.get(name.lower())
        plain[name.lower()] = value if known is None else f"{known}, {value}"
    return plain


_ID_HEADERS = ("x-oneapi-request-id", "x-request-id", "request-id", "x-litellm-call-id", "apim-request-id", "cf-ray")


def request_id(headers: Mapping[str, str]) -> str | None:
    """Return the server's name for a request, from the first header that has one (E1)."""
    for name in _ID_HEADERS:
        if found := headers.get(name):
            return found
    return None


def retry_after(headers: Mapping[str, str], now: datetime | None = None) -> float | None:
    """Return the seconds a server asks to wait, or `None`; nonsense and times past are none (E15).

    Source: RFC 9110 §10.2.3 for `retry-after` in seconds or as a date; `retry-after-ms` is OpenAI's and Azure's,
    and fractions of a second are common.
    """
    if (milliseconds := _duration(headers.get("retry-after-ms", ""))) is not None:
        return milliseconds / 1000
    value = headers.get("retry-after", "")
    if (seconds := _duration(value)) is not None:
        return seconds
    try:
        date = parsedate_to_datetime(value)
        date = date if date.tzinfo else date.replace(tzinfo=UTC)
        seconds = (date - (now or datetime.now(UTC))).total_seconds()
    except (ValueError, OverflowError, IndexError, TypeError):  # what the parser raises for nonsense
        return None
    return seconds if seconds >= 0 else None


_DURATION = r"(?a)(\d{1,12}(?:\.\d{1,12})?)(ms|us|µs|s|m|h|d)"

_UNITS = {"us": 1e-6, "µs": 1e-6, "ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


def rate_limit(headers: Mapping[str, str]) -> RateLimitInfo | None:
    """Return what `x-ratelimit-*` headers say, or `None` when there are none (E15: `6m0s`, `1s`, `20ms`)."""
    values: dict[str, Any] = {}
    for what in ("requests", "tokens"):
        for kind in ("limit", "remaining"):
            value = headers.get(f"x-ratelimit-{kind}-{what}", "").strip()
            if re.fullmatch(r"\d{1,18}", value, re.ASCII):
                values[f"{kind}_{what}"] = int(value)
        if (seconds := _duration(headers.get(f"x-ratelimit-reset-{what}", ""))) is not None:
            values[f"reset_{what}"] = seconds
    return RateLimitInfo(**values) if values else None


def _duration(value: str) -> float | None:
    """Return seconds, from a number of them or from Go's form; `None` for what is negative, endless or nonsense."""
    value = value.strip()
    parts = re.findall(_DURATION, value)
    if parts and "".join(number + unit for number, unit in parts) == value:
        return sum(float(number) * _UNITS[unit] for number, unit in parts)
    try:
        seconds = float(value)
    except ValueError:
        return None
    return seconds if 0 <= seconds < float("inf") else None
