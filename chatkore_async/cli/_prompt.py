"""Where a user types: a line with a history, and with room for more lines. Loads prompt_toolkit."""

import contextlib
import os
import sys
from collections.abc import Iterable
from pathlib import Path

from prompt_toolkit import PromptSession
from prompt_toolkit.application import create_app_session
from prompt_toolkit.enums import DEFAULT_BUFFER
from prompt_toolkit.filters import has_focus
from prompt_toolkit.formatted_text import FormattedText
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from prompt_toolkit.output.plain_text import PlainTextOutput
from prompt_toolkit.utils import is_dumb_terminal

from chatkore_async.cli._printable import mended

LONGEST = 10_000
"""Characters of the longest message that is kept in the file: a pasted book need not be loaded at each start."""


class _KeptHistory(FileHistory):
    """A history in a file; when that fails, one in memory."""

    def load_history_strings(self) -> Iterable[str]:
        try:
            return super().load_history_strings()
        except OSError:
            return []

    def store_string(self, string: str) -> None:
        if len(string) <= LONGEST:
            with contextlib.suppress(OSError):
                super().store_string(mended(string))


def history_file() -> Path:
    """Return where messages are kept, by the XDG Base Directory Specification.

    Raises:
        RuntimeError: the user has no home.
    """
    state = Path(os.environ.get("XDG_STATE_HOME", ""))
    if not state.is_absolute():  # which the specification wants ignored, as it does an empty one
        state = Path.home() / ".local" / "state"
    return state / "chatkore" / "history"


def make_history(*, kept: bool) -> History:
    """Return a history that only its user can read, in memory alone where there is no place for a file."""
    if kept:
        with contextlib.suppress(OSError, RuntimeError):
            path = history_file()
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            path.touch(mode=0o600)
            path.chmod(0o600)
            return _KeptHistory(path)
    return InMemoryHistory()


class Prompt:
    """A prompt that is shown again and again.

    Args:
        keeps_history: whether what is typed is kept for the next conversation.
    """

    def __init__(self, *, keeps_history: bool) -> None:
        # prompt_toolkit has a prompt of its own for dumb terminals, but shows the cursor first, by escape codes.
        output = PlainTextOutput(sys.stdout) if is_dumb_terminal() else None
        with create_app_session(output=output):
            self._session: PromptSession[str] = PromptSession(
                FormattedText([("bold", "> ")]),
                # Enter is ours: it sends, and what prompt_toolkit calls multi-line is that there may be several.
                multiline=True,
                prompt_continuation=". ",
                key_bindings=_bindings(),
                history=make_history(kept=keeps_history),
                enable_suspend=True,
            )

    async def ask(self, draft: str = "") -> str | None:
        """Return what was typed, or `None` when it was thrown away by Ctrl-C.

        Args:
            draft: what stands there already.

        Raises:
            EOFError: Ctrl-D was pressed on an empty line, or there is no keyboard any more.
        """
        try:
            # SIGINT is the caller's: in raw mode Ctrl-C is a key like any other.
            text = await self._session.prompt_async(default=draft, handle_sigint=False, set_exception_handler=False)
        except KeyboardInterrupt:
            return None
        return mended(text)

    @property
    def typed(self) -> str:
        """What stands, or stood, on the line."""
        return self._session.default_buffer.text


def _bindings() -> KeyBindings:
    bindings = KeyBindings()
    typing = has_focus(DEFAULT_BUFFER)

    @bindings.add("enter", filter=typing)
    def _(event: KeyPressEvent) -> None:
        line = event.current_buffer
        if line.document.is_cursor_at_the_end and line.text.endswith("\\"):
            line.delete_before_cursor()
            line.newline(copy_margin=False)
        else:
            line.validate_and_handle()

    @bindings.add("escape", "enter", filter=typing)
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.newline(copy_margin=False)

    return bindings
