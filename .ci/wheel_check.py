"""Run by .ci/run in an environment that has the built wheel and nothing else: what a user gets is whole."""

import asyncio
import importlib.metadata
import subprocess
import sys
from importlib.resources import files
from pathlib import Path

import chatkore_async
from chatkore_async import AsyncChatKore
from chatkore_async.testing import ChatKoreServer

installed = {distribution.metadata["Name"].lower() for distribution in importlib.metadata.distributions()}
assert "site-packages" in chatkore_async.__file__, chatkore_async.__file__
assert (files("chatkore_async") / "py.typed").is_file()
assert importlib.metadata.version("chatkore-async") == chatkore_async.__version__
assert not installed & {"click", "rich", "pytest", "aioresponses", "uvloop"}, installed


async def main() -> None:
    """One call and one stream, without any extra."""
    async with ChatKoreServer() as server, AsyncChatKore(api_key="key", base_url=server.base_url) as client:
        messages = [{"role": "user", "content": "Hello"}]
        assert (await client.chat.completions.create(model="m", messages=messages)).text
        async with client.chat.completions.stream(model="m", messages=messages) as stream:
            assert [chunk async for chunk in stream]
            assert stream.completeness == "complete"


asyncio.run(main())

command = subprocess.run(
    [Path(sys.executable).with_name("chatkore"), "demo"], capture_output=True, text=True, check=False
)
assert command.returncode == 1, command
assert "pip install 'chatkore-async[cli]'" in command.stderr, command
print(f"chatkore-async {chatkore_async.__version__} works from its wheel, with {', '.join(sorted(installed))}")
