"""Settings: what they mean, what they refuse, and what they show of the key."""

import copy
import pickle
import traceback
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chatkore_async import AsyncChatKore
from chatkore_async._config import (
    DEFAULT_BASE_URL,
    NO_TIMEOUT,
    Endpoint,
    Limits,
    RetryBudget,
    RetryPolicy,
    Secret,
    Timeout,
    checked_key,
    conceal,
    is_loopback,
    make_endpoint,
    merge_headers,
    normalize_base_url,
    user_agent,
)
from chatkore_async._options import Settings, with_max_retries
from chatkore_async.errors import ConfigurationError

KEY = "sk-Zx9-planted"
ENV = {"CHATKORE_API_KEY": f" {KEY}\n", "CHATKORE_BASE_URL": " https://env.host/v1/ "}


# The base URL.


@pytest.mark.parametrize("host", ["https://host", "http://host:8080", "https://127.0.0.1:1", "http://[::1]:8000"])
@pytest.mark.parametrize(
    "form", ["", "/", "/v1", "/v1/", "/v1/chat/completions", "/v1/chat/completions/", "/chat/completions", "//"]
)
def test_every_form_of_the_vendors_pages_means_the_same(host: str, form: str) -> None:
    """Three forms are documented, with or without a trailing slash: all reach `/v1/chat/completions`."""
    assert normalize_base_url(f" {host}{form} ") == f"{host}/v1"


@pytest.mark.parametrize(
    "given, meant",
    [
        ("https://host/proxy/openai/v1", "https://host/proxy/openai/v1"),
        ("https://host/openai/", "https://host/openai"),
        ("https://host/openai/chat/completions", "https://host/openai"),
        ("HTTPS://Host/v1", "https://Host/v1"),
        ("https://host:/v1", "https://host/v1"),
        ("https://例え.jp", "https://例え.jp/v1"),
    ],
)
def test_another_base_path_is_kept(given: str, meant: str) -> None:
    """A gateway's own path is the caller's business."""
    assert normalize_base_url(given) == meant


@pytest.mark.parametrize(
    "given, reason",
    [
        ("", "https://"),
        ("host/v1", "did you mean 'https://host/v1'?"),
        ("ftp://host", "https://"),
        ("https://", "name a host"),
        ("https:///v1", "name a host"),
        ("https://user:pw@host", "user name or password"),
        ("https://user@host", "user name or password"),
        ("https://host:99999", "not a URL"),
        ("https://host:port", "not a URL"),
        ("https://host:0", "port 0"),
        ("https://[::1", "not a URL"),
        ("https://ho st", "white space"),
        ("https://ho\nst", "white space"),
        ("https://host/a b", "white space"),
        ("https://host/?a=b", "extra_query="),
        ("https://host/#a", "extra_query="),
        (7, "must be a string, not int"),
    ],
)
def test_what_is_no_base_url_is_refused(given: Any, reason: str) -> None:
    """At construction, with what is wrong."""
    with pytest.raises(ConfigurationError, match="base_url") as caught:
        normalize_base_url(given)
    assert reason in str(caught.value)


@pytest.mark.parametrize(
    "given",
    [KEY, f"{KEY}@host", f"u:{KEY}@host/x", f"https://u:{KEY}@host", f"https://host?key={KEY}", f"ftp://u:{KEY}@host"],
)
def test_a_key_in_the_wrong_place_is_not_shown(given: str) -> None:
    """A key pasted as base URL, or into one, is in no message."""
    with pytest.raises(ConfigurationError) as caught:
        normalize_base_url(given)
    assert KEY not in str(caught.value)


@given(st.text(max_size=30) | st.text(alphabet="htps:/@?#[]. v1\n", max_size=30).map("https://".__add__))
def test_any_text_is_a_base_url_or_refused(text: str) -> None:
    """No raw error of the standard library, and normalising twice changes nothing."""
    try:
        url = normalize_base_url(text)
    except ConfigurationError:
        return
    assert normalize_base_url(url) == url


@pytest.mark.parametrize(
    "url, here",
    [
        (f"http://{host}/v1", True)
        for host in ("localhost", "localhost.", "a.localhost", "127.0.0.1:80", "127.1.2.3", "[::1]:80")
    ]
    + [(f"http://{host}/v1", False) for host in ("host", "localhost.evil.com", "10.0.0.1", "[::2]")]
    + [("nonsense", False)],
)
def test_loopback_is_this_machine(url: str, here: bool) -> None:
    """Plain http is fine there, and a proxy is not."""
    assert is_loopback(url) is here


