"""The script and the limit of `chatkore serve`: which requests are answered how."""

from collections import Counter
from collections.abc import Sequence

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from chatkore_async.cli._director import Asked, Director, Pace, compose, with_defaults
from chatkore_async.cli._faults import Rule, Script, read_script
from chatkore_async.cli._limits import RequestLimit, duration
from chatkore_async.cli._problems import Problem
from chatkore_async.testing import Cut, Pause, Ping, Raw, Reply, Reset, Stall, answer


def script(*rules: object, **fields: object) -> Script:
    """Return a script as a file would give it."""
    return read_script("faults.json", msgspec.json.encode({"rules": rules, **fields}))


def request(text: str = "Hello", **fields: object) -> bytes:
    return msgspec.json.encode({"model": "gpt-4o-mini", "messages": [{"role": "user", "content": text}], **fields})


def asked(body: bytes) -> Asked:
    return msgspec.json.decode(body, type=Asked)


def picks(director: Director, bodies: Sequence[bytes]) -> list[int | None]:
    return [director.pick(asked(body)) for body in bodies]


def met(rule: dict[str, object], body: bytes | None = None, pace: Pace | None = None) -> Reply:
    """Return what a request meets at a rule."""
    body = request() if body is None else body
    reply = compose(script(rule).rules[0], asked(body), body, pace or Pace())
    assert isinstance(reply, Reply)
    return reply


def document(reply: Reply) -> dict[str, object]:
    return msgspec.json.decode(reply.body)


def message(reply: Reply) -> dict[str, object]:
    return msgspec.json.decode(reply.body)["choices"][0]["message"]


def chunks(reply: Reply) -> list[dict[str, object]]:
    """Return the chunks of a stream that ends with [DONE]."""
    events = [event.removeprefix(b"data: ") for event in reply.body.split(b"\n\n") if event.startswith(b"data: ")]
    assert events.pop() == b"[DONE]"
    return [msgspec.json.decode(event) for event in events]


def deltas(reply: Reply, key: str) -> str:
    choices = [choice for chunk in chunks(reply) for choice in chunk["choices"]]
    return "".join(choice["delta"].get(key) or "" for choice in choices)


