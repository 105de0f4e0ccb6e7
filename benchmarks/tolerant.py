"""What the tolerant way of decoding costs, and how much of what relays send takes it: `python -m benchmarks.tolerant`.

The messages are those of `tests/samples/`. The strict way is the one a healthy message takes; one that it refuses is
decoded strictly, in vain, and then tolerantly.
"""

import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

from sampling import SAMPLES

from chatkore_async._codec import MISFIT, NotJSONError, decode_chunk, decode_chunk_strictly, decode_completion
from chatkore_async._sse import Decoder

HEALTHY = (
    b'{"id":"chatcmpl-1","object":"chat.completion.chunk","created":1700000000,"model":"gpt-4o-mini",'
    b'"choices":[{"index":0,"delta":{"content":" there"},"finish_reason":null}]}'
)
ODD = HEALTHY.replace(b"1700000000", b'"1700000000"')


def fits(event: bytes) -> bool:
    try:
        decode_chunk_strictly(event)
    except MISFIT:
        return False
    return True


def fits_whole(body: bytes) -> bool:
    try:
        return decode_completion(body)[1] is None
    except NotJSONError:
        return False


def both(event: bytes) -> None:
    if not fits(event):
        decode_chunk(event)


def microseconds(function: Callable[[bytes], object], data: bytes) -> float:
    """The median of rounds, for one message."""
    rounds = []
    for _ in range(15):
        began = time.process_time()
        for _ in range(5000):
            function(data)
        rounds.append((time.process_time() - began) / 5000 * 1e6)
    return statistics.median(rounds)


def main() -> None:
    streams = [sample for sample in SAMPLES if sample.kind == "sse" and sample.case.expect.error is None]
    events: list[bytes] = []
    with_a_refused = 0
    for sample in streams:
        decoder = Decoder()
        found = [event for event in (*decoder.feed(sample.body), *decoder.finish()) if event.strip() != b"[DONE]"]
        events += found
        with_a_refused += not all(map(fits, found))
    refused = sum(not fits(event) for event in events)
    answers = [sample for sample in SAMPLES if sample.kind == "json" and sample.case.expect.text is not None]
    print(f"streams that are answers: {len(streams)}, of which {with_a_refused} have a message for the tolerant way")
    print(f"their events: {len(events)}, of which {refused} take it ({refused / len(events):.0%})")
    taken = sum(not fits_whole(sample.body) for sample in answers)
    print(f"whole answers: {len(answers)}, of which {taken} take it")
    strict, tolerant = microseconds(decode_chunk_strictly, HEALTHY), microseconds(both, ODD)
    print(f"a chunk, strictly: {strict:.2f} µs; refused, and then tolerantly: {tolerant:.2f} µs")


if __name__ == "__main__":
    main()
