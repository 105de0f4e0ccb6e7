"""A conversation at the terminal: a prompt, an answer, and again."""

import traceback
from pathlib import Path
from typing import Protocol

import click

from chatkore_async import AsyncChatKore, ChatKoreError, ConfigurationError
from chatkore_async.cli._answer import Answer, Manner
from chatkore_async.cli._conversation import HELP, Conversation, command_in, message_in
from chatkore_async.cli._paper import Paper
from chatkore_async.cli._problems import Problem, explained
from chatkore_async.cli._run import interruptible


class Prompter(Protocol):
    """Who asks the user."""

    async def ask(self, draft: str = "") -> str | None:
        """Return what was typed, or `None` when it was thrown away; raise `EOFError` at the end."""
        ...

    @property
    def typed(self) -> str:
        """What was thrown away."""
        ...


class Talk:
    """Lead a conversation until the user leaves.

    Args:
        client: whom the messages go to.
        prompt: where they come from.
        paper: where answers are shown.
        conversation: what was said.
        manner: how answers are asked for and shown.
        debugging: whether the traceback of an error is shown, too.
    """

    def __init__(
        self,
        client: AsyncChatKore,
        prompt: Prompter,
        paper: Paper,
        conversation: Conversation,
        manner: Manner,
        *,
        debugging: bool = False,
    ) -> None:
        self._client = client
        self._prompt = prompt
        self._paper = paper
        self._conversation = conversation
        self._manner = manner
        self._debugging = debugging
        self._draft = ""
        self._warned = False  # that the next Ctrl-C leaves
        self._saved: set[Path] = set()

    async def run(self) -> int:
        """Ask and answer until the user leaves, and return the exit status.

        Raises:
            click.Abort: the user left by Ctrl-C.
            ConfigurationError: there is nobody to talk to.
        """
        while True:
            answer: Answer | None = None
            # One block for the prompt and the answer, so that there is no moment at which Ctrl-C ends it all at once.
            with interruptible():
                try:
                    text = await self._prompt.ask(self._draft)
                except EOFError:
                    return 0
                if text is not None:
                    self._draft, self._warned = "", False
                    if (command := command_in(text)) is not None:
                        if command[0] == "/exit":
                            return 0
                        self._obey(*command, text)
                    elif text.strip():
                        answer = Answer(self._client, self._paper, self._manner)
                        await self._answer(answer, text)
                    continue
            if answer is not None:
                self._conversation.stopped(answer.text)
                # Where nothing had been shown, the terminal's ^C stands alone on the line.
                self._paper.note(("" if answer.text else "\n") + "stopped; Ctrl-C again leaves")
            elif self._warned and not self._prompt.typed:
                raise click.Abort
            else:
                self._paper.note("Ctrl-C again, or Ctrl-D, leaves")
            self._draft, self._warned = "", True

    async def _answer(self, answer: Answer, text: str) -> None:
        self._conversation.ask(message_in(text))
        try:
            completion = await answer.come(self._conversation.request())
        except ConfigurationError:
            raise
        except ChatKoreError as error:
            self._conversation.take_back()
            self._draft = text  # Enter asks again
            if self._debugging:
                traceback.print_exception(error)
            self._paper.problem(explained(error))
        else:
            self._conversation.answered(completion)

    def _obey(self, name: str, argument: str, text: str) -> None:
        conversation, note = self._conversation, self._paper.note
        match name:
            case "/help":
                note(HELP)
            case "/clear":
                conversation.clear()
                note("the conversation is forgotten")
            case "/model":
                conversation.model = argument or conversation.model
                note(f"the model is {conversation.model}")
            case "/system" if argument:
                conversation.system = argument
                note("the system message is set")
            case "/system":
                note("there is no system message" if conversation.system is None else "the system message is dropped")
                conversation.system = None
            case "/save" if argument:
                self._save(argument)
            case "/save":
                note("where to? /save FILE")
            case _:
                self._draft = text
                note(f"there is no command {name}: /help lists them, and two slashes send a text that begins with one")

    def _save(self, name: str) -> None:
        try:
            path = Path(name).expanduser().absolute()
            # A file of another origin is not overwritten, since a name is mistyped easily.
            with path.open("w" if path in self._saved else "x", encoding="utf-8") as file:
                file.write(self._conversation.document())
        except (OSError, RuntimeError, ValueError) as error:
            self._paper.problem(Problem(str(error), "/save takes the name of a new file"))
            return
        self._saved.add(path)
        self._paper.note(f"{len(self._conversation.messages())} messages are in {path}")
