"""What must hold for any bytes a server may send. Run by `wire.py` under a fuzzer, and by `tests/test_fuzz.py` on samples.

An input is two bytes that choose a status and a place to split at, and then a body.
"""

import pickle

from reference import decode, reference

from chatkore_async import APIError, ChatCompletion, ChatCompletionChunk
from chatkore_async._accumulate import Accumulator
from chatkore_async._codec import MISFIT, decode_chunk, decode_chunk_strictly
from chatkore_async._config import Secret
from chatkore_async._protocol import DONE, Head, read_completion, read_event, read_models
from chatkore_async._sse import Decoder

KEY = "sk-planted-0123456789abcdef"
STATUSES = (200, 400, 401, 402, 403, 404, 408, 413, 422, 429, 500, 502, 503, 504, 524, 301, 599)


def check(data: bytes) -> None:
    """Hold the rules against an input.

    Raises:
        AssertionError: a rule does not hold.
    """
    status = STATUSES[data[0] % len(STATUSES)] if data else 200
    body = data[2:]
    at = data[1] * len(body) // 256 if len(data) > 1 else 0
    an_event_stream(body, at)
    an_answer(Head(status, {}, Secret(KEY)), body)
    a_stream(Head(200, {}, Secret(KEY)), body)


def an_event_stream(body: bytes, at: int) -> None:
    """The events are those of the reference, whatever the split."""
    expected = reference(body)
    assert decode(body)[0] == expected[0]
    assert decode(body[:at], body[at:])[0] == expected[0]


def an_answer(head: Head, body: bytes) -> None:
    """An answer is a completion, or an error of ours."""
    try:
        completion = read_completion(head, body)
    except APIError as error:
        an_error(error)
    else:
        assert completion.choices
        a_completion(completion)
    try:
        read_models(head, body)
    except APIError as error:
        an_error(error)


def an_error(error: APIError) -> None:
    """An error is one line of bounded length, can be pickled, and does not show the key."""
    line = str(error)
    assert line.splitlines() in ([line], []), "more than one line"
    assert len(line) < 3000
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is type(error)
    assert str(again) == line
    for shown in (line, repr(error), str(getattr(error, "body", None)), str(getattr(error, "headers", None))):
        assert KEY not in shown, "the key is shown"


def a_completion(completion: ChatCompletion) -> None:
    """A completion has the types it declares, so that it survives being encoded."""
    assert pickle.loads(pickle.dumps(completion)) == completion
    assert isinstance(completion.text, str)
    for call in completion.tool_calls or ():
        assert isinstance(call.function.arguments, str)


def a_stream(head: Head, body: bytes) -> None:
    """A chunk is the same on both ways of decoding, and merging is the same at once and one by one."""
    decoder = Decoder()
    once, singly = Accumulator(), Accumulator()
    for event in (*decoder.feed(body), *decoder.finish()):
        both_ways(event)
        try:
            chunk = read_event(head, event, once)
        except APIError as error:
            an_error(error)
            break
        if chunk == DONE:
            break
        if isinstance(chunk, ChatCompletionChunk):
            once.pending.append(chunk)
            singly.pending.append(chunk)
            singly.merge()
            singly.completion()
    assert once.completion() == singly.completion()
    assert once.finished == singly.finished
    a_completion(once.completion())


def both_ways(event: bytes) -> None:
    """What the strict decoder takes, the tolerant one takes for the same."""
    try:
        strictly = decode_chunk_strictly(event)
    except MISFIT:
        return
    tolerantly, _ = decode_chunk(event)
    # By what is made of them: to the one a role of "" is a role, to the other it is none, and both are right.
    merged = []
    for chunk in (strictly, tolerantly):
        accumulator = Accumulator()
        accumulator.pending.append(chunk)
        merged.append(accumulator.completion())
    assert merged[0] == merged[1], (strictly, tolerantly)
