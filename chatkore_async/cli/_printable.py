"""Text on its way to a terminal, or from one: what may not pass, and what is to be mended. No I/O."""

import re

# The C0 and C1 controls (ECMA-48) and DEL. A tab and a line end are text; of a CR LF the second half is enough, and a
# CR alone would write over what stands there.
_UNPRINTABLE = dict.fromkeys((*range(0x20), *range(0x7F, 0xA0)), "\ufffd") | {0x09: "\t", 0x0A: "\n", 0x0D: ""}
# All halves of surrogate pairs but those by which Python stands for bytes that it could not decode.
_HALVES = re.compile("[\ud800-\udc7f\udd00-\udfff]")


def printable(text: str) -> str:
    """Return a text that a terminal shows and does not obey: no escape sequence, no control character."""
    return text.translate(_UNPRINTABLE)


def mended(text: str) -> str:
    """Return what was typed, or given as an argument, as text that JSON can hold.

    In a locale that is not UTF-8, Python hands over bytes that it cannot decode as halves of surrogate pairs. They are
    decoded as UTF-8 after all; what is not that becomes U+FFFD.
    """
    return _HALVES.sub("\ufffd", text).encode("utf-8", "surrogateescape").decode("utf-8", "replace")
