"""The README and the manual: what they show runs, prints what they say, and leads where they say."""

import ast
import asyncio
import inspect
import logging
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple
from urllib.parse import unquote

import pytest
from markdown_it import MarkdownIt
from markdown_it.token import Token

import chatkore_async
import chatkore_async.batch
import chatkore_async.integrations.aiohttp_web
import chatkore_async.integrations.fastapi
import chatkore_async.testing
import chatkore_async.types
from chatkore_async import AsyncChatKore
from chatkore_async.testing import ChatKoreServer

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted(path for path in ROOT.glob("docs/**/*.md") if "_build" not in path.parts)]
OUTPUT = "<!-- output -->"
NOT_RUN = re.compile(r"<!-- not run:(.*)-->")
FILE = re.compile(r"<!-- file: (\S+) -->")
SESSION = "<!-- session -->"
PRINTED_BY = re.compile(r"<!-- printed by (\d+) -->")
SERVER = re.compile(r"(chatkore serve|uvicorn|gunicorn|python service\.py)\b.*?\b(8000|9000)\b")
COMMANDS = [
    "python3 -m venv .venv && .venv/bin/pip install -q -e '.[cli]' && .venv/bin/chatkore demo",
    "python3 -m venv .venv && .venv/bin/pip install -q -e '.[dev]' && .venv/bin/python -m pytest -n auto",
]


class Block(NamedTuple):
    """A program of a page: where it stands, its text, what it is said to print, and why it is not run."""

    page: Path
    line: int
    code: str
    output: str | None
    reason: str | None

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def tokens(page: Path) -> list[Token]:
    return MarkdownIt("commonmark").enable("table").parse(page.read_text(encoding="utf-8"))


def blocks(page: Path) -> Iterator[Block]:
    found = [token for token in tokens(page) if token.type in ("fence", "html_block", "paragraph_open", "heading_open")]
    for number, token in enumerate(found):
        if token.type != "fence" or token.info.strip() != "python":
            continue
        before = comment_before(found, number)
        if FILE.search(before):
            continue  # part of a session
        opted_out = NOT_RUN.search(before)
        assert token.map is not None
        yield Block(
            page,
            token.map[0] + 1,
            token.content,
            next(shown_after(found[number + 1 :]), None),
            opted_out and opted_out[1].strip(),
        )


def comment_before(found: list[Token], number: int) -> str:
    before = found[number - 1] if number else None
    return before.content if before is not None and before.type == "html_block" else ""


def shown_after(following: list[Token]) -> Iterator[str]:
    """The marked output of a block, if there is one before the next block."""
    for number, token in enumerate(following):
        if token.type == "fence":
            return
        if token.type == "html_block" and token.content.strip() == OUTPUT:
            shown = following[number + 1]
            assert shown.type == "fence", f"{OUTPUT} is not followed by a block"
            assert shown.info.strip() == "text", f"{OUTPUT} is not followed by a block of text"
            yield shown.content


BLOCKS = [block for page in PAGES for block in blocks(page)]


