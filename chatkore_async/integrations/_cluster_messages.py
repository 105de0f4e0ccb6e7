"""What a process of a cluster and the limiter say to each other. Structs only.

A process says everything in one kind of message, as much of it as has gathered, and each may be lost or come twice:
numbers are the process's own, and what was done already is not done again.
"""

from typing import Final

import msgspec

from chatkore_async import Report


class Ask(msgspec.Struct, frozen=True, array_like=True):
    """Leave for one attempt is asked for. What was estimated travels, and not the body it was estimated from."""

    number: int
    endpoint: str
    key: str
    model: str
    tokens: int
    attempt: int


class Back(msgspec.Struct, frozen=True, array_like=True):
    """An attempt is over; or, without a report, nobody waits for it any more."""

    number: int
    report: Report | None


class Message(msgspec.Struct, frozen=True, array_like=True):
    """What a process has to say.

    Attributes:
        owner: names the process, or rather one event loop of it.
        number: counts its messages; the limiter answers the newest when it has something to say, others at once.
        begins: all that is still waited for is asked for here, so that a limiter which knows nothing of the process
            may take it in.
        asks: what it wants.
        back: what it gives back.
    """

    owner: str
    number: int
    begins: bool
    asks: list[Ask]
    back: list[Back]


class Answer(msgspec.Struct, frozen=True, array_like=True):
    """What the limiter has to say.

    Attributes:
        granted: numbers of what was asked for.
        pause: seconds from one message of this process to its next, at least.
        is_unknown: nothing is known of this process, and nothing was done: it has to begin anew.
    """

    granted: list[int] = []
    pause: float = 0.0
    is_unknown: bool = False


encode: Final = msgspec.msgpack.Encoder().encode
decode_message: Final = msgspec.msgpack.Decoder(Message).decode
decode_answer: Final = msgspec.msgpack.Decoder(Answer).decode