class TestFile:
    def test_all_that_is_documented_is_taken(self) -> None:
        """A script may have every key there is, and numbers of seconds with or without a point."""
        read = script(
            {"first": 1, "every": 2, "share": 1, "model": "gpt-*", "stream": True, "contains": "x"}
            | {"pieces": ["a"], "tool_calls": [{"name": "f"}], "reasoning": "hm", "finish_reason": None}
            | {"usage": False, "done": False, "latency": 1, "first_delay": 0.5, "interval": 0, "pings": 2}
            | {"headers": {"x-a": "b"}, "stall_after": 0},
            {"model": "m", "status": 429, "message": "m", "code": 7, "type": "t", "reset_after": 3},
            {"model": "n", "status": 502, "html": "Bad Gateway", "cut_after": 9},
            {"model": "o", "status": 200, "body": None},
            {"model": "p", "raw": "HTTP/1.1 200", "latency": 0.1},
            {"text": "t", "usage": {"total_tokens": 1}},
            seed=7,
        )
        assert read.seed == 7
        assert len(read.rules) == 6

    @pytest.mark.parametrize(
        "text, line",
        [
            ("{}", "$: object missing required field rules"),
            ('{"rules": [], "sed": 1}', "$: object contains unknown field sed"),
            ('{"rules": [{"status": 503}, {"status": "no"}]}', "$.rules[1].status: expected int, got str"),
            ('{"rules": [{"status": 99}]}', "$.rules[0].status: expected int >= 200"),
            ('{"rules": [{"share": 1.5}]}', "$.rules[0].share: expected float <= 1.0"),
            ('{"rules": [{"first": 0}]}', "$.rules[0].first: expected int >= 1"),
            ('{"rules": [{"latency": -1}]}', "$.rules[0].latency: expected float >= 0.0"),
            ('{"rules": [{"statis": 503}]}', "$.rules[0]: object contains unknown field statis"),
            ('{"rules": [{"\\u001b[2J": 1}]}', "$.rules[0]: object contains unknown field \ufffd[2J"),
            ('{"rules": [{"tool_calls": [{"arguments": {}}]}]}', "$.rules[0].tool_calls[0]: object missing"),
            ('{"rules": [{"message": "x"}]}', "$.rules[0]: message is for an error, which needs a status"),
            ('{"rules": [{"status": 500, "text": "x"}]}', "$.rules[0]: status and text exclude each other"),
            ('{"rules": [{"status": 500, "pings": 1}]}', "$.rules[0]: status and pings exclude each other"),
            ('{"rules": [{"text": "x", "pieces": []}]}', "$.rules[0]: text and pieces exclude each other"),
            ('{"rules": [{"raw": "x", "headers": {}}]}', "$.rules[0]: raw and headers exclude each other"),
            ('{"rules": [{"cut_after": 1, "reset_after": 1}]}', "$.rules[0]: cut_after and reset_after exclude"),
            ('{"rules": [{"headers": {"a b": "x"}}]}', "$.rules[0]: 'a b' is no name of a header"),
            ('{"rules": [{"headers": {"a": "x\\r\\ny"}}]}', "$.rules[0]: the header a takes printable ASCII"),
            ('{"rules": [{"headers": {"a": "é"}}]}', "$.rules[0]: the header a takes printable ASCII"),
            ('{"rules": [{}, {"status": 503}]}', "$: rules[0] takes every request, so that rules[1] is never reached"),
            ("", "not JSON: input data was truncated"),
            ('{\n  "rules": [\n    {,}]}', "not JSON: object keys must be strings (line 3, column 6)"),
            ('{"rules": [{"body": ' + "[" * 100_000, "not JSON: maximum recursion depth"),
        ],
    )
    def test_what_is_wrong_is_located(self, text: str, line: str) -> None:
        """An error names the file, the place in it and what is wrong there, in one line, and has a hint."""
        with pytest.raises(Problem) as caught:
            read_script("faults.json", text.encode())
        first, hint = caught.value.message.split("\n")
        assert first.lower().startswith(f"faults.json: {line}".lower())
        assert hint.startswith("Hint: ")

    def test_bytes_that_are_no_text(self) -> None:
        """A file in another encoding than UTF-8 is an error like any other."""
        with pytest.raises(Problem, match=r"faults\.json: not JSON: "):
            read_script("faults.json", '{"rules": [{"text": "é"}]}'.encode("latin-1"))

    def test_a_byte_order_mark_is_skipped(self) -> None:
        """Editors that begin a file with a byte order mark may be used."""
        assert read_script("f", b'\xef\xbb\xbf{"rules": []}') == Script([])

    @pytest.mark.parametrize("key, hint", [("statsu", "did you mean status?"), ("qqq", "a rule may have first, every")])
    def test_a_misspelt_key_is_recognised(self, key: str, hint: str) -> None:
        """An unknown key gets the one that was probably meant, or all there are, as a hint."""
        with pytest.raises(Problem) as caught:
            script({key: 1})
        assert f"Hint: {hint}" in caught.value.message


