"""The fixtures, as a user's test suite takes them in."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SUITE = """
pytest_plugins = ["chatkore_async.testing.fixtures"]

async def test_a_call(chatkore_server, chatkore_client):
    answer = await chatkore_client.chat.completions.create(model="m", messages=[{"role": "user", "content": "Hi"}])
    assert answer.text
    assert chatkore_server.requests[0].json["model"] == "m"
"""


def test_a_users_suite_takes_in_server_and_client(tmp_path: Path) -> None:
    """Naming the plugin is all a suite has to do to test against a real loopback server."""
    (tmp_path / "conftest.py").write_text('pytest_plugins = ["chatkore_async.testing.fixtures"]\n')
    (tmp_path / "test_app.py").write_text(SUITE.replace('pytest_plugins = ["chatkore_async.testing.fixtures"]\n', ""))
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-o", "asyncio_mode=auto", str(tmp_path)]
    # Options that this suite was started with are not the user's.
    environment = {name: value for name, value in os.environ.items() if name != "PYTEST_ADDOPTS"}
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=tmp_path, env=environment, check=False, timeout=60
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_missing_package_is_named(tmp_path: Path) -> None:
    """Without pytest-asyncio the error says which extra brings it."""
    program = "import sys; sys.modules['pytest_asyncio'] = None; import chatkore_async.testing.fixtures"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 1
    assert "pip install 'chatkore-async[testing]'" in done.stderr


async def test_the_fixtures_serve_this_suite_too(
    chatkore_server: object, chatkore_client: object, request: pytest.FixtureRequest
) -> None:
    """A client and a server are made for each test and closed after it."""
    assert request.getfixturevalue("chatkore_client") is chatkore_client
    assert "http://127.0.0.1" in repr(chatkore_server)
