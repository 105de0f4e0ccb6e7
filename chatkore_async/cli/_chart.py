"""Where findings are shown as they come: a terminal, by way of Rich, or plain lines for anything else."""

import contextlib
from contextlib import AbstractContextManager
from typing import Protocol

import click
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from chatkore_async.cli._finding import STEPS, Finding, Status
from chatkore_async.cli._screen import Plain, make_screen

# As on the screens of other commands: readable on dark and on light.
_STYLES: dict[Status, str] = {"ok": "green", "warn": "bold magenta", "fail": "bold red", "skip": "dim"}

_STEP = max(map(len, STEPS))
_INDENT = 4 + 2 + _STEP + 2  # a status, a step, and two blanks after each
_NARROW = 60
"""Columns below which what was seen goes below its step, not beside it."""


class Chart(Protocol):
    """What shows findings."""

    def begin(self, text: str) -> None:
        """Say what is looked at."""
        ...

    def working(self, step: str) -> AbstractContextManager[object]:
        """Return a context in which a step is being looked at."""
        ...

    def show(self, finding: Finding) -> None:
        """Show a finding."""
        ...

    def end(self, text: str, *, good: bool) -> None:
        """Say how it ended."""
        ...


def make_chart() -> Chart:
    """Return the chart for standard output as it is now."""
    return PlainChart() if isinstance(make_screen(), Plain) else TerminalChart(Console(highlight=False))


class Silent:
    """No chart at all, for when everything is shown as one document at the end."""

    def begin(self, text: str) -> None:
        """Say nothing."""

    def working(self, step: str) -> AbstractContextManager[object]:  # noqa: ARG002 - the protocol's
        """Show nothing."""
        return contextlib.nullcontext()

    def show(self, finding: Finding) -> None:
        """Show nothing."""

    def end(self, text: str, *, good: bool) -> None:
        """Say nothing."""


class PlainChart:
    """A line for each finding, and one each for what it means and what to change."""

    def begin(self, text: str) -> None:
        """Say what is looked at."""
        click.echo(f"{text}\n")

    def working(self, step: str) -> AbstractContextManager[object]:  # noqa: ARG002 - the protocol's
        """Show nothing until there is something."""
        return contextlib.nullcontext()

    def show(self, finding: Finding) -> None:
        """Show a finding."""
        click.echo(f"{finding.status:4}  {finding.step:{_STEP}}  {finding.seen}")
        for means, change in finding.remarks:
            click.echo(f"{'':{_INDENT}}means: {means}")
            click.echo(f"{'':{_INDENT}}change: {change}")

    def end(self, text: str, *, good: bool) -> None:  # noqa: ARG002 - the words say it too
        """Say how it ended."""
        click.echo(f"\n{text}")


class TerminalChart:
    """A terminal of any width.

    Args:
        console: Rich's; it knows the width and `NO_COLOR`.
    """

    def __init__(self, console: Console) -> None:
        self._console = console

    def begin(self, text: str) -> None:
        """Say what is looked at."""
        self._console.print(Text(f"{text}\n", style="dim"))

    def working(self, step: str) -> AbstractContextManager[object]:
        """Show that a step is being looked at, and hide the cursor meanwhile."""
        return self._console.status(Text(step, style="dim"), spinner="line")

    def show(self, finding: Finding) -> None:
        """Show a finding: beside its step where there is room, else below."""
        status = Text(f"{finding.status:4}", style=_STYLES[finding.status])
        body = Text(finding.seen, style="dim" if finding.status == "skip" else "")
        for means, change in finding.remarks:
            body.append("\nmeans  ", style="cyan").append(means)
            body.append("\nchange ", style="cyan").append(change)
        if self._console.width < _NARROW:
            self._console.print(status.append(f"  {finding.step}", style="not bold default"))
            self._console.print(Padding(body, (0, 0, 0, 2)))
            return
        grid = Table.grid(padding=(0, 2))
        grid.add_column(width=4)
        grid.add_column(width=_STEP)
        grid.add_column(overflow="fold")
        grid.add_row(status, Text(finding.step), body)
        self._console.print(grid)

    def end(self, text: str, *, good: bool) -> None:
        """Say how it ended, in green or red."""
        self._console.print(Text(f"\n{text}", style=f"bold {'green' if good else 'red'}"))
