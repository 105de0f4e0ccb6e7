"""Where an answer is shown: its text on standard output, and what is not its text apart from it."""

import os
import shutil
import sys
import textwrap
from typing import TextIO

import click

from chatkore_async.cli._printable import printable

ANSWER = "answer"
"""The kind of what is the answer's text; every other kind is shown under its name."""


class _Line:
    """The line of a stream that is being written.

    Args:
        stream: where to; `None` when the shell has closed it.

    Attributes:
        is_terminal: whether somebody sees it, whose terminal no text may drive.
    """

    def __init__(self, stream: TextIO | None) -> None:
        self._stream = stream
        self.is_terminal = stream is not None and stream.isatty()
        self._dims = self.is_terminal and os.environ.get("TERM") not in ("dumb", "unknown")
        self._held = ""
        self._open = False

    def write(self, piece: str, *, dim: bool = False) -> None:
        """Show text at once, but line ends not before something follows them: `end` writes the last one."""
        text = self._held + (printable(piece) if self.is_terminal else piece)
        shown = text.rstrip("\n")
        self._held = text[len(shown) :]
        if shown:
            self._put(shown, dim=dim)
            self._open = True

    def end(self) -> None:
        """Finish the line, if there is one."""
        if self._open:
            self._put("\n", dim=False)
        self._held, self._open = "", False

    def _put(self, text: str, *, dim: bool) -> None:
        if self._stream is None:
            return
        if dim and self._dims:
            click.echo(click.style(text, dim=True), file=self._stream, nl=False)
            return
        # Not by click, which takes out of a text for a pipe what looks like a colour.
        self._stream.write(text)
        self._stream.flush()


class Paper:
    """Where an answer, and what is said about it, is shown.

    On a terminal everything comes in its order, apart from the answer's text under a label. What a model writes is
    shown there and not obeyed: control characters are replaced. When standard output is no terminal, it gets the text
    of the answer as it came, ended by one line end, and nothing else: the rest goes to standard error.
    """

    def __init__(self) -> None:
        self._out = _Line(sys.stdout)
        self._err = _Line(sys.stderr)
        self._beside = self._out if self._out.is_terminal else self._err
        self._kind: str | None = None
        self._notes: list[str] = []

    @property
    def has_a_reader(self) -> bool:
        """Whether somebody sees notes as they come."""
        return self._err.is_terminal

    def say(self, kind: str, piece: str) -> None:
        """Show a piece of the answer, of its reasoning, or of whatever else it has.

        Args:
            kind: `ANSWER`, or the label of what this is a piece of.
            piece: the text, at once.
        """
        if kind != self._kind:
            self._beside.end()
            # The text alone needs no label, unless it has to be told from what stands above it.
            if kind != ANSWER or (self._kind is not None and self._out.is_terminal):
                self._beside.write(f"{kind}:", dim=True)
                self._beside.end()
            self._kind = kind
        if kind == ANSWER:
            self._out.write(piece)
        else:
            self._beside.write(piece, dim=True)

    def end(self) -> None:
        """End what was said, on a whole line, and show the notes that had to wait for that."""
        self._out.end()
        self._err.end()
        self._kind = None
        notes, self._notes = self._notes, []
        for text in notes:
            self.note(text)

    def note(self, text: str) -> None:
        """Say something about the answer, on standard error: at once, or when what is being said has ended."""
        if self._kind is not None:
            self._notes.append(text)
            return
        self._err.write(self._wrapped(text), dim=True)
        self._err.end()

    def problem(self, problem: click.ClickException) -> None:
        """Say what went wrong, and that it goes on."""
        self._err.write(self._wrapped(f"Error: {problem.format_message()}"))
        self._err.end()

    def _wrapped(self, text: str) -> str:
        """Return what we say with line ends between words; what the model says is the terminal's to wrap."""
        if not self._err.is_terminal:
            return text
        width = shutil.get_terminal_size().columns
        return "\n".join(textwrap.fill(line, width) for line in text.split("\n"))