# The key.


def endpoint(key: Any = KEY, base_url: Any = None, headers: Any = None, environ: Any = None) -> Endpoint:
    return make_endpoint(conceal(key), base_url, headers, environ or {})


def test_arguments_win_over_the_environment() -> None:
    """An argument, else the variable, else the vendor's address; blanks around them do not count."""
    assert endpoint(None, environ=ENV).key == KEY
    assert endpoint("  other ", environ=ENV).key == "other"
    assert endpoint(environ=ENV).base_url == "https://env.host/v1"
    assert endpoint(base_url="https://host", environ=ENV).base_url == "https://host/v1"
    assert endpoint().base_url == DEFAULT_BASE_URL
    assert endpoint(environ={"CHATKORE_BASE_URL": "  "}).base_url == DEFAULT_BASE_URL


@pytest.mark.parametrize(
    "key, reason",
    [
        (None, "no API key: set the environment variable CHATKORE_API_KEY"),
        ("", "the API key is empty: set CHATKORE_API_KEY"),
        (" \t\n", "the API key is empty: set CHATKORE_API_KEY"),
        ("sk-a\nb", "CHATKORE_API_KEY"),
        ("sk-a\r\nX: y", "CHATKORE_API_KEY"),
        ("sk-a\0", "CHATKORE_API_KEY"),
        ("sk-a\x7f", "CHATKORE_API_KEY"),
        ("“sk-a”", "CHATKORE_API_KEY"),
        ("sk-ключ", "CHATKORE_API_KEY"),
        (b"sk-a", "not bytes"),
        (("sk-a",), "not tuple"),
        (7, "not int"),
    ],
)
def test_a_key_that_cannot_be_sent_is_refused(key: Any, reason: str) -> None:
    """At construction, with the name of the variable, and without the key."""
    for environ in ({}, {"CHATKORE_API_KEY": " "}):
        with pytest.raises(ConfigurationError) as caught:
            endpoint(key, environ=environ)
        assert reason in str(caught.value)
        assert "sk-a" not in str(caught.value)


def test_a_callable_is_asked_later() -> None:
    """Keys rotate: a callable is kept, and no header made of it."""

    def source() -> str:
        raise AssertionError("not asked at construction")

    made = endpoint(source)
    assert made.key is source
    assert "Authorization" not in made.headers


def test_a_request_carries_little() -> None:
    """`wire.md` §4: WAFs block SDK fingerprints, so there is one name and it can be overridden."""
    made = endpoint(headers={"user-agent": "mine", "X-Team": "a"})
    assert made.headers == {
        "Accept": "application/json",
        "Content-Type": "application/json",
        "Authorization": f"Bearer {KEY}",
        "user-agent": "mine",
        "X-Team": "a",
    }
    assert made.headers_of_caller == {"user-agent": "mine", "X-Team": "a"}
    assert endpoint().headers["User-Agent"] == user_agent()
    assert user_agent().startswith("chatkore-async/")


def test_the_query_is_appended() -> None:
    """`extra_query` goes into the URL, lists as repeated names."""
    made = endpoint(base_url="https://host")
    assert made.url("/models") == "https://host/v1/models"
    assert made.url("/models", {"a": "b c", "n": [1, 2]}) == "https://host/v1/models?a=b+c&n=1&n=2"


