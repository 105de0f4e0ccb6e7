"""The command line `chatkore`, of the extra `cli`.

Nothing but the standard library is imported here, so that the answer to a missing library is a sentence.
"""

import sys
from importlib import import_module
from importlib.util import find_spec
from typing import NoReturn

__all__ = ["main"]


def main() -> NoReturn:
    """Run `chatkore` with the arguments of the process, and exit with its status."""
    try:
        if any(find_spec(library) is None for library in ("click", "prompt_toolkit", "rich")):
            sys.exit(
                "chatkore: the command line needs click, prompt-toolkit and rich: pip install 'chatkore-async[cli]'"
            )
        # Not an import statement: it could only stand at the top, before anybody is there to catch what it raises.
        import_module("chatkore_async.cli._app").main()
    except KeyboardInterrupt:
        # Pressed while modules were loaded; a command that runs has an answer of its own.
        sys.stderr.write("interrupted\n")
        sys.exit(130)
    raise AssertionError("click exits")  # pragma: no cover
