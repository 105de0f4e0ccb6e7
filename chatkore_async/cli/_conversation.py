"""A conversation: what is sent with each message, and the commands that change it. No I/O."""

import json
from collections.abc import Mapping

import msgspec

from chatkore_async import ChatCompletion, ChatCompletionRequest
from chatkore_async.types import ChatCompletionMessage

HELP = """\
/clear        forget the conversation
/model NAME   ask this model from now on
/system TEXT  set the system message;
              without a text, drop it
/save FILE    write the messages, as JSON
/exit         leave, as Ctrl-D does
//text        send /text, with one slash

Enter sends. Alt+Enter, or a backslash at
the end of the line, begins a new line.
Up and Down bring earlier messages back,
Ctrl-R searches them. Ctrl-C stops an
answer, and a second one leaves."""


class Conversation:
    """What was said so far, and to whom.

    Attributes:
        model: which model is asked next.
        system: the system message, or `None`.
        turns: the messages after it, the user's and the model's.

    Args:
        temperature: sent with each request; `UNSET` sends none.
    """

    def __init__(
        self, model: str, system: str | None = None, temperature: float | msgspec.UnsetType = msgspec.UNSET
    ) -> None:
        self.model = model
        self.system = system
        self.turns: list[Mapping[str, object] | ChatCompletionMessage] = []
        self._temperature = temperature

    def messages(self) -> list[Mapping[str, object] | ChatCompletionMessage]:
        """Return all messages in their order."""
        system = [] if self.system is None else [{"role": "system", "content": self.system}]
        return [*system, *self.turns]

    def request(self) -> ChatCompletionRequest:
        """Return what asks for the next answer."""
        return ChatCompletionRequest(model=self.model, messages=self.messages(), temperature=self._temperature)

    def ask(self, text: str) -> None:
        """Add a message of the user's."""
        self.turns.append({"role": "user", "content": text})

    def take_back(self) -> None:
        """Forget the user's last message, which got no answer."""
        self.turns.pop()

    def answered(self, completion: ChatCompletion) -> None:
        """Add the model's message as it was received, so that it goes back as it came."""
        for choice in completion.choices[:1]:
            message = choice.message
            if message.tool_calls or message.function_call:
                # Nobody here runs tools, and a call without a result would make the API refuse all that follows.
                self.stopped(completion.text)
            elif message.content or message.refusal:
                self.turns.append(message)

    def stopped(self, text: str) -> None:
        """Add as much of an answer as came before it was stopped."""
        if text:
            self.turns.append({"role": "assistant", "content": text})

    def clear(self) -> None:
        """Forget what was said; the system message stays."""
        self.turns.clear()

    def document(self) -> str:
        """Return the messages as JSON, in the form in which the API takes them."""
        return json.dumps([_plain(message) for message in self.messages()], ensure_ascii=False, indent=2) + "\n"


def _plain(message: Mapping[str, object] | ChatCompletionMessage) -> Mapping[str, object]:
    if not isinstance(message, ChatCompletionMessage):
        return message
    fields: dict[str, object] = msgspec.to_builtins(message)
    return {name: value for name, value in fields.items() if value is not None and name != "annotations"}


def command_in(text: str) -> tuple[str, str] | None:
    """Return the name and the argument of the command a line holds, or `None` when it is to be sent."""
    if not text.startswith("/") or text.startswith("//"):
        return None
    name, *argument = text.rstrip().split(maxsplit=1)
    return name, "".join(argument)


def message_in(text: str) -> str:
    """Return what is sent of a text that is no command."""
    return text[1:] if text.startswith("//") else text