def locals_of(error: BaseException) -> str:
    """What the frames of our package show of themselves, as crash reporters send it away."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    return "".join(repr(frame.f_locals) for frame in frames if "chatkore_async" in frame.f_code.co_filename)


@pytest.mark.parametrize(
    "key, base_url, headers, environ",
    [
        (f"{KEY}\nx", None, None, {}),
        (KEY, "nonsense", None, {}),
        (KEY, 7, None, {}),
        (KEY, None, {"a b": "c"}, {}),
        (KEY.encode(), None, None, {}),
        ((KEY,), None, None, {}),
        (None, "nonsense", None, ENV),
        (None, None, {"a b": "c"}, ENV),
        (None, None, None, {"CHATKORE_API_KEY": f"{KEY}\nx"}),
    ],
)
def test_a_failing_construction_shows_no_key(key: Any, base_url: Any, headers: Any, environ: dict[str, str]) -> None:
    """Not in the message, and not in the locals of our frames."""
    concealed = conceal(key)
    with pytest.raises(ConfigurationError) as caught:
        make_endpoint(concealed, base_url, headers, environ)
    assert KEY not in str(caught.value)
    assert KEY not in locals_of(caught.value)


def test_a_key_written_into_a_headers_name_is_not_shown() -> None:
    """`{"Authorization: Bearer …": ""}` is a slip; what stands behind the colon is left out of the message."""
    with pytest.raises(ConfigurationError, match="'Authorization'") as caught:
        merge_headers({}, {f"Authorization: Bearer {KEY}": ""})
    assert KEY not in str(caught.value)


@pytest.mark.parametrize("fields", [{"base_url": "nonsense"}, {"timeout": -1}, {"limits": 3}, {"max_retries": "x"}])
def test_a_failing_client_shows_no_key_of_the_environment(monkeypatch: pytest.MonkeyPatch, fields: Any) -> None:
    """Neither a key that was passed nor one of the environment is in a frame of ours."""
    for key in (KEY, None, KEY.encode()):
        monkeypatch.setenv("CHATKORE_API_KEY", KEY if key is None else "")
        with pytest.raises(ConfigurationError) as caught:
            AsyncChatKore(api_key=key, **fields)
        assert KEY not in str(caught.value)
        assert KEY not in locals_of(caught.value)


def test_a_secret_shows_itself_to_nobody_who_asks_for_its_repr() -> None:
    """It stays a string for the socket; it is not in a repr, and not in a pickle."""
    secret = Secret(KEY)
    assert secret == KEY
    assert KEY not in repr([secret, {"Authorization": secret}])
    assert KEY not in repr(endpoint())
    for dump in (pickle.dumps, copy.copy, copy.deepcopy):
        with pytest.raises(TypeError, match="secret"):
            dump(secret)
    assert checked_key(secret) is secret
    assert conceal(None) is None


# Headers.


@pytest.mark.parametrize(
    "headers",
    [
        {"": "x"},
        {"a b": "x"},
        {"a:b": "x"},
        {"a\n": "x"},
        {"a\0": "x"},
        {"é": "x"},
        {"a": "x\r\nb: c"},
        {"a": "x\0"},
        {"a": "\ud800"},
        {"a": 1},
        {1: "a"},
        {"a": None},
        [("a", "b")],
        "a",
    ],
)
def test_a_header_that_cannot_be_sent_is_refused(headers: Any) -> None:
    """RFC 9110 §5: before any I/O, rather than as a split request."""
    with pytest.raises(ConfigurationError, match="header"):
        merge_headers({}, headers)


def test_headers_are_merged_without_case() -> None:
    """The caller's header takes the place of ours, however it is spelt; the base is left alone."""
    base = {"Accept": "a", "accept": "b", "X": "x"}
    assert merge_headers(base, {"ACCEPT": "c\tü"}) == {"X": "x", "ACCEPT": "c\tü"}
    assert merge_headers(base, None) == base
    assert merge_headers(base, {}) is not base
    assert base == {"Accept": "a", "accept": "b", "X": "x"}


@pytest.mark.parametrize("name", ["Authorization", "x-api-key", "X-Tenant-Token", "Cookie", "client-secret"])
def test_credentials_of_the_caller_are_concealed(name: str) -> None:
    """A header that looks like a credential is one."""
    merged = merge_headers({}, {name: KEY, "x-team": "a"})
    assert merged[name] == KEY
    assert KEY not in repr(merged)
    assert "'a'" in repr(merged)


# Numbers.

NOT_NUMBERS = [float("nan"), float("inf"), float("-inf"), -1, -0.5, True, False, "5", b"5", [5], 10**400]


def positive(kind: Any, *names: str) -> list[Any]:
    return [(kind, name, value) for name in names for value in (*NOT_NUMBERS, 0, 0.0)]


def at_least_zero(kind: Any, *names: str) -> list[Any]:
    return [(kind, name, value) for name in names for value in (*NOT_NUMBERS, None)]


LIMITS = ("max_connections", "max_connections_per_host", "max_event_size", "max_body_size")
BUDGET = ("capacity", "retry_cost", "timeout_cost", "refund")