@contextmanager
def in_a_thread(server: ChatKoreServer) -> Iterator[ChatKoreServer]:
    """Run a server on a loop of its own, so that a program may do with its loop what it likes."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    try:
        asyncio.run_coroutine_threadsafe(server.start(), loop).result(timeout=10)
        yield server
        asyncio.run_coroutine_threadsafe(server.close(), loop).result(timeout=10)
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


@pytest.fixture(autouse=True)
def _logging_as_it_was() -> Iterator[None]:
    """Programs set up logging; the next test is not to notice."""
    loggers = [logging.getLogger(), logging.getLogger("chatkore_async")]
    before = [(logger, logger.level, list(logger.handlers)) for logger in loggers]
    yield
    for logger, level, handlers in before:
        logger.setLevel(level)
        logger.handlers[:] = handlers


@pytest.fixture
def relay(monkeypatch: pytest.MonkeyPatch) -> Iterator[ChatKoreServer]:
    """A running server, which the environment names."""
    with in_a_thread(ChatKoreServer()) as server:
        monkeypatch.setenv("CHATKORE_BASE_URL", server.base_url)
        monkeypatch.setenv("CHATKORE_API_KEY", "sk-docs")
        yield server


def run(code: str, name: str) -> None:
    """Run a program, or the inside of a coroutine that has a `client`."""
    compiled = compile(code, name, "exec", ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
    names: dict[str, Any] = {"__name__": "__main__"}
    if not compiled.co_flags & inspect.CO_COROUTINE:
        exec(compiled, names)
        return

    async def within() -> None:
        async with AsyncChatKore() as client:
            names["client"] = client
            await eval(compiled, names)

    asyncio.run(within())


def run_as_tests(code: str, place: Path) -> None:
    """Run a program that is a test suite, as a user of pytest does."""
    (place / "conftest.py").write_text('pytest_plugins = ["chatkore_async.testing.fixtures"]\n')
    (place / "test_page.py").write_text(code)
    options = ["-q", "-W", "error", "-p", "no:cacheprovider", "-o", "asyncio_default_fixture_loop_scope=function"]
    command = [sys.executable, "-m", "pytest", *options, str(place)]
    # Options that this suite was started with are not the page's.
    environment = {name: value for name, value in os.environ.items() if name != "PYTEST_ADDOPTS"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=place, env=environment, check=False, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr


def steadied(text: str) -> list[str]:
    """Lines without what differs from run to run: times (also in JSON), ids of calls, and the port of a server."""
    text = re.sub(r"\d+\.\d+( ?s\b|(?=[,}]))", r"#\1", text)
    text = re.sub(r"\b\d\d:\d\d:\d\d\b", "#", re.sub(r"\b\d+ ms\b", "# ms", text))
    text = re.sub(r"\b(?:[0-9a-f]{16}|[0-9a-f]{32})\b", "#" * 16, text)
    return [re.sub(r"127\.0\.0\.1:\d+", "127.0.0.1:#", line).rstrip() for line in text.strip().splitlines()]


@pytest.mark.parametrize("block", [block for block in BLOCKS if block.reason is None], ids=str)
@pytest.mark.usefixtures("relay")
def test_a_program_of_the_manual_runs(block: Block, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """What a reader copies works, without a warning, and prints what the page says it prints."""
    if re.search(r"^(async )?def test_", block.code, re.MULTILINE):
        run_as_tests(block.code, tmp_path)
        return
    run(block.code, str(block))
    if block.output is not None:
        assert steadied(capsys.readouterr().out) == steadied(block.output)


class Session:
    """A reader at the terminal: saves files, starts servers in terminals of their own, and types commands.

    The ports of the page are replaced by free ones.
    """

    def __init__(self, place: Path) -> None:
        self.place = place
        self.ports = {port: free_port() for port in ("8000", "9000")}
        path = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))
        # What this suite was started with, and where the test before had its server, is not the page's.
        ours = ("PYTEST_ADDOPTS", "CHATKORE_API_KEY", "CHATKORE_BASE_URL")
        self.environment = {name: value for name, value in os.environ.items() if name not in ours} | {"PATH": path}
        self.servers: dict[str, tuple[subprocess.Popen[bytes], Path, list[str]]] = {}

    def moved(self, text: str) -> str:
        return re.sub(r"(?<=:|=| )(8000|9000)\b", lambda found: self.ports[found[1]], text)

    def save(self, name: str, text: str) -> None:
        (self.place / name).write_text(self.moved(text), encoding="utf-8")

    def type(self, text: str) -> None:
        """Go through a block: `$ ` begins a command, what follows is what it prints."""
        text = re.sub(r"\\\n\s*", "", text)
        first, *commands = re.split(r"^\$ ", text, flags=re.MULTILINE)
        assert not first
        for each in commands:
            command, _, shown = each.partition("\n")
            if command.startswith("export "):
                self.environment |= (each.split("=", 1) for each in self.moved(command).split()[1:])
            elif found := SERVER.match(command):
                self.serve(found[2], self.moved(command), shown.splitlines())
            else:
                self.run(self.moved(command), shown)

    def run(self, command: str, shown: str) -> None:
        done = subprocess.run(
            ["bash", "-c", command],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            cwd=self.place,
            env=self.environment,
            check=False,
            timeout=60,
        )
        printed = [self.paged(line) for line in steadied(done.stdout.decode().replace("\r", ""))]
        expected = "\n".join(steadied(shown))
        pattern = re.escape(expected).replace(re.escape("..."), r"[\s\S]*")
        assert re.fullmatch(pattern, "\n".join(printed)), f"{command}\n" + "\n".join(printed)

    def paged(self, line: str) -> str:
        for port, free in self.ports.items():
            line = re.sub(rf"\b{free}\b", port, line)
        return line

    def serve(self, port: str, command: str, shown: list[str]) -> None:
        """Start a server, in place of the one that had its port."""
        self.stop(port)
        log = self.place / f"{port}.log"
        with log.open("wb") as file:
            process = subprocess.Popen(
                command.split(),
                stdout=file,
                stderr=subprocess.STDOUT,
                cwd=self.place,
                env=self.environment,
                start_new_session=True,  # so that what it starts can be ended with it
            )
        self.servers[port] = process, log, shown
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline and process.poll() is None:
            with suppress(OSError), socket.create_connection(("127.0.0.1", int(self.ports[port]))):
                return
            time.sleep(0.05)
        raise AssertionError(f"{command}\n{log.read_text()}")

    def stop(self, port: str) -> None:
        """Stop a server, and look whether it printed what the page shows, in this order."""
        if port not in self.servers:
            return
        process, log, shown = self.servers.pop(port)
        process.terminate()
        try:
            process.wait(timeout=30)
        finally:
            self.kill(process)
        assert self.lacking(log, shown) == []

    def printed(self, port: str, shown: list[str]) -> None:
        """Look whether a running server has printed something, or does so soon."""
        _, log, _ = self.servers[port]
        deadline = time.monotonic() + 10
        while missing := self.lacking(log, shown):
            assert time.monotonic() < deadline, "\n".join([*missing, "is not in", log.read_text(encoding="utf-8")])
            time.sleep(0.05)

    def lacking(self, log: Path, shown: list[str]) -> list[str]:
        """Return the lines that are not in a log in this order, whatever else is."""
        lines = iter([self.paged(line) for line in steadied(log.read_text(encoding="utf-8"))])
        return [line for line in steadied("\n".join(shown)) if line not in lines]

    def end(self) -> None:
        for port in list(self.servers):
            self.stop(port)

    def abandon(self) -> None:
        for process, _, _ in self.servers.values():
            self.kill(process)

    def kill(self, process: subprocess.Popen[bytes]) -> None:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def free_port() -> str:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return str(listener.getsockname()[1])


@pytest.mark.skipif(shutil.which("curl") is None, reason="a reader of these pages has curl")
@pytest.mark.parametrize(
    "page",
    [page for page in PAGES if SESSION in page.read_text(encoding="utf-8").splitlines()],
    ids=lambda page: str(page.relative_to(ROOT)),
)
def test_a_session_of_the_manual_goes_as_it_says(page: Path, tmp_path: Path) -> None:
    """Who saves the files of a page and types its commands, in this order, sees what the page shows."""
    session = Session(tmp_path)
    found = [token for token in tokens(page) if token.type in ("fence", "html_block", "paragraph_open", "heading_open")]
    try:
        for number, token in enumerate(found):
            before = comment_before(found, number)
            if token.type == "fence" and (name := FILE.search(before)):
                session.save(name[1], token.content)
            elif token.type == "fence" and before.strip() == SESSION:
                assert token.info.strip() == "console"
                session.type(token.content)
            elif token.type == "fence" and (port := PRINTED_BY.search(before)):
                session.printed(port[1], token.content.splitlines())
    except BaseException:
        session.abandon()
        raise
    session.end()


def test_a_program_that_is_not_run_has_a_reason() -> None:
    """Who leaves a program out says why, where the reader of the source sees it."""
    assert all(block.reason or block.reason is None for block in BLOCKS)
    assert sum(block.reason is not None for block in BLOCKS) < len(BLOCKS) / 10


def test_every_output_belongs_to_a_program() -> None:
    """No output stands on a page that no program has printed."""
    for page in PAGES:
        marked = page.read_text(encoding="utf-8").splitlines().count(OUTPUT)
        assert marked == sum(block.output is not None for block in blocks(page)), page.name


@pytest.mark.parametrize("command", COMMANDS)
def test_the_readme_has_the_command(command: str) -> None:
    """A newcomer copies one line to see it work and one line to test it; both stand in blocks of their own."""
    fences = [token.content.strip() for token in tokens(ROOT / "README.md") if token.type == "fence"]
    assert command in fences


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub and MyST make them."""
    every = tokens(page)
    titles = [after.content for token, after in pairwise(every) if token.type == "heading_open"]
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_a_link_leads_somewhere(page: Path) -> None:
    """A link within the repository names a file that exists, and a heading that the file has."""
    for token in tokens(page):
        for link in token.children or ():
            target = str(link.attrGet("href" if link.type == "link_open" else "src") or "")
            if not target or re.match(r"[a-z]+:", target):
                continue
            path, _, anchor = unquote(target).partition("#")
            place = (page.parent / path).resolve() if path else page
            assert place.exists(), target
            assert place.is_relative_to(ROOT), target
            assert not anchor or anchor in anchors(place), target


