"""The examples' page in headless Chromium. A browser that is missing fails the tests: they are asked for by their mark."""

import os
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, Any

import pytest
import pytest_asyncio
from example_services import NAMES, PATIENCE, serving

from chatkore_async.testing import ChatKoreServer

if TYPE_CHECKING:
    from playwright.async_api import Browser, Locator, Page

CHROMIUM = "/usr/bin/chromium"
SWITCHES = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]
SWITCHES += ["--disable-component-update", "--disable-sync"]


class Chat:
    """A tab with the page, and what one does with it."""

    def __init__(self, page: "Page") -> None:
        from playwright.async_api import expect

        expect.set_options(timeout=PATIENCE * 1000)
        page.set_default_timeout(PATIENCE * 1000)
        self.page = page
        self.expect = expect
        self.problems: list[str] = []
        page.on("pageerror", lambda error: self.problems.append(str(error)))
        page.on("console", self._console)
        self.box = page.get_by_label("Message")
        self.send = page.get_by_role("button", name="Send", exact=True)
        self.stop = page.get_by_role("button", name="Stop", exact=True)
        self.retry = page.get_by_role("button", name="Retry")
        self.latest = page.get_by_role("button", name="Latest")
        self.theme = page.get_by_role("button", name="Dark theme")

    def _console(self, message: Any) -> None:
        # The browser itself notes every answer that is an error.
        if message.type == "error" and "Failed to load resource" not in message.text:
            self.problems.append(message.text)

    @property
    def answer(self) -> "Locator":
        """The last answer's text."""
        return self.page.locator(".answer").last

    @property
    def trouble(self) -> "Locator":
        """What is said of the last answer's end."""
        return self.page.locator(".trouble").last

    @property
    def figures(self) -> "Locator":
        """What was measured of the last answer."""
        return self.page.locator(".figures").last

    async def ask(self, text: str = "Hello") -> None:
        """Write, and press Enter."""
        await self.box.fill(text)
        await self.box.press("Enter")

    async def shows(self, text: str) -> None:
        """Wait until the last answer is exactly this."""
        await self.expect(self.answer).to_have_text(text)

    async def says(self, text: str) -> None:
        """Wait until trouble is told in these words."""
        await self.expect(self.trouble.locator("p")).to_have_text(text)

    async def ended(self) -> None:
        """Wait until no answer is coming."""
        await self.expect(self.send).to_be_visible()


OpenPage = Callable[..., Awaitable[Chat]]


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def browser() -> AsyncIterator["Browser"]:
    """Give one browser to all tests; each has a profile of its own in it."""
    try:
        from playwright.async_api import async_playwright
    except ImportError:
        pytest.fail("playwright is missing: pip install -e '.[browser]'", pytrace=False)
    if not os.access(CHROMIUM, os.X_OK):
        pytest.fail(f"{CHROMIUM} is missing: apt-get install chromium", pytrace=False)
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=CHROMIUM, args=SWITCHES, timeout=PATIENCE * 1000)
        yield browser
        await browser.close()


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def sites() -> AsyncIterator[dict[str, tuple[ChatKoreServer, str]]]:
    """Run both examples, each with a server of its own to ask."""
    async with AsyncExitStack() as stack:
        found = {}
        for name in NAMES:
            relay = await stack.enter_async_context(ChatKoreServer())
            service = await stack.enter_async_context(serving(name, relay.base_url))
            found[name] = (relay, await service.listening())
        yield found


@pytest.fixture(params=NAMES)
def name(request: pytest.FixtureRequest) -> str:
    """Every test is run with each of the examples."""
    return request.param


@pytest.fixture
def relay(sites: dict[str, tuple[ChatKoreServer, str]], name: str) -> ChatKoreServer:
    """The server that the example asks, with nothing scripted and nothing recorded."""
    relay, _ = sites[name]
    relay.always(None)
    relay.respond_with(None)
    relay.clear()
    return relay


@pytest.fixture
def url(sites: dict[str, tuple[ChatKoreServer, str]], name: str) -> str:
    """The example's."""
    return sites[name][1]


@pytest_asyncio.fixture(loop_scope="session")
async def open_page(browser: "Browser", relay: ChatKoreServer, url: str) -> AsyncIterator[OpenPage]:
    """Give a function that opens the page: `chat = await open_page(color_scheme="dark")`.

    With `beside=chat` it is another tab of the same profile. Whatever a test did, no page has met an error of its own.
    """
    opened: list[Chat] = []

    async def open_page(*, beside: Chat | None = None, at: str = url, **options: Any) -> Chat:
        context = await browser.new_context(**options) if beside is None else beside.page.context
        chat = Chat(await context.new_page())
        opened.append(chat)
        await chat.page.goto(at)
        await chat.expect(chat.page.get_by_label("Model")).to_have_value("gpt-4o-mini")
        return chat

    yield open_page
    for context in {chat.page.context for chat in opened}:
        await context.close()
    assert [problem for chat in opened for problem in chat.problems] == []


@pytest_asyncio.fixture(loop_scope="session")
async def chat(open_page: OpenPage) -> Chat:
    """The page in a window, as it is before the first question."""
    return await open_page(viewport={"width": 1000, "height": 700})