@pytest.mark.parametrize(
    "kind, name, value",
    [
        *positive(Timeout, "total", "connect", "first_token", "idle"),
        *positive(Limits, *LIMITS, "keepalive_expiry"),
        *at_least_zero(RetryPolicy, "max_retries", "initial_delay", "max_delay", "max_retry_after"),
        *at_least_zero(RetryBudget, *BUDGET),
        *((Limits, name, 1.5) for name in LIMITS),
        *((RetryBudget, name, 1.5) for name in BUDGET),
        (RetryPolicy, "max_retries", 1.0),
        (RetryPolicy, "retry_unconfirmed", "no"),
        (RetryPolicy, "retry_unconfirmed", None),
        (RetryPolicy, "budget", 500),
    ],
)
def test_an_impossible_setting_is_refused_by_name(kind: Any, name: str, value: object) -> None:
    """No NaN, no negative number, no truth value, no string: the error names the setting."""
    with pytest.raises(ConfigurationError, match=rf"{kind.__name__}\.{name} must be"):
        kind(**{name: value})


def test_none_disables_a_limit() -> None:
    """Everywhere but where there is nothing to disable."""
    assert Timeout(total=None, connect=None, first_token=None, idle=None) == NO_TIMEOUT
    names = (*LIMITS, "keepalive_expiry")
    limits = Limits(**dict.fromkeys(names))
    assert [getattr(limits, name) for name in names] == [None] * 5
    assert RetryPolicy(budget=None).budget is None
    assert RetryPolicy(max_retries=0, initial_delay=0, max_delay=0, max_retry_after=0).max_retries == 0


def test_a_timeout_is_a_number_none_or_a_timeout() -> None:
    """A number is the total, `None` no limit at all."""
    timeout = Timeout(idle=3)
    assert Timeout.of(timeout) is timeout
    assert Timeout.of(5) == Timeout(total=5)
    assert Timeout.of(None) == NO_TIMEOUT
    for wrong in ("5", True, object()):
        with pytest.raises(ConfigurationError, match=r"Timeout\.total"):
            Timeout.of(wrong)  # type: ignore[arg-type]


def test_the_total_has_a_default_for_awaited_calls_only() -> None:
    """600 s as in the official client; a stream may go on for ever unless somebody said otherwise."""
    assert (Timeout().total_for(stream=False), Timeout().total_for(stream=True)) == (600.0, None)
    assert Timeout().leaves_total_alone
    for total in (5, None):
        chosen = Timeout(total=total)
        assert not chosen.leaves_total_alone
        assert chosen.total_for(stream=False) == chosen.total_for(stream=True) == total


def test_defaults_are_the_contracts() -> None:
    """What users rely on without saying it."""
    assert (Timeout().connect, Timeout().first_token, Timeout().idle) == (10.0, None, 300.0)
    limits = Limits()
    assert (limits.max_connections, limits.max_connections_per_host, limits.keepalive_expiry) == (1000, None, 60.0)
    policy = RetryPolicy()
    assert (policy.max_retries, policy.initial_delay, policy.max_delay) == (2, 0.5, 8.0)
    assert (policy.max_retry_after, policy.retry_unconfirmed) == (60.0, True)
    assert policy.budget == RetryBudget(capacity=500, retry_cost=5, timeout_cost=10, refund=1)


def test_options_of_a_call_are_checked_like_the_clients() -> None:
    """`timeout` and `max_retries` of one call change the settings of that call, and nothing else."""
    settings = Settings(endpoint=endpoint(), timeout=Timeout(), policy=RetryPolicy())
    assert settings.with_call_options({}) is settings
    changed = settings.with_call_options({"timeout": 3, "max_retries": 0})
    assert (changed.timeout, changed.policy) == (Timeout(total=3), RetryPolicy(max_retries=0))
    assert settings.with_call_options({"timeout": None}).timeout == NO_TIMEOUT
    assert with_max_retries(RetryPolicy(max_delay=1), 5) == RetryPolicy(max_delay=1, max_retries=5)
    for wrong in ({"timeout": -1}, {"max_retries": -1}, {"max_retries": True}):
        with pytest.raises(ConfigurationError, match="must be"):
            settings.with_call_options(wrong)
