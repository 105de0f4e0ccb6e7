"""What the settings mean: the key and the base URL. From observations to findings, without I/O."""

import re
from collections.abc import Mapping
from urllib.parse import urlsplit

from chatkore_async.cli._account import KEYLESS, is_loopback
from chatkore_async.cli._finding import Finding, Remark, found
from chatkore_async.cli._observed import Account, Hidden

_OTHER_KEYS = ("OPENAI_API_KEY", "OPENROUTER_API_KEY", "DEEPSEEK_API_KEY", "ANTHROPIC_API_KEY")
_SET_KEY = "export CHATKORE_API_KEY=..., with the key as the server's page of keys shows it."

# What is wrong with a key, by its form, and what to do. All but the last kind can be sent, and the server decides.
_SIGNS: tuple[tuple[re.Pattern[str], Remark], ...] = (
    (
        re.compile(r"[^ -~]"),
        Remark(
            "fail",
            "The key has characters that no header can carry: a line break, a character of a word processor.",
            "Copy it again, as plain text.",
        ),
    ),
    (
        re.compile(r"""^["'`].*|.*["'`]$""", re.DOTALL),
        Remark(
            "warn",
            "The key has quotation marks around it, which are sent as a part of it.",
            "Take them out; a file of variables for docker or systemd takes values without them.",
        ),
    ),
    (
        re.compile(r"^bearer\b", re.IGNORECASE),
        Remark(
            "warn",
            "The key begins with the word Bearer, which the client adds by itself.",
            "Set CHATKORE_API_KEY to what stands behind it.",
        ),
    ),
    (
        re.compile(r"^https?://", re.IGNORECASE),
        Remark("warn", "The key looks like a URL.", "Set CHATKORE_BASE_URL to the URL, CHATKORE_API_KEY to the key."),
    ),
    (
        re.compile(r"\.\.\.|^\$|^<.*>$|your[-_ ]|^sk-x+$", re.IGNORECASE),
        Remark("warn", "The key looks like a placeholder that was to be replaced.", _SET_KEY),
    ),
    (
        re.compile(r"^(?!bearer\b).* ", re.IGNORECASE),
        Remark("warn", "The key has a blank in it.", "Copy it again; perhaps two things were pasted."),
    ),
)


def read_account(option: str | None, environ: Mapping[str, str]) -> Account:
    """Return whom to look at: an option wins over the environment, and that over the default."""
    variable = environ.get("CHATKORE_BASE_URL", "").strip()
    url = option or variable or None
    return Account(
        url=url,
        url_source="--base-url" if option else "CHATKORE_BASE_URL" if variable else "default",
        key=Hidden(environ.get("CHATKORE_API_KEY", "")),
        local=is_loopback(url or ""),
        other_keys=tuple(name for name in _OTHER_KEYS if environ.get(name, "").strip()),
    )


def signs(account: Account) -> list[Remark]:
    """Return what a key's form tells about it."""
    key = account.key.strip()
    if not key:
        return []
    made = [remark for form, remark in _SIGNS if form.search(key)]
    # Of one that cannot be sent nothing else matters.
    made = [remark for remark in made if remark.status == "fail"] or made
    if key != account.key:
        made.append(
            Remark(
                "warn",
                "There are blanks or line ends around the key, which are taken off here; other programs may send them.",
                "Take them out of CHATKORE_API_KEY.",
            )
        )
    return made


def key_to_send(account: Account) -> str | None:
    """Return the key that requests carry, or `None` when no header can carry it.

    Without one, the word is sent that other commands send to a server on this machine: what a server answers to it
    still tells whether the base URL is right.
    """
    if any(remark.status == "fail" for remark in signs(account)):
        return None
    return Hidden(account.key.strip()) or KEYLESS


def shown_key(key: str) -> str:
    """Return as much of a key as lets its owner tell it from another: of a short one its length alone."""
    size = f"{len(key)} character{'s' * (len(key) != 1)}"
    if len(key) < 16:
        return size
    return re.sub("[^!-~]", "?", f"{key[:3]}...{key[-4:]}") + f" ({size})"


def examine_settings(account: Account) -> Finding:
    """Judge where the settings come from, and the form of the key."""
    origin = "the default base URL" if account.url is None else f"base URL from {account.url_source}"
    key, remarks = account.key.strip(), signs(account)
    if key:
        return found("settings", [origin, f"key from CHATKORE_API_KEY: {shown_key(key)}"], remarks)
    if account.local:
        return found("settings", [origin, "no key, which a server on this machine may not need"])
    if account.other_keys:
        names = " and ".join(account.other_keys)
        means = f"CHATKORE_API_KEY is not set. {names} is, but the client reads no other program's key."
        change = f'If it is for this server: export CHATKORE_API_KEY="${account.other_keys[0]}".'
    else:
        means = "CHATKORE_API_KEY is not set, and without a key the client sends nothing."
        change = f"{_SET_KEY} A server that asks for none takes any word."
    return found("settings", [origin, "no key"], [Remark("fail", means, change)])


_ONE_CALL = re.compile(r"/(?:models|completions|embeddings|responses|messages)$")
_TWICE = re.compile(r"/(v\d+)/\1$")


def examine_url(given: str | None, base_url: str | None, refusal: str = "") -> Finding:
    """Judge the form of the base URL.

    Args:
        given: as it was given, or `None` for the default.
        base_url: what the client makes of it, `None` when it refuses it.
        refusal: why it does.
    """
    if base_url is None:
        change = "Write it as https://host/v1, and nothing before or after it."
        return found("url", [refusal], [Remark("fail", "The client cannot send anything there.", change)])
    parts = urlsplit(base_url)
    seen = [f"calls go to {base_url}/chat/completions"]
    path = urlsplit(given or base_url).path.rstrip("/")
    if not path:
        seen.append("/v1 was added")
    elif path.endswith("/chat/completions"):
        seen.append("/chat/completions was taken off the base URL and is added to each call")
    remarks: list[Remark | None] = []
    if parts.scheme == "http" and not is_loopback(base_url):
        remarks.append(
            Remark("warn", "Without TLS, whoever is on the way can read the key.", "Use https:// if the server has it.")
        )
    if (one := _ONE_CALL.search(parts.path)) is not None:
        base = base_url.removesuffix(one[0])
        remarks.append(Remark("warn", f"It ends in {one[0]}, the path of one kind of call.", f"Try --base-url {base}"))
    elif (twice := _TWICE.search(parts.path)) is not None:
        base = base_url.removesuffix(f"/{twice[1]}")
        remarks.append(Remark("warn", f"It ends in /{twice[1]} twice.", f"Try --base-url {base}"))
    if (parts.scheme, parts.port) in (("http", 443), ("https", 80)):
        other = "https" if parts.scheme == "http" else "http"
        remarks.append(
            Remark(
                "warn",
                f"Port {parts.port} is where {other} is spoken, as a rule.",
                f"Try {other}://, or leave the port out.",
            )
        )
    return found("url", seen, remarks)