class TestWhich:
    def test_the_first_rule_that_fits_decides(self) -> None:
        """Rules are tried in order; a request that none fits has no rule."""
        director = Director(script({"model": "gpt-*", "status": 500}, {"stream": True, "status": 501}))
        bodies = [request(), request(model="claude", stream=True), request(model="claude"), request(stream=True)]
        assert picks(director, bodies) == [0, 1, None, 0]

    def test_conditions_are_combined(self) -> None:
        """A rule takes what fits all of its conditions."""
        director = Director(script({"model": "gpt-4o*", "stream": False, "contains": "ERROR"}))
        bodies = [
            request("an error"),
            request("an error", stream=True),
            request("an error", model="o3"),
            request("all is well"),
            request("an error", stream=None),
        ]
        assert picks(director, bodies) == [0, None, None, None, 0]

    def test_text_is_the_users_last(self) -> None:
        """`contains` looks at the last message of the user, its parts included, and at nobody else's."""
        director = Director(script({"contains": "boom"}))
        old = {"role": "user", "content": "boom"}
        parts = {"role": "user", "content": [{"type": "text", "text": "now"}, {"type": "image_url"}, {"text": "boom"}]}
        bodies = [
            request(messages=[old, {"role": "user", "content": "no"}]),
            request(messages=[parts, {"role": "assistant", "content": "no"}]),
            request(messages=[{"role": "assistant", "content": "boom"}]),
            request(messages=[{"role": "user", "content": None}]),
        ]
        assert picks(director, bodies) == [None, 0, None, None]

    def test_rules_count_what_comes_to_them(self) -> None:
        """`first` counts the requests that fit and that no rule before took, so rules in a row are a sequence."""
        director = Director(script({"first": 1, "status": 429}, {"first": 2, "stream": True, "status": 503}))
        bodies = [request(), request(), *[request(stream=True)] * 3]
        assert picks(director, bodies) == [0, None, 1, 1, None]

    def test_every(self) -> None:
        """`every` takes the third, the sixth and so on; together with `first` only among those."""
        assert picks(Director(script({"every": 3})), [request()] * 7) == [None, None, 0, None, None, 0, None]
        assert picks(Director(script({"every": 2, "first": 3})), [request()] * 6) == [None, 0, None, None, None, None]

    def test_a_share_is_about_that_share(self) -> None:
        """5 % of many requests are about 5 %, and no two rules take theirs from the same draw."""
        director = Director(script({"share": 0.05, "status": 503}, {"share": 0.05, "status": 429}))
        counts = Counter(picks(director, [request()] * 20_000))
        assert 850 < counts[0] < 1150
        assert 800 < counts[1] < 1100

    def test_all_and_nothing(self) -> None:
        """A share of 1 takes all, a share of 0 nothing."""
        assert picks(Director(script({"share": 0}, {"share": 1})), [request()] * 50) == [1] * 50

    def test_a_seed_settles_it(self) -> None:
        """The same seed takes the same requests in every run, another one others."""
        runs = [picks(Director(script({"share": 0.5}, seed=seed)), [request()] * 64) for seed in (1, 1, 2)]
        assert runs[0] == runs[1] != runs[2]

    def test_another_rule_changes_no_chances(self) -> None:
        """What a request meets at a rule depends on its number there, not on requests that do not fit."""
        bodies = [request(), request(model="other")] * 64
        director = Director(script({"model": "gpt-*", "share": 0.5}))
        mixed = picks(director, bodies)
        alone = picks(Director(script({"model": "gpt-*", "share": 0.5})), [request()] * 64)
        assert mixed[::2] == alone
        assert set(mixed[1::2]) == {None}


class TestErrors:
    def test_in_the_shape_of_the_api(self) -> None:
        """A status alone is an error with a message and the type that goes with it."""
        reply = met({"status": 429})
        assert reply.status == 429
        assert document(reply)["error"]["type"] == "rate_limit_error"
        assert document(reply)["error"]["message"]

    def test_said_in_full(self) -> None:
        """Message, code, type and headers are the rule's."""
        reply = met({"status": 503, "message": "busy", "code": 7, "type": "t", "headers": {"Retry-After": "2"}})
        assert document(reply) == {"error": {"message": "busy", "type": "t", "param": None, "code": 7}}
        assert reply.header("retry-after") == "2"

    def test_streams_fail_alike(self) -> None:
        """An error is the same JSON for a stream."""
        assert met({"status": 500}, request(stream=True)).body == met({"status": 500}).body

    def test_a_web_page(self) -> None:
        """`html` is the page of a proxy."""
        reply = met({"status": 502, "html": "502 <Bad> Gateway"})
        assert reply.header("content-type") == "text/html"
        assert b"<title>502 &lt;Bad&gt; Gateway</title>" in reply.body

    @pytest.mark.parametrize(
        "body, sent", [("", b""), ("quota", b"quota"), ({"detail": [1]}, b'{"detail":[1]}'), (None, b"null")]
    )
    def test_any_body(self, body: object, sent: bytes) -> None:
        """A string is sent as it stands, anything else as JSON; with status 200 if need be."""
        reply = met({"status": 200, "body": body, "headers": {"content-type": "text/plain"}})
        assert (reply.status, reply.body) == (200, sent)
        assert reply.header("content-type") == "text/plain"