def test_the_architecture_page_draws_the_house_as_it_is() -> None:
    """Every module has its floor on the page, and imports from the floors below; the lowest one is shared."""
    page = (ROOT / "docs/explanation/architecture.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\d+) \| (.*?) \|", page, re.MULTILINE)
    floors = {room: int(floor) for floor, rooms in rows for room in re.findall(r"`(\w+)`", rooms)}
    package = Path(chatkore_async.__file__).parent
    assert {path.stem for path in package.glob("*.py")} == floors.keys()
    assert [path.parent.name for path in package.glob("*/__init__.py") if f"`{path.parent.name}`" not in page] == []
    for room, floor in floors.items():
        text = (package / f"{room}.py").read_text(encoding="utf-8")
        names = re.findall(r"^from \. import (.+)$", text, re.MULTILINE)
        below = {*re.findall(r"^from \.(\w+) import", text, re.MULTILINE), *", ".join(names).split(", ")} - {""}
        assert [other for other in below if floors[other] >= floor > 1] == [], room


def test_every_public_name_is_in_the_reference() -> None:
    """What can be imported from the package can be looked up."""
    reference = "".join(path.read_text(encoding="utf-8") for path in ROOT.glob("docs/reference/*.md"))
    for module in (
        chatkore_async,
        chatkore_async.batch,
        chatkore_async.types,
        chatkore_async.errors,
        chatkore_async.testing,
    ):
        missing = [name for name in module.__all__ if not re.search(rf"\b{name}\b", reference)]
        assert [name for name in missing if not name.startswith("__")] == []


@pytest.mark.parametrize(
    "module, page",
    [
        (chatkore_async.integrations.fastapi, "integrations-fastapi.md"),
        (chatkore_async.integrations.aiohttp_web, "integrations-aiohttp.md"),
    ],
)
def test_every_public_name_for_a_framework_is_in_its_reference(module: ModuleType, page: str) -> None:
    """The integrations have names in common, so each page has its own."""
    text = (ROOT / "docs/reference" / page).read_text(encoding="utf-8")
    assert [name for name in module.__all__ if f"{module.__name__}.{name}" not in text] == []


def test_every_public_name_for_ray_is_in_the_reference() -> None:
    """Nor is it left out where Ray, which is not needed to read, is not installed."""
    source = (Path(chatkore_async.__file__).parent / "integrations" / "ray.py").read_text(encoding="utf-8")
    [names] = [
        ast.literal_eval(node.value)
        for node in ast.parse(source).body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
    ]
    page = (ROOT / "docs/reference/integrations-ray.md").read_text(encoding="utf-8")
    assert [name for name in names if f"chatkore_async.integrations.ray.{name}" not in page] == []
