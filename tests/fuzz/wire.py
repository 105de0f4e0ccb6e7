"""Fuzz what reads the wire: `python tests/fuzz/wire.py [SECONDS] [CORPUS]`, with atheris installed.

It begins with the samples of `tests/samples/`, goes on with what it finds to reach new branches, and stops at the first
input that breaks a rule of `rules.py`, which it writes to a file. CORPUS is a folder that keeps what it found.
"""

import sys
import tempfile
from pathlib import Path

import atheris

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent), str(HERE.parent.parent)]

with atheris.instrument_imports(include=["chatkore_async"]):
    from rules import check

# What random bytes would take long to come upon.
WORDS = [
    *("data: ", "event: error", "error: ", ": PING", "[DONE]", "\\xEF\\xBB\\xBF", "\\x0D\\x0A", "\\x0A\\x0A"),
    *(
        '{\\"error\\":{\\"message\\":',
        '\\"choices\\":[{',
        '\\"delta\\":{',
        '\\"message\\":{',
        '\\"content\\":',
        '\\"index\\":',
    ),
    *(
        '\\"tool_calls\\":[{',
        '\\"function\\":{',
        '\\"arguments\\":',
        '\\"name\\":',
        '\\"id\\":',
        '\\"finish_reason\\":',
    ),
    *(
        '\\"usage\\":{',
        '\\"prompt_tokens\\":',
        '\\"reasoning\\":',
        '\\"created\\":',
        '\\"type\\":',
        '\\"code\\":',
        "null",
        "NaN",
    ),
    *(
        "sk-planted-0123456789abcdef",
        "insufficient_quota",
        "maximum context length",
        "<html><title>",
        "\\\\ud83d",
        "1e999",
    ),
]


def seeds(folder: Path) -> None:
    """Write the samples' bodies as inputs."""
    for body in sorted((HERE.parent / "samples").glob("*/body.*")):
        (folder / body.parent.name).write_bytes(b"\0\x80" + body.read_bytes())


def main() -> None:
    """Fuzz for so many seconds."""
    seconds, *corpus = sys.argv[1:] or ["60"]
    with tempfile.TemporaryDirectory() as place:
        given = Path(place) / "seeds"
        given.mkdir()
        seeds(given)
        words = Path(place) / "words"
        words.write_text("".join(f'"{word}"\n' for word in WORDS), encoding="utf-8")
        folders = [corpus[0] if corpus else str(Path(place) / "found"), str(given)]
        Path(folders[0]).mkdir(exist_ok=True)
        options = [f"-max_total_time={seconds}", f"-dict={words}", "-max_len=8192", "-timeout=10", "-rss_limit_mb=4096"]
        atheris.Setup([sys.argv[0], *options, *folders], lambda data: check(bytes(data)))
        atheris.Fuzz()


if __name__ == "__main__":
    main()
