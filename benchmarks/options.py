"""What the options of several commands take."""

import argparse


def positive(text: str) -> int:
    """A whole number from 1, for `argparse`."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"it takes a whole number from 1, not {text!r}")
    return int(text)
