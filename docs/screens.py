"""Take the pictures of the terminal that the manual shows: `python docs/screens.py [SCENE ...]`.

Each scene is a program in a real terminal (tmux), driven by keys. What the terminal shows at the end, colours included,
is written to `docs/_static/screens/SCENE.svg`. It needs tmux, and the extra `cli`; the scene of a real model needs the
extra `llm` and its model as well.
"""

import contextlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from io import StringIO
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.terminal_theme import TerminalTheme
from rich.text import Text

SCREENS = Path(__file__).parent / "_static" / "screens"
PATIENCE = 60.0
"""Seconds that a program may take to show what is waited for."""

# Readable on both backgrounds of the manual, since the picture brings its own.
THEME = TerminalTheme(
    (24, 26, 31),
    (216, 219, 226),
    [
        (72, 77, 88),
        (240, 113, 120),
        (134, 200, 122),
        (229, 192, 123),
        (97, 175, 239),
        (198, 140, 226),
        (86, 194, 205),
        (216, 219, 226),
    ],
    [
        (120, 126, 138),
        (250, 140, 146),
        (160, 220, 148),
        (240, 208, 150),
        (130, 195, 250),
        (215, 165, 240),
        (120, 215, 225),
        (240, 242, 246),
    ],
)


class Terminal:
    """A terminal in tmux, in a directory of its own."""

    def __init__(self, name: str, columns: int, rows: int, environment: dict[str, str]) -> None:
        self._socket = f"chatkore-{os.getpid()}-{name}"
        self.place = Path(tempfile.mkdtemp())
        shown = " ".join(f"{key}={shlex.quote(value)}" for key, value in environment.items())
        shell = f"cd {self.place} && env {shown} PS1='$ ' bash --norc --noprofile"
        self._tmux("-f", "/dev/null", "new-session", "-d", "-x", str(columns), "-y", str(rows), shell)
        self.wait(r"\$$")

    def _tmux(self, *words: str) -> str:
        done = subprocess.run(["tmux", "-L", self._socket, *words], check=True, capture_output=True, text=True)
        return done.stdout

    def type(self, text: str) -> None:
        """Type a line."""
        self._tmux("send-keys", "-l", text)
        self.press("Enter")

    def press(self, key: str) -> None:
        """Press a key by tmux's name for it, such as `C-c`."""
        self._tmux("send-keys", key)

    def wait(self, pattern: str) -> None:
        """Wait until the screen's text, without blank lines at its end, matches."""
        wanted = re.compile(pattern)
        for _ in range(int(PATIENCE / 0.05)):
            if wanted.search(self._tmux("capture-pane", "-p").rstrip()):
                return
            time.sleep(0.05)
        raise TimeoutError(f"no {pattern!r} in:\n{self._tmux('capture-pane', '-p')}")

    def picture(self, title: str) -> str:
        """Return the screen as SVG."""
        text = self._tmux("capture-pane", "-e", "-p").rstrip("\n")
        width = int(self._tmux("display-message", "-p", "#{pane_width}"))
        console = Console(record=True, width=width, file=StringIO(), force_terminal=True, color_system="truecolor")
        console.print(Text.from_ansi(text), soft_wrap=True)
        picture = console.export_svg(title=title, theme=THEME, unique_id="screen")
        # The fonts that Rich names lie on the web, and a manual that is read offline has its own.
        picture = re.sub(r"@font-face \{.*?\}\s*", "", picture, flags=re.DOTALL)
        return picture.replace("Fira Code", "ui-monospace, SFMono-Regular, Menlo, Consolas, DejaVu Sans Mono")

    def close(self) -> None:
        """End it and all that runs in it."""
        with contextlib.suppress(subprocess.CalledProcessError):
            self._tmux("kill-server")
        shutil.rmtree(self.place, ignore_errors=True)


class Scene(NamedTuple):
    """What is done in a terminal, and how large that is."""

    play: Callable[[Terminal], None]
    columns: int = 88
    rows: int = 30


def demo(terminal: Terminal) -> None:
    """The demo, to its end."""
    terminal.type("chatkore demo")
    terminal.wait(r"ended well, through .*\n\$$")


def question(terminal: Terminal) -> None:
    """A question with a file, and the answer as JSON."""
    terminal.type("echo 'def area(r): return 3.14 * r ** 2' > circle.py")
    terminal.type("cat circle.py | chatkore chat 'What does this do?'")
    terminal.wait(r"finish\s+reason stop\n\$$")
    terminal.type("chatkore chat --json --quiet 'And as JSON?' | head -n 12")
    terminal.wait(r"\{[\s\S]*\n\$$")


def errors(terminal: Terminal) -> None:
    """What an error looks like."""
    terminal.type("chatkore chat --base-url https://api.chatkore.com 'Hello'")
    terminal.wait(r"Hint: .*[\s\S]*\n\$$")
    terminal.type("clear; chatkore chat --base-url http://127.0.0.1:1 'Hello'")
    terminal.wait(r"Hint: .*[\s\S]*\n\$$")
    terminal.type("chatkore serve --llm circle.gguf")
    terminal.wait(r"circle.gguf\nHint: .*[\s\S]*\n\$$")


