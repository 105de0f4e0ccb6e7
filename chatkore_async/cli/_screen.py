"""Where a command shows what it does: a terminal, by way of Rich, or plain lines for anything else."""

import contextlib
import sys
from collections.abc import Callable, Generator, Sequence
from contextlib import AbstractContextManager
from typing import Protocol, TypeAlias

import click
from rich import box
from rich.cells import cell_len
from rich.console import Console
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table
from rich.text import Text

Advance: TypeAlias = Callable[[str], None]
"""Count one thing done, with a note on how it goes."""

# Readable on dark and on light: no white, no black, no yellow.
_ACCENT = "cyan"
_GOOD = "green"
_BAD = "red"

_NARROW = 60
"""Columns below which a progress bar has no room for a note."""


class Screen(Protocol):
    """What a command may show."""

    def intro(self, title: str, text: str) -> None:
        """Say what comes."""
        ...

    def heading(self, text: str) -> None:
        """Begin a part."""
        ...

    def line(self, text: str) -> None:
        """Show a line."""
        ...

    def aside(self, text: str) -> None:
        """Show a line of less weight."""
        ...

    def writing(self) -> AbstractContextManager[Callable[[str], None]]:
        """Return a context whose function shows text piece by piece, and which ends the line however it is left."""
        ...

    def progress(self, total: int, unit: str) -> AbstractContextManager[Advance]:
        """Return a context whose function counts to `total`."""
        ...

    def table(self, title: str, rows: Sequence[tuple[str, str]]) -> None:
        """Show names and values."""
        ...

    def verdict(self, text: str, *, good: bool) -> None:
        """Say how it ended."""
        ...


def make_screen() -> Screen:
    """Return the screen for standard output as it is now."""
    console = Console(highlight=False)
    # Rich can be told by variables that a pipe is a terminal. A pipe still gets no cursor movements from us.
    if sys.stdout.isatty() and console.is_terminal and not console.is_dumb_terminal:
        return Terminal(console)
    return Plain()


class Plain:
    """Lines without colours, for pipes, files and dumb terminals; each is out before the next is begun."""

    def intro(self, title: str, text: str) -> None:
        """Say what comes."""
        click.echo(f"{title}: {text}")

    def heading(self, text: str) -> None:
        """Begin a part."""
        click.echo(f"\n{text}")

    def line(self, text: str) -> None:
        """Show a line."""
        click.echo(text)

    aside = line

    @contextlib.contextmanager
    def writing(self) -> Generator[Callable[[str], None], None, None]:
        """Show text piece by piece."""
        try:
            yield lambda piece: click.echo(piece, nl=False)
        finally:
            click.echo()

    @contextlib.contextmanager
    def progress(self, total: int, unit: str) -> Generator[Advance, None, None]:
        """Show a line for each tenth."""
        done = 0

        def advance(note: str) -> None:
            nonlocal done
            done += 1
            if done * 10 // total > (done - 1) * 10 // total:
                click.echo(f"{done}/{total} {unit}" + (f", {note}" if note else ""))

        yield advance

    def table(self, title: str, rows: Sequence[tuple[str, str]]) -> None:
        """Show names and values in two columns."""
        width = max(len(name) for name, _ in rows)
        click.echo(f"\n{title}")
        for name, value in rows:
            click.echo(f"{name:{width}}  {value}")

    def verdict(self, text: str, *, good: bool) -> None:  # noqa: ARG002 - the words say it too
        """Say how it ended."""
        click.echo(f"\n{text}")


class Terminal:
    """A terminal of any width.

    Args:
        console: Rich's; it knows the width, `NO_COLOR` and whether there is anything but ASCII.
    """

    def __init__(self, console: Console) -> None:
        self._console = console

    def intro(self, title: str, text: str) -> None:
        """Say what comes, in a frame."""
        self._console.print(Panel(Text(text), title=title, title_align="left", border_style=_ACCENT, box=box.ROUNDED))

    def heading(self, text: str) -> None:
        """Begin a part."""
        self._console.print(Text(f"\n{text}", style=f"bold {_ACCENT}"))

    def line(self, text: str) -> None:
        """Show a line, wrapped at words."""
        self._console.print(Text(text))

    def aside(self, text: str) -> None:
        """Show a line of less weight."""
        self._console.print(Text(text, style="dim"))

    @contextlib.contextmanager
    def writing(self) -> Generator[Callable[[str], None], None, None]:
        """Show text piece by piece; a piece that does not fit begins a line."""
        column = 0

        def write(piece: str) -> None:
            nonlocal column
            if column + cell_len(piece.rstrip()) > self._console.width:
                self._console.out()
                column, piece = 0, piece.lstrip()
            self._console.out(piece, end="", highlight=False)
            column += cell_len(piece)

        try:
            yield write
        finally:
            self._console.out()

    @contextlib.contextmanager
    def progress(self, total: int, unit: str) -> Generator[Advance, None, None]:
        """Show a bar, a count and a note; the cursor is hidden meanwhile, and comes back however this is left."""
        wide = self._console.width >= _NARROW
        columns = [
            # Not to the edge: there a terminal writes ^C, which would wrap the line and leave it there twice.
            BarColumn(bar_width=28 if wide else 20, style="dim", complete_style=_ACCENT, finished_style=_GOOD),
            MofNCompleteColumn(),
            TextColumn(unit),
            *([TextColumn("{task.fields[note]}", style="dim")] if wide else []),
        ]
        with Progress(*columns, console=self._console) as bar:
            task = bar.add_task("", total=total, note="")
            yield lambda note: bar.update(task, advance=1, note=note)

    def table(self, title: str, rows: Sequence[tuple[str, str]]) -> None:
        """Show names and values in two columns."""
        table = Table(title=title, title_justify="left", title_style="bold", box=box.ROUNDED, show_header=False)
        table.add_column(style=_ACCENT)
        table.add_column()
        for name, value in rows:
            table.add_row(Text(name), Text(value))
        self._console.print()
        self._console.print(table)

    def verdict(self, text: str, *, good: bool) -> None:
        """Say how it ended, in green or red."""
        self._console.print(Text(text, style=f"bold {_GOOD if good else _BAD}"))
