"""What a stream is like, beside its text. From observations to findings, without I/O."""

from chatkore_async.cli._examine_answers import remarks_on
from chatkore_async.cli._finding import Finding, Remark, found, snippet
from chatkore_async.cli._observed import Answered, RawStream, Trouble
from chatkore_async.cli._troubles import milliseconds

SILENCE = 10.0
"""Seconds without an event after which other clients, with a timeout on the socket, begin to give up."""

_AT_ONCE = 0.01
_LATE = 0.3
_ENOUGH = 5
_BUFFERING = (
    "Switch buffering and compression off for it: proxy_buffering off in nginx, or the header X-Accel-Buffering: no "
    "from the server; in a company's network, an inspecting proxy does it too."
)


def examine_stream(answered: Answered, raw: RawStream | Trouble) -> Finding:
    """Judge a stream.

    Args:
        answered: as the client gave it.
        raw: the same request again, as it came over the wire; or why it did not.
    """
    took = milliseconds(answered.first_token or 0.0)
    seen = [
        f"{snippet(answered.text)}, first token after {took}, whole after {milliseconds(answered.seconds)}",
        f"{answered.completeness}, finish reason {answered.finish_reason or 'none'}",
    ]
    remarks = remarks_on(answered)
    if isinstance(raw, Trouble):
        means = "The first stream came. The second, which was to show how it comes over the wire, did not."
        remarks.append(Remark("warn", means, "Run this again; something on the way is not reliable."))
        return found("stream", [*seen, f"a second one failed: {raw.text}"], remarks)
    if raw.status != 200:
        means = "The first stream came. The second, which was to show how it comes over the wire, was refused."
        remarks.append(Remark("warn", means, "Run this again, a minute later: a limit may be as tight as that."))
        return found("stream", [*seen, f"a second one was answered with status {raw.status}"], remarks)
    seen.append(
        f"over the wire {raw.deltas} delta{'s' * (raw.deltas != 1)} in {milliseconds(raw.spread)}, "
        f"{raw.content_type or 'no content type'}"
    )
    if raw.pings:
        seen.append(f"{raw.pings} ping{'s' * (raw.pings != 1)}, {raw.silent_pings} of them in the longest silence")
    seen.append(f"longest silence {milliseconds(raw.silence)}")
    if raw.reused:
        seen.append("the connection is used again")
    return found("stream", seen, [*remarks, *_on_flow(raw), *_on_form(answered, raw), *_on_end(raw)])


def _on_flow(raw: RawStream) -> list[Remark | None]:
    remarks: list[Remark | None] = []
    at_once = raw.deltas >= _ENOUGH and raw.spread < _AT_ONCE and raw.first_delta >= _LATE
    if raw.content_type == "application/json":
        means = "The server answers a stream with one JSON document: it does not stream this model."
        remarks.append(Remark("warn", means, "The client copes. For text as it is written, try another model."))
    elif raw.deltas == 1 or at_once:
        one = "came in one delta" if raw.deltas == 1 else f"came at once, after {milliseconds(raw.first_delta)}"
        means = f"The whole answer {one}: something on the way collects the stream, or the model does not stream."
        remarks.append(Remark("warn", means, _BUFFERING))
    if raw.encoding not in ("", "identity"):
        means = f"The stream is compressed ({raw.encoding}), though that was not asked for, which delays its deltas."
        remarks.append(Remark("warn", means, _BUFFERING))
    if raw.silence >= SILENCE:
        if raw.silent_pings:
            means = (
                f"Pings fill a silence of {milliseconds(raw.silence)}. A timeout on the socket does not see it; "
                "Timeout.idle of the client counts events, and does."
            )
        else:
            means = f"Nothing comes for {milliseconds(raw.silence)}, not even pings; a proxy may cut such a stream."
        remarks.append(Remark("warn", means, "Set Timeout(idle=...) well above that, and below your patience."))
    return remarks


def _on_form(answered: Answered, raw: RawStream) -> list[Remark | None]:
    remarks: list[Remark | None] = []
    tell = "The client copes. Other programs may not: tell whoever runs the relay."
    if raw.content_type not in ("text/event-stream", "application/json"):
        kind = raw.content_type or "nothing"
        means = f"The stream is announced as {kind}, not as text/event-stream; proxies then collect it."
        remarks.append(Remark("warn", means, tell))
    if raw.content_type == "application/json":
        return remarks
    if answered.completeness == "unconfirmed":
        means = "The server says it is done although the model has not ended: that is how relays truncate answers."
        remarks.append(Remark("warn", means, "Check stream.completeness in your program; ask whoever runs the relay."))
    if not raw.done:
        remarks.append(Remark("warn", "The stream does not end in [DONE].", tell))
    if not raw.usage:
        means = "No usage came, though stream_options asked for it, so that costs of streams cannot be counted."
        remarks.append(Remark("warn", means, "Count tokens by yourself, or ask whoever runs the relay."))
    return remarks


def _on_end(raw: RawStream) -> list[Remark | None]:
    remarks: list[Remark | None] = []
    costs = "Each stream then costs a new connection, with its handshakes."
    if raw.ending == "open":
        means = f"The body does not end after [DONE]. {costs}"
        remarks.append(Remark("warn", means, "Tell whoever runs the relay: it should end the body there."))
    elif raw.ending == "cut":
        means = f"The connection is cut where the body should end. {costs}"
        remarks.append(Remark("warn", means, "Something on the way hangs up: look at its time limits."))
    elif raw.ending == "limit":
        means = "The stream does not end: more came than sixty tokens can be."
        remarks.append(Remark("fail", means, "Ask whoever runs the relay. Limits.max_body_size bounds what is read."))
    elif raw.ending == "timeout":
        means = "The second stream, read as it comes over the wire, did not end in time."
        remarks.append(Remark("warn", means, "Allow more seconds with --timeout."))
    elif raw.reused is False:
        why = f" ({raw.close})" if raw.close else ""
        means = f"The connection is closed after the stream{why}. {costs}"
        remarks.append(Remark("warn", means, "If you make many calls, ask whoever runs the relay for keep-alive."))
    if raw.after_done:
        means = f"{raw.after_done} bytes come after [DONE], where nothing is expected."
        remarks.append(Remark("warn", means, "Tell whoever runs the relay."))
    return remarks
