"""`chatkore chat`: one question, or a conversation."""

import logging
import math
import sys
from typing import Any

import click
from msgspec import UNSET

from chatkore_async import __version__
from chatkore_async.cli._account import base_url_option, make_client, timeout_option
from chatkore_async.cli._answer import Answer, Manner, Retries, Warnings, document
from chatkore_async.cli._conversation import Conversation
from chatkore_async.cli._options import debug_option, is_debugging
from chatkore_async.cli._paper import Paper
from chatkore_async.cli._printable import mended
from chatkore_async.cli._run import run


async def once(conversation: Conversation, paper: Paper, manner: Manner, account: dict[str, Any]) -> int:
    """Ask what the conversation ends with, show the answer, and return the exit status."""
    async with make_client(**account) as client:
        completion = await Answer(client, paper, manner).come(conversation.request())
    if manner.silent:
        click.echo(document(completion, sys.stdout.encoding))
    return 0


async def talk(
    conversation: Conversation,
    paper: Paper,
    manner: Manner,
    account: dict[str, Any],
    *,
    keeps_history: bool,
    debugging: bool,
) -> int:
    """Lead a conversation at the terminal, and return the exit status."""
    # What is typed into needs a library that takes its time to load.
    from chatkore_async.cli._prompt import Prompt
    from chatkore_async.cli._talk import Talk

    async with make_client(**account) as client:
        paper.note(f"chatkore_async {__version__}: {conversation.model} at {client.base_url}")
        paper.note("/help lists the commands, Ctrl-D leaves.")
        prompt = Prompt(keeps_history=keeps_history)
        return await Talk(client, prompt, paper, conversation, manner, debugging=debugging).run()


def question_in(words: tuple[str, ...]) -> str | None:
    """Return what is asked: the words, then what comes on standard input; `None` when it is to be a conversation.

    Raises:
        click.UsageError: there is no question.
    """
    asked_for = words[-1:] == ("-",)
    parts = [mended(" ".join(words[:-1] if asked_for else words))]
    if asked_for or sys.stdin is None or not sys.stdin.isatty():
        parts.append(_piped())
    elif not words:
        return None
    question = "\n\n".join(part for part in parts if part.strip())
    if not question:
        raise click.UsageError("The question is empty: give it as an argument or on standard input.")
    return question


def _piped() -> str:
    """Return standard input to its end, without the line end there."""
    if sys.stdin is None:  # closed by the shell: `chatkore chat <&-`
        return ""
    return sys.stdin.buffer.read().decode("utf-8-sig", "replace").rstrip("\r\n")


def _finite(_: click.Context, __: click.Parameter, value: float | None) -> float | None:
    if value is not None and not math.isfinite(value):
        raise click.BadParameter("not a finite number")
    return value


@debug_option
@click.command(
    epilog="""\b
Examples:
  chatkore chat "Why is the sky blue?"
  git diff | chatkore chat "Write a commit message" --quiet
  chatkore chat                      a conversation; /help lists its commands"""
)
@click.argument("question", nargs=-1)
@click.option("-m", "--model", default="gpt-4o-mini", show_default=True, help="Who is asked.")
@click.option("-s", "--system", metavar="TEXT", help="A system message.")
@click.option("--temperature", type=float, callback=_finite, metavar="NUM", help="As the model has it: often 0 to 2.")
@click.option("--json", "as_json", is_flag=True, help="Print the whole completion as one JSON document.")
@click.option("--no-stream", is_flag=True, help="Wait for the whole answer.")
@click.option("-q", "--quiet", is_flag=True, help="Leave out the reasoning and the line on usage.")
@click.option("--no-history", is_flag=True, help="Keep no file of what was typed.")
@base_url_option
@timeout_option(600)
@click.pass_context
def command(
    ctx: click.Context,
    *,
    question: tuple[str, ...],
    model: str,
    system: str | None,
    temperature: float | None,
    as_json: bool,
    no_stream: bool,
    quiet: bool,
    no_history: bool,
    base_url: str | None,
    timeout: float,
) -> None:
    """Ask a model a QUESTION, or talk to it when there is none.

    What is piped in, or typed for a last -, is added to it. Piped output is the answer's text alone; reasoning and tool
    calls are on standard error.
    """
    text = question_in(question)
    if text is None and as_json:
        raise click.UsageError("--json takes a question: there is one document for one answer.")
    if text is None and not sys.stdout.isatty():
        raise click.UsageError("A conversation needs a terminal to be shown on: give a question, or - to type it.")
    paper = Paper()
    logger, warnings = logging.getLogger("chatkore_async"), Warnings(paper)
    logger.addHandler(warnings)
    ctx.call_on_close(lambda: logger.removeHandler(warnings))
    conversation = Conversation(
        mended(model), None if system is None else mended(system), UNSET if temperature is None else temperature
    )
    manner = Manner(streamed=not no_stream, silent=as_json, quiet=quiet)
    account = {"base_url": base_url, "timeout": timeout, "hooks": [Retries(paper)]}
    if text is None:
        debugging, keeps = is_debugging(ctx), not no_history
        ctx.exit(run(lambda: talk(conversation, paper, manner, account, keeps_history=keeps, debugging=debugging)))
    conversation.ask(text)
    ctx.exit(run(lambda: once(conversation, paper, manner, account)))