class TestAnswers:
    def test_nothing_said_is_the_servers_own(self) -> None:
        """A rule that says nothing of the answer leaves it to the server, so that it can exempt requests."""
        assert met({"model": "gpt-*"}).body == answer(request()).body

    def test_text(self) -> None:
        """`text` is the answer's, for the model that was asked, awaited and streamed word by word."""
        reply = met({"text": "It is so."})
        assert message(reply)["content"] == "It is so."
        assert document(reply)["model"] == "gpt-4o-mini"
        assert document(reply)["choices"][0]["finish_reason"] == "stop"
        streamed = met({"text": "It is so."}, request(stream=True))
        assert deltas(streamed, "content") == "It is so."
        assert len(chunks(streamed)) == 5
        assert {chunk["model"] for chunk in chunks(streamed)} == {"gpt-4o-mini"}

    def test_pieces(self) -> None:
        """`pieces` are streamed as they are, and joined for a call that awaits."""
        streamed = met({"pieces": ["a b", "", "c"]}, request(stream=True))
        assert [c["choices"][0]["delta"].get("content") for c in chunks(streamed)] == ["", "a b", "", "c", None]
        assert message(met({"pieces": ["a b", "", "c"]}))["content"] == "a bc"

    def test_tool_calls(self) -> None:
        """`tool_calls` are made instead of a text, each with an id of its own, and the finish reason says so."""
        rule: dict[str, object] = {"tool_calls": [{"name": "f", "arguments": {"city": "Oslo"}}, {"name": "g"}]}
        calls = message(met(rule))["tool_calls"]
        assert [call["id"] for call in calls] == ["call_1", "call_2"]
        assert calls[0]["function"] == {"name": "f", "arguments": '{"city":"Oslo"}'}
        assert message(met(rule))["content"] is None
        last = chunks(met(rule, request(stream=True)))[-1]
        assert last["choices"][0]["finish_reason"] == "tool_calls"

    def test_text_beside_tool_calls(self) -> None:
        """A text may come with tool calls."""
        reply = met({"text": "Let me look.", "tool_calls": [{"name": "f"}]})
        assert message(reply)["content"] == "Let me look."
        assert message(reply)["tool_calls"]

    def test_reasoning(self) -> None:
        """`reasoning` comes before the answer, as `reasoning_content`."""
        assert message(met({"reasoning": "Let me see.", "text": "So."}))["reasoning_content"] == "Let me see."
        streamed = met({"reasoning": "Let me see.", "text": "So."}, request(stream=True))
        assert deltas(streamed, "reasoning_content") == "Let me see."
        assert streamed.body.index(b"see.") < streamed.body.index(b"So.")

    @pytest.mark.parametrize("stream", [False, True])
    def test_what_is_left_open_is_the_servers_own(self, stream: bool) -> None:
        """Without a text of its own a rule changes the server's answer, and keeps its id, tool calls and reason."""
        tools = [{"type": "function", "function": {"name": "weather"}}]
        body = request("What is the weather?", tools=tools, stream=stream)
        own, changed = answer(body), met({"reasoning": "Hm."}, body)
        for reply in (own, changed):
            assert b'"name":"weather"' in reply.body
            assert b'"finish_reason":"tool_calls"' in reply.body
        assert changed.header("x-request-id")
        assert b"chatcmpl-scripted" not in changed.body

    def test_answers_differ_in_their_ids(self) -> None:
        """Two requests get two ids, as a list on a screen needs them."""
        first, second = (document(met({"text": "x"}, request(text)))["id"] for text in "ab")
        assert first != second

    def test_finish_reason(self) -> None:
        """`finish_reason` is the rule's, and `null` leaves it out, as when a relay truncates."""
        assert document(met({"finish_reason": "length"}))["choices"][0]["finish_reason"] == "length"
        assert document(met({"finish_reason": None}))["choices"][0]["finish_reason"] is None
        streamed = met({"finish_reason": None}, request(stream=True))
        assert {choice["finish_reason"] for chunk in chunks(streamed) for choice in chunk["choices"]} == {None}

    def test_done(self) -> None:
        """`done: false` leaves `[DONE]` out, and all else stays."""
        body = request(stream=True)
        assert met({"done": False}, body).body + b"data: [DONE]\n\n" == met({"done": True}, body).body

    def test_usage_is_told_when_asked_for(self) -> None:
        """A stream has usage if the request asks for it; the rule can leave it out, add it, and say what it is."""
        plain = request(stream=True)
        wanted = request(stream=True, stream_options={"include_usage": True})
        told = {"total_tokens": 9}
        for rule, body, usage in [
            ({"text": "x"}, plain, False),
            ({"text": "x"}, wanted, True),
            ({"usage": True}, plain, True),
            ({"usage": False}, wanted, False),
            ({"usage": told}, plain, True),
        ]:
            assert any("usage" in chunk for chunk in chunks(met(rule, body))) is usage
        assert document(met({"usage": told}))["usage"] == told
        assert "usage" not in document(met({"usage": False}))
        assert "usage" in document(met({"text": "x"}))

    def test_a_request_that_is_none_is_told_so(self) -> None:
        """What the server refuses is refused, whatever text a rule has for it."""
        reply = met({"text": "x"}, request(n=0))
        assert reply.status == 400

    def test_raw(self) -> None:
        """`raw` is everything on the wire."""
        rule = Rule(raw="HTTP/1.1 200 OK\r\n\r\nhé")
        reply = compose(rule, asked(request()), request(), Pace())
        assert reply == Raw(("HTTP/1.1 200 OK\r\n\r\nhé".encode(),))