def serve(terminal: Terminal) -> None:
    """The server with a script of faults, and what a few questions met."""
    terminal.type("""echo '{"rules": [{"first": 1, "status": 429}, {"every": 3, "cut_after": 900}]}' > faults.json""")
    terminal.type("chatkore serve --script faults.json")
    terminal.wait("Ctrl-C stops it")
    url = "http://127.0.0.1:8000"
    for stream in ("", "--no-stream", "", ""):
        ask = ["chat", "--base-url", url, "-q", *stream.split(), "Hello"]
        subprocess.run([sys.executable, "-m", "chatkore_async.cli", *ask], check=False, capture_output=True)
    terminal.wait(r"cut")
    terminal.press("C-c")
    terminal.wait(r"Stopped.*\n[\s\S]*\$$")


def batch(terminal: Terminal) -> None:
    """A batch that is stopped, goes on where it ended, and then asks again what had failed."""
    with (terminal.place / "in.jsonl").open("w") as lines:
        for number in range(20_000):
            body = {"model": "gpt-4o-mini", "messages": [{"role": "user", "content": f"What is {number} + 1?"}]}
            line = {"custom_id": f"question-{number}", "method": "POST", "url": "/v1/chat/completions", "body": body}
            print(json.dumps(line), file=lines)
    (terminal.place / "faults.json").write_text('{"rules": [{"first": 12, "status": 400}]}')
    options = ["--port", "0", "--quiet", "--interval", "0", "--script", str(terminal.place / "faults.json")]
    command = [sys.executable, "-m", "chatkore_async.cli", "serve", *options]
    with serving(command) as url:
        terminal.type(f"clear; export CHATKORE_BASE_URL={url}; clear")
        terminal.type("chatkore batch in.jsonl out.jsonl")
        terminal.wait(r"[5-9]\d{3}/20000")
        terminal.press("C-c")
        terminal.wait(r"\n\$$")
        terminal.type("chatkore batch in.jsonl out.jsonl")
        terminal.wait(r"asks again\.\n\$$")
        terminal.type("chatkore batch in.jsonl out.jsonl --retry-failed")
        terminal.wait(r"Every request.*\n\$$")


def llm(terminal: Terminal) -> None:
    """A conversation with a real model, of which one answer is stopped."""
    command = [sys.executable, "-m", "chatkore_async.cli", "serve", "--llm", "--port", "0"]
    with serving(command) as url:
        terminal.type(f"chatkore chat --model SmolLM2 --temperature 0 --base-url {url}")
        terminal.wait(r"> $|>$")
        terminal.type("In one sentence: why is the sky blue?")
        terminal.wait(r"finish\s+reason \w+\n>")
        terminal.type("Write down the numbers from 1 to 500, one on each line.")
        terminal.wait(r"each line\.\n(.*\n){4,}")
        terminal.press("C-c")
        terminal.wait(r"stopped.*\n>")


def doctor(terminal: Terminal) -> None:
    """The doctor, with a server that is well."""
    terminal.type("chatkore doctor")
    terminal.wait(r"\n\$$")


@contextlib.contextmanager
def serving(command: list[str]) -> Iterator[str]:
    """Run a server, and give its base URL, which stands in its first line."""
    server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        assert server.stdout is not None
        found = re.search(r"http://\S+/v1", server.stdout.readline())
        assert found is not None, "the server does not start"
        yield found[0]
    finally:
        server.terminate()
        server.wait()


SCENES = {
    "demo": Scene(demo, rows=44),
    "question": Scene(question),
    "errors": Scene(errors, rows=14),
    "serve": Scene(serve, rows=22),
    "batch": Scene(batch, rows=48),
    "llm": Scene(llm, rows=26),
    "doctor": Scene(doctor, rows=40),
}


def main() -> None:
    """Take the pictures that are asked for, or all."""
    scripts = Path(sys.executable).parent
    SCREENS.mkdir(parents=True, exist_ok=True)
    with serving([sys.executable, "-m", "chatkore_async.cli", "serve", "--port", "0", "--quiet"]) as url:
        environment = {
            "PATH": f"{scripts}:{os.environ['PATH']}",
            "TERM": "tmux-256color",
            "LANG": "C.UTF-8",
            "HOME": "/nonexistent",
            "CHATKORE_BASE_URL": url,
        }
        for name in sys.argv[1:] or SCENES:
            scene = SCENES[name]
            terminal = Terminal(name, scene.columns, scene.rows, environment)
            try:
                scene.play(terminal)
                (SCREENS / f"{name}.svg").write_text(terminal.picture("chatkore"), encoding="utf-8")
            finally:
                terminal.close()
            print(f"docs/_static/screens/{name}.svg")


if __name__ == "__main__":
    main()
