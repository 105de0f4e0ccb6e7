"""How far a batch is: a bar on a terminal, a line now and then for anything else."""

import contextlib
import time
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager
from typing import Protocol, TypeAlias

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from chatkore_async.batch import BatchSummary
from chatkore_async.cli._screen import Screen, Terminal

Show: TypeAlias = Callable[[BatchSummary], None]

_WIDE = 100
"""Columns from which a long bar has room beside all there is to say."""

_NARROW = 70
"""Columns below which there is room for the time left only."""

_OFTEN = 0.1
_SELDOM = 60.0
"""Seconds between two pictures of a terminal, and between two lines of a log that is not a tenth further."""


class Meter(Protocol):
    """What shows progress."""

    def running(self) -> AbstractContextManager[Show]:
        """Return a context whose function shows how far it is."""
        ...


def make_meter(screen: Screen) -> Meter:
    """Return the meter that goes with a screen."""
    return TerminalMeter(Console(highlight=False)) if isinstance(screen, Terminal) else PlainMeter()


def remarks(summary: BatchSummary, began: float) -> list[str]:
    """Return what there is to say beside the count: failures, rate, tokens, time left.

    Args:
        summary: how far it is.
        began: the seconds that had passed when the first request was asked.
    """
    said = [f"{summary.failed:,} failed"] if summary.failed else []
    asked, elapsed = summary.done - summary.resumed, summary.elapsed - began
    if asked and elapsed > 0:
        rate = asked / elapsed
        said.append(f"{rate:.0f}/s" if rate >= 10 else f"{rate:.1f}/s" if rate >= 0.1 else f"{rate * 3600:.0f}/h")
    if tokens := summary.prompt_tokens + summary.completion_tokens:
        said.append(f"{short(tokens)} tokens")
    if asked and summary.done < summary.total:
        said.append(f"{span((summary.total - summary.done) * elapsed / asked)} left")
    return said


def short(number: int) -> str:
    """Return a number in at most five characters or so: 950, 1.2k, 3.4M."""
    for size, letter in ((10**9, "G"), (10**6, "M"), (10**3, "k")):
        if number >= size:
            return f"{number / size:.1f}{letter}"
    return str(number)


def span(seconds: float) -> str:
    """Return a time as people say it: 0.4 s, 45 s, 12 min, 3 h 05 min."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    if seconds < 99.5:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60:02} min"


class PlainMeter:
    """A line for each tenth, and for each minute.

    Args:
        clock: tells seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock

    @contextlib.contextmanager
    def running(self) -> Generator[Show, None, None]:
        """Show lines."""
        shown_at = self._clock()
        tenths = -1
        began = 0.0

        def show(summary: BatchSummary) -> None:
            nonlocal shown_at, tenths, began
            now, before = self._clock(), tenths
            tenths = summary.done * 10 // max(1, summary.total)
            if tenths == before and now - shown_at < _SELDOM:
                return
            shown_at = now
            first: list[str] = []
            if before == -1:
                began = summary.elapsed
                first = [f"{summary.resumed:,} of them done before"] if summary.resumed else []
            click.echo(", ".join([f"{summary.done:,}/{summary.total:,} requests", *first, *remarks(summary, began)]))

        yield show


class TerminalMeter:
    """A bar with a count and remarks.

    Args:
        console: Rich's.
        clock: tells seconds.
    """

    def __init__(self, console: Console, clock: Callable[[], float] = time.monotonic) -> None:
        self._console = console
        self._clock = clock

    @contextlib.contextmanager
    def running(self) -> Generator[Show, None, None]:
        """Show the bar; the cursor is hidden meanwhile, and comes back however this is left."""
        shown_at = self._clock() - _OFTEN
        latest: list[BatchSummary] = []
        began = 0.0
        with contextlib.ExitStack() as waiting, contextlib.ExitStack() as running:
            waiting.enter_context(self._console.status("looking through the files", spinner="line"))
            bar = self._bar()
            task = bar.add_task("", note="")

            def draw() -> None:
                for summary in latest:
                    said = remarks(summary, began)
                    note = ", ".join(said if self._console.width >= _NARROW else said[-1:])
                    bar.update(task, total=summary.total, completed=summary.done, note=note)

            def show(summary: BatchSummary) -> None:
                nonlocal shown_at, began
                if not latest:
                    began = summary.elapsed
                    waiting.close()
                    running.enter_context(bar)
                    running.callback(draw)
                latest[:] = [summary]
                if (now := self._clock()) - shown_at >= _OFTEN:
                    shown_at = now
                    draw()

            yield show

    def _bar(self) -> Progress:
        return Progress(
            # Not to the edge, where a terminal writes ^C.
            BarColumn(
                28 if self._console.width >= _WIDE else 12,
                style="dim",
                complete_style="cyan",
                finished_style="green",
            ),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}", style="dim", markup=False),
            console=self._console,
        )