class TestPace:
    @pytest.mark.parametrize("rule", [{"text": "x y"}, {"status": 500}, {"usage": False}, {"contains": ""}])
    def test_latency(self, rule: dict[str, object]) -> None:
        """Each answer waits as long as the server does, and as long as its rule if that says so."""
        pace = Pace(latency=2.0)
        assert met(rule, pace=pace).latency == 2.0
        assert met({**rule, "latency": 0}, pace=pace).latency == 0

    def test_raw_answers_wait_too(self) -> None:
        """`raw` has a latency like any other."""
        body = request()
        assert compose(Rule(raw="x"), asked(body), body, Pace(latency=2.0)) == Raw((Pause(2.0), b"x"))
        assert compose(Rule(raw="x", latency=1.0), asked(body), body, Pace()) == Raw((Pause(1.0), b"x"))

    @pytest.mark.parametrize("rule", [{"text": "x y"}, {"contains": ""}])
    def test_interval(self, rule: dict[str, object]) -> None:
        """Between deltas a stream pauses as the server does, or as its rule says."""
        body = request("x", stream=True)
        assert Pause(0.5) in met(rule, body, Pace(interval=0.5)).steps
        assert Pause(0.25) in met({**rule, "interval": 0.25}, body, Pace(interval=0.5)).steps
        assert not any(isinstance(step, Pause) for step in met({**rule, "interval": 0}, body).steps)

    @pytest.mark.parametrize("rule", [{"text": "x"}, {"contains": ""}])
    def test_comments_before_the_first_chunk(self, rule: dict[str, object]) -> None:
        """Comments are spread over the delay before the first chunk, of scripted answers and of the server's own."""
        steps = met({**rule, "first_delay": 3, "pings": 2}, request(stream=True)).steps
        assert steps[:5] == (Pause(1.0), Ping(), Pause(1.0), Ping(), Pause(1.0))
        assert met({**rule, "pings": 1}, request(stream=True)).steps[0] == Ping()

    def test_only_streams_have_them(self) -> None:
        """What is awaited has no comments."""
        assert met({"first_delay": 3, "pings": 2}).body == answer(request()).body


class TestEnds:
    @pytest.mark.parametrize("key, fault", [("cut_after", Cut), ("reset_after", Reset), ("stall_after", Stall)])
    @pytest.mark.parametrize("rule", [{}, {"text": "x"}, {"status": 500}, {"html": "x", "status": 502}])
    @pytest.mark.parametrize("stream", [False, True])
    def test_after_so_many_bytes(self, rule: dict[str, object], key: str, fault: type, stream: bool) -> None:
        """An answer of any kind can be cut, reset or stalled after some bytes of its body."""
        body = request(stream=stream)
        whole, ended = met({"contains": "", **rule}, body), met({"contains": "", **rule, key: 30}, body)
        assert ended.body == whole.body[:30]
        assert isinstance(ended.steps[-1], fault)

    def test_raw_ones_too(self) -> None:
        """`raw` is cut after so many bytes of all that is sent."""
        body = request()
        assert compose(Rule(raw="abc", cut_after=2), asked(body), body, Pace()) == Raw((b"ab", Cut()))


