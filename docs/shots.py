"""Take the pictures of the chat page that the manual shows: `python docs/shots.py [DIRECTORY]`.

The page is that of `docs/examples/fastapi_service.py`, in Debian's Chromium; the model behind it is a `ChatKoreServer`.
What is written and measured in the pictures is the same each time: the page's clock is made to tick by the delta. It
needs the extras `fastapi` and `browser`, uvicorn, and /usr/bin/chromium.
"""

import asyncio
import os
import re
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import NamedTuple

from playwright.async_api import Browser, Page, async_playwright, expect

from chatkore_async.testing import ChatKoreServer, Hold, Stall, error, stream

DOCS = Path(__file__).parent
SHOTS = DOCS / "_static" / "shots"
CHROMIUM = "/usr/bin/chromium"
SWITCHES = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]
SWITCHES += ["--disable-component-update", "--disable-sync", "--font-render-hinting=none"]

# A question takes 0.4 s until its first delta comes, and each delta 1/40 s.
CLOCK = """
let time = 0;
performance.now = () => (time += 25);
const ask = window.fetch;
window.fetch = (...what) => ((time += 375), ask(...what));
"""

SKY = (
    "Sunlight holds all colours. On its way through the air it meets molecules far smaller than its waves, and these "
    "scatter short waves much more than long ones: blue light is scattered about five times as strongly as red.\n\n"
    "So the blue part of the light reaches your eyes from all over the sky, and the rest mostly from the sun itself. "
    "At sunset the way through the air is long, most of the blue is gone by then, and what is left is red."
)
MERGE = (
    "Walk along both lists at once, and take the smaller of the two heads each time:\n\n"
    "```python\n"
    "def merge(left: list[int], right: list[int]) -> list[int]:\n"
    "    merged = []\n"
    "    i = j = 0\n"
    "    while i < len(left) and j < len(right):\n"
    "        if left[i] <= right[j]:\n"
    "            merged.append(left[i])\n"
    "            i += 1\n"
    "        else:\n"
    "            merged.append(right[j])\n"
    "            j += 1\n"
    "    return merged + left[i:] + right[j:]\n"
    "```\n\n"
    "Each element is looked at once, so it takes time in proportion to the length of both lists. Equal elements keep "
    "their order, since those of the left list go first."
)
BICYCLE = (
    "Mostly because it steers into a fall. When it leans to the left, its front wheel turns to the left as well, and"
)


class Shot(NamedTuple):
    """A picture: how large, in which theme, and what is done before it is taken."""

    play: Callable[[Page, ChatKoreServer], Awaitable[None]]
    width: int = 840
    height: int = 720
    theme: str = "light"


async def ask(page: Page, text: str) -> None:
    await page.get_by_label("Message").fill(text)
    await page.get_by_label("Message").press("Enter")


async def answered(page: Page, text: str) -> None:
    await ask(page, text)
    await expect(page.get_by_role("button", name="Send")).to_be_visible()


async def whole(page: Page, server: ChatKoreServer) -> None:
    """Two answers, the second of them with code."""
    server.script(stream(SKY), stream(MERGE))
    await answered(page, "Why is the sky blue?")
    await answered(page, "Write a Python function that merges two sorted lists.")


async def coming(page: Page, server: ChatKoreServer) -> None:
    """An answer that is still being written."""
    words = re.findall(r"\s*\S+", BICYCLE)
    server.script(stream(SKY), stream([*words, Stall()]))
    await answered(page, "Why is the sky blue?")
    await ask(page, "How does a bicycle stay upright?")
    await expect(page.locator(".answer").last).to_have_text(BICYCLE)


async def broken(page: Page, server: ChatKoreServer) -> None:
    """An answer that broke off, and one that did not begin."""
    sent = asyncio.Event()
    words = re.findall(r"\s*\S+", SKY[: SKY.index("\n")])
    fault = b'data: {"error": {"message": "The upstream model was restarted.", "type": "server_error"}}\n\n'
    script = stream([*words, Hold(sent), fault], finish_reason=None, usage=False, done=False)
    server.script(script, error(429, headers={"retry-after": "90"}))
    await ask(page, "Why is the sky blue?")
    await expect(page.locator(".answer").last).to_have_text("".join(words))
    sent.set()
    await expect(page.get_by_role("button", name="Retry")).to_be_visible()
    await ask(page, "And why is it red at sunset?")
    await expect(page.get_by_text(re.compile(r"Try again in 90\ss\."))).to_be_visible()


SHOTS_TO_TAKE = {
    "chat-light": Shot(whole, height=780),
    "chat-dark": Shot(coming, theme="dark", height=640),
    "chat-phone": Shot(whole, width=390, height=844),
    "chat-error": Shot(broken, height=560),
}


@asynccontextmanager
async def serving(base_url: str) -> AsyncIterator[str]:
    """Run the example, and give the URL that it names once it listens."""
    environment = {**os.environ, "CHATKORE_API_KEY": "any", "CHATKORE_BASE_URL": base_url}
    command = [sys.executable, str(DOCS / "examples" / "fastapi_service.py"), "--port", "0"]
    service = await asyncio.create_subprocess_exec(
        *command, env=environment, stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.PIPE
    )
    assert service.stderr is not None
    try:
        async for line in service.stderr:
            if found := re.search(r"http://[\d.]+:\d+", line.decode()):
                yield found[0]
                break
        else:
            raise RuntimeError("the example does not start")
    finally:
        service.terminate()
        await service.communicate()


async def take(browser: Browser, url: str, server: ChatKoreServer, shot: Shot, path: Path) -> None:
    phone = shot.width < 600
    context = await browser.new_context(
        viewport={"width": shot.width, "height": shot.height},
        device_scale_factor=1.5,
        color_scheme="dark" if shot.theme == "dark" else "light",
        has_touch=phone,
        is_mobile=phone,
    )
    await context.add_init_script(CLOCK)
    page = await context.new_page()
    await page.goto(url)
    await expect(page.get_by_label("Model")).to_have_value("gpt-4o-mini")
    await shot.play(page, server)
    await page.screenshot(path=path, animations="disabled")
    await context.close()
    server.clear()


async def main() -> None:
    """Take them all."""
    place = Path(sys.argv[1]) if len(sys.argv) > 1 else SHOTS
    await asyncio.to_thread(place.mkdir, parents=True, exist_ok=True)
    async with ChatKoreServer() as server, serving(server.base_url) as url, async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=CHROMIUM, args=SWITCHES)
        for name, shot in SHOTS_TO_TAKE.items():
            path = place / f"{name}.png"
            await take(browser, url, server, shot, path)
            size = (await asyncio.to_thread(path.stat)).st_size
            print(f"{path}  {size / 1000:.0f} kB")
        await browser.close()


if __name__ == "__main__":
    asyncio.run(main())
