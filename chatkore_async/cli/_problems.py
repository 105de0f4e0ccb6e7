"""What went wrong, as a line that says so and a line that says what to do about it."""

import click

from chatkore_async import (
    APIConnectionError,
    APIError,
    APITimeoutError,
    AuthenticationError,
    ChatKoreError,
    ConfigurationError,
    InvalidRequestError,
    NotFoundError,
    StreamInterruptedError,
)
from chatkore_async.cli._printable import printable

_DOCTOR = "`chatkore doctor` looks at the connection step by step"
_DEBUG = "run it again with --debug to see where this came from"

# The first class that fits decides, so that a class stands before its bases.
_HINTS: tuple[tuple[type[Exception], str], ...] = (
    (ConfigurationError, "options, CHATKORE_API_KEY and CHATKORE_BASE_URL are what settles it; see `chatkore doctor`"),
    (InvalidRequestError, "see --help for what each option takes"),
    (AuthenticationError, "is CHATKORE_API_KEY the key of this server? `chatkore doctor` tries it"),
    (NotFoundError, "`chatkore doctor` shows where the requests go and which models there are"),
    (APITimeoutError, "--timeout allows more seconds; `chatkore doctor` shows what takes so long"),
    (StreamInterruptedError, "what came before is all there is; ask again"),
    (APIConnectionError, _DOCTOR),
)


class Problem(click.ClickException):
    """An error at the terminal: what is wrong, and what to do.

    Args:
        line: what is wrong, in one line.
        hint: what to do about it.
    """

    def __init__(self, line: str, hint: str) -> None:
        # A server's words may be in both, and a terminal is to show them and not to obey them.
        super().__init__(f"{printable(line)}\nHint: {printable(hint)}")


def explained(error: Exception) -> Problem:
    """Return an exception of the client, of the system or of our own making as a problem for the terminal."""
    hint = next((hint for kind, hint in _HINTS if isinstance(error, kind)), _DEBUG)
    text = " ".join(str(error).split())
    if isinstance(error, APIError) and error.hint:
        hint = error.hint.rstrip(".")
        # The line of an APIError holds its hint, which stands on a line of its own here.
        text = text.replace(f". Hint: {' '.join(hint.split())}", "")
    if not text or not isinstance(error, ChatKoreError | OSError):
        text = f"{type(error).__name__}: {text}"
    return Problem(text, hint)