def test_headers_have_defaults() -> None:
    """A default is left out where the header is given, whatever the case of its name."""
    given, defaults = (("X-A", "1"),), (("x-a", "2"), ("x-b", "3"))
    assert with_defaults(given, defaults) == (("x-b", "3"), ("X-A", "1"))
    assert with_defaults(dict(given), defaults) == (("x-b", "3"), ("X-A", "1"))


class Clock:
    """A clock that is set by hand."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class TestLimit:
    def test_counts_down_and_refuses(self) -> None:
        """So many requests are let in at once, each told how many are left; the next is told when to come again."""
        clock = Clock()
        limit = RequestLimit(3, clock)
        decisions = [limit.ask() for _ in range(4)]
        assert [decision.remaining for decision in decisions] == [2, 1, 0, 0]
        assert [decision.retry_after for decision in decisions] == [0, 0, 0, 20]
        assert dict(decisions[0].headers) == {
            "x-ratelimit-limit-requests": "3",
            "x-ratelimit-remaining-requests": "2",
            "x-ratelimit-reset-requests": "20s",
        }
        refusal = decisions[3].refusal("gpt-4o-mini")
        assert refusal.status == 429
        assert (refusal.header("retry-after"), refusal.header("retry-after-ms")) == ("20", "20000")
        assert refusal.header("x-ratelimit-reset-requests") == "1m0s"
        assert document(refusal)["error"] == {
            "message": "Rate limit reached for gpt-4o-mini on requests per min (RPM): Limit 3, Used 3, Requested 1. "
            "Please try again in 20s.",
            "type": "requests",
            "param": None,
            "code": "rate_limit_exceeded",
        }

    def test_fills_up_evenly(self) -> None:
        """After a while some are let in again, and never more at once than the limit."""
        clock = Clock()
        limit = RequestLimit(60, clock)
        assert sum(not limit.ask().retry_after for _ in range(100)) == 60
        clock.now += 10
        assert sum(not limit.ask().retry_after for _ in range(100)) == 10
        clock.now += 3600
        assert sum(not limit.ask().retry_after for _ in range(100)) == 60

    @given(st.integers(1, 10_000), st.lists(st.floats(0, 120), max_size=30))
    def test_the_time_it_tells_is_true(self, per_minute: int, waits: list[float]) -> None:
        """Who comes again after `retry_after` is let in, and who comes well before that is not."""
        clock = Clock()
        limit = RequestLimit(per_minute, clock)
        for wait in waits:
            clock.now += wait
            decision = limit.ask()
            assert 0 <= decision.remaining < per_minute
            assert 0 <= decision.reset <= 60.001
        while not (decision := limit.ask()).retry_after:
            pass
        clock.now += decision.retry_after / 2
        early = limit.ask()
        assert early.retry_after
        clock.now += early.retry_after
        assert not limit.ask().retry_after

    @given(st.integers(1, 600), st.lists(st.floats(0, 5), max_size=200))
    def test_never_more_than_the_limit(self, per_minute: int, waits: list[float]) -> None:
        """Over any time no more are let in than a full bucket and what came in meanwhile."""
        clock = Clock()
        limit = RequestLimit(per_minute, clock)
        let_in = 0
        for wait in waits:
            clock.now += wait
            let_in += not limit.ask().retry_after
        assert let_in <= per_minute + sum(waits) * per_minute / 60 + 1e-6

    @pytest.mark.parametrize(
        "seconds, text",
        [(0, "0ms"), (0.0201, "21ms"), (0.02, "20ms"), (1, "1s"), (1.5, "1.5s"), (59.9999, "1m0s"), (360, "6m0s")],
    )
    def test_durations(self, seconds: float, text: str) -> None:
        """Times are written as OpenAI writes them, and never shorter than they are."""
        assert duration(seconds) == text
