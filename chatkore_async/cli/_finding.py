"""What `chatkore doctor` finds: a record for each step, how records add up, and what none may tell. No I/O."""

import json
import re
from collections.abc import Iterable, Sequence
from typing import Literal
from urllib.parse import quote

import msgspec

from chatkore_async.cli._printable import printable

STEPS = ("settings", "url", "proxy", "dns", "tcp", "tls", "models", "key", "call", "stream", "headers")
"""The steps in their order; each has one finding."""

Status = Literal["ok", "warn", "fail", "skip"]

# What is shorter is the dummy of a server that wants no key ("test"), and part of many words. The client draws the
# line at the same length.
_MIN_SECRET = 6


class Finding(msgspec.Struct, frozen=True):
    """What a step found.

    Attributes:
        step: one of `STEPS`.
        status: `"ok"`, `"warn"` (it works, and something is not as it should be), `"fail"`, or `"skip"` (it could not,
            or was not to, be looked at).
        seen: what was observed; for `"skip"` the reason.
        means: what follows from it, a line for each thing that is not as it should be; `""` when all is well.
        change: what to do about it, line by line.
    """

    step: str
    status: Status
    seen: str
    means: str = ""
    change: str = ""

    @property
    def remarks(self) -> list[tuple[str, str]]:
        """What it means and what to change, in pairs."""
        return list(zip(self.means.splitlines(), self.change.splitlines(), strict=True))


class Remark(msgspec.Struct, frozen=True):
    """One thing that is not as it should be: how bad it is, what it means and what to change, in sentences."""

    status: Literal["warn", "fail"]
    means: str
    change: str


def found(step: str, seen: Iterable[str], remarks: Iterable[Remark | None] = ()) -> Finding:
    """Return what a step found.

    Args:
        step: one of `STEPS`.
        seen: what was observed, in parts; empty ones are left out.
        remarks: what is not as it should be; `None` stands for nothing.
    """
    made = [remark for remark in remarks if remark is not None]
    statuses = {remark.status for remark in made}
    return Finding(
        step,
        "fail" if "fail" in statuses else "warn" if statuses else "ok",
        "; ".join(filter(None, map(one_line, seen))),
        "\n".join(one_line(remark.means) for remark in made),
        "\n".join(one_line(remark.change) for remark in made),
    )


def skipped(step: str, why: str) -> Finding:
    """Return that a step was not looked at, and why."""
    return Finding(step, "skip", one_line(why))


def one_line(text: str) -> str:
    """Return a text as one line that no terminal obeys."""
    return " ".join(printable(text).split())


def snippet(text: str, length: int = 60) -> str:
    """Return the beginning of a text, in quotation marks."""
    text = one_line(text)
    return f'"{text if len(text) <= length else text[: length - 3] + "..."}"'


def sentence(text: str) -> str:
    """Return a hint, which begins small and has no full stop, as a sentence."""
    text = text.strip().rstrip(".")
    return f"{text[:1].upper()}{text[1:]}." if text else ""


def verdict(findings: Sequence[Finding]) -> tuple[str, bool]:
    """Return how it all ended, in a sentence, and whether that is good."""
    failed = [finding.step for finding in findings if finding.status == "fail"]
    warned = [finding.step for finding in findings if finding.status == "warn"]
    if failed:
        others = f" Then see {', '.join(failed[1:])}." if failed[1:] else ""
        return f"Something is wrong at {failed[0]}: begin there.{others}", False
    unseen = sum(finding.status == "skip" for finding in findings)
    if warned:
        return f"It works, with {_count(len(warned), 'warning')}: {', '.join(warned)}.", True
    rest = f"; {_count(unseen, 'step')} not looked at" if unseen else ""
    return f"All is well{rest}.", True


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'s' * (number != 1)}"


def document(base_url: str, findings: Sequence[Finding], versions: dict[str, str]) -> str:
    """Return everything as one JSON document in ASCII, which goes through any pipe in any locale."""
    whole = {
        "base_url": one_line(base_url),
        "ok": verdict(findings)[1],
        "findings": msgspec.to_builtins(findings),
        "versions": versions,
    }
    return json.dumps(whole, indent=2)


class Mask:
    """Takes secrets out of texts: the key above all, in the forms in which a server may echo it.

    Args:
        secrets: what must not be told; what is shorter than 6 characters is no secret.
    """

    def __init__(self, secrets: Iterable[str]) -> None:
        forms = {form for secret in secrets for form in _forms(secret) if len(form) >= _MIN_SECRET}
        longest_first = sorted(forms, key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, longest_first))) if forms else None

    def __call__(self, text: str) -> str:
        """Return a text without them."""
        return text if self._pattern is None else self._pattern.sub("***", text)

    def finding(self, finding: Finding) -> Finding:
        """Return a finding without them."""
        return Finding(finding.step, finding.status, self(finding.seen), self(finding.means), self(finding.change))


def _forms(secret: str) -> Iterable[str]:
    bare = secret.strip().strip("'\"").strip()
    # What was pasted with its header's name before it is a key all the same.
    for form in (secret, secret.strip(), bare, re.sub("^bearer +", "", bare, flags=re.IGNORECASE)):
        yield from (form, one_line(form), quote(form, safe=""), quote(form), json.dumps(form)[1:-1])
