"""The page of the examples, as the people who use it see it."""

import asyncio
import re

import pytest
from example_services import NAMES, PATIENCE, serving

from chatkore_async.testing import Hold, Stall, error, sse, stream

pytestmark = [pytest.mark.browser, pytest.mark.asyncio(loop_scope="session")]

PHONE = {"viewport": {"width": 390, "height": 844}, "device_scale_factor": 2, "has_touch": True, "is_mobile": True}
SOON = PATIENCE
# A server that asks for more than a minute is not waited for; so no test is.
BUSY = error(429, headers={"retry-after": "90"})
FAULT = b'data: {"error": {"message": "the GPU of rack 7 is on fire"}}\n\n'
WIDE = "x" * 300 + "\n\n```python\n" + "y = " + "z" * 300 + "\n```\n"


class TestAnAnswer:
    async def test_tokens_appear_as_they_come(self, chat, relay):
        """Each is on the screen before the model has written the next."""
        first, second = asyncio.Event(), asyncio.Event()
        relay.script(stream(["The", Hold(first), " sky", Hold(second), " is"]))
        await chat.ask("Why?")
        await chat.shows("The")
        await chat.expect(chat.stop).to_be_visible()
        first.set()
        await chat.shows("The sky")
        second.set()
        await chat.shows("The sky is")
        await chat.ended()
        await chat.expect(chat.page.locator(".question")).to_have_text("Why?")

    async def test_it_says_what_it_measured(self, chat, relay):
        """Deltas are called deltas; tokens are what the model says they were."""
        relay.script(stream(["a", "b", "c"], usage={"prompt_tokens": 1, "completion_tokens": 7, "total_tokens": 8}))
        await chat.ask()
        await chat.ended()
        await chat.expect(chat.figures).to_have_text(
            re.compile(r"^\d+\.\d\d s to the first delta( · \d+\.\d deltas/s)? · 3 deltas, 7 tokens$")
        )

    async def test_the_model_is_told_of_the_conversation(self, chat, relay):
        """A second question comes with the first one and its answer, for the model that was chosen."""
        relay.script(stream("Because."), stream("So."))
        await chat.page.get_by_label("Model").select_option("deepseek-chat")
        await chat.ask("Why?")
        await chat.ended()
        await chat.ask("How?")
        await chat.shows("So.")
        await chat.ended()
        sent = relay.requests[-1].json
        assert sent["model"] == "deepseek-chat"
        assert [(each["role"], each["content"]) for each in sent["messages"]] == [
            ("user", "Why?"),
            ("assistant", "Because."),
            ("user", "How?"),
        ]

    async def test_a_new_conversation_knows_nothing_of_the_last(self, chat, relay):
        """And the answer that was coming is stopped."""
        relay.script(stream(["Because", Stall()]))
        await chat.ask("Why?")
        await chat.shows("Because")
        await chat.page.get_by_role("button", name="New").click()
        assert await relay.requests[-1].finished(timeout=SOON) == "gone"
        await chat.expect(chat.page.get_by_role("heading", name="What would you like to know?")).to_be_visible()
        await chat.ask("How?")
        await chat.ended()
        assert [each["content"] for each in relay.requests[-1].json["messages"]] == ["How?"]

    async def test_html_is_text(self, chat, relay):
        """What a model writes is shown as it was written, and nothing of it is run."""
        evil = "<img src=x onerror=\"window.bad=1\"><script>window.bad=1</script>\n\n```html\n<b onclick='x'>b</b>\n```"
        relay.script(stream(evil, reasoning="<i>hm</i>"))
        await chat.ask("<b>Why?</b>")
        await chat.ended()
        await chat.expect(chat.page.locator(".question")).to_have_text("<b>Why?</b>")
        await chat.expect(chat.answer.locator(".text")).to_have_text(evil.partition("\n")[0])
        await chat.expect(chat.answer.locator("pre")).to_have_text("<b onclick='x'>b</b>")
        assert await chat.page.locator("#turns :is(img, script, b, i)").count() == 0
        assert await chat.page.evaluate("window.bad") is None

    async def test_characters_may_be_split_anywhere(self, chat, relay):
        """A character of several bytes that comes in pieces is one character."""
        text = "日本語 😀 é e\u0301"
        body = stream(text).body
        relay.script(sse(*(body[place : place + 1] for place in range(len(body)))))
        await chat.ask()
        await chat.ended()
        assert await chat.answer.text_content() == text

    async def test_code_stands_apart(self, chat, relay):
        """What is between fences is a block of its own, while it is written and afterwards."""
        go_on = asyncio.Event()
        relay.script(stream(["Try:\n``", "`pyth", "on\nx = 1", Hold(go_on), "\n``", "`\nDone."]))
        await chat.ask()
        await chat.expect(chat.answer.locator("pre")).to_have_text("x = 1")
        go_on.set()
        await chat.ended()
        await chat.expect(chat.answer.locator("pre")).to_have_text("x = 1")
        await chat.expect(chat.answer.locator(".code")).to_have_attribute("data-language", "python")
        await chat.expect(chat.answer.locator(".text")).to_have_text(["Try:", "Done."])

    async def test_two_tabs_have_an_answer_each(self, open_page, relay):
        """Neither sees anything of the other, and stopping one leaves the other alone."""
        go_on = asyncio.Event()

        def answered(request):
            question = request.json["messages"][-1]["content"]
            return stream([f"{question} 1", Hold(go_on), f" {question} 2"])

        relay.respond_with(lambda request: answered(request) if request.method == "POST" else None)
        left = await open_page()
        right = await open_page(beside=left)
        third = await open_page(beside=left)
        for chat, text in ((left, "left"), (right, "right"), (third, "third")):
            await chat.ask(text)
            await chat.shows(f"{text} 1")
        await third.stop.click()
        await third.says("Stopped.")
        go_on.set()
        await left.shows("left 1 left 2")
        await right.shows("right 1 right 2")
        await third.shows("third 1")


class TestStopping:
    async def test_the_button_stops_the_model(self, chat, relay):
        """What was written stays, and the connection to the model is closed."""
        relay.script(stream(["Once upon", Stall()]))
        await chat.ask()
        await chat.shows("Once upon")
        await chat.stop.click()
        await chat.says("Stopped.")
        await chat.shows("Once upon")
        assert await relay.requests[-1].finished(timeout=SOON) == "gone"
        await chat.expect(chat.box).to_be_focused()

    async def test_it_works_before_the_first_token(self, chat, relay):
        """Waiting can be given up as well."""
        relay.script(stream([Stall()]))
        await chat.ask()
        await relay.wait_for_requests(2, timeout=SOON)  # the first was for the models
        await chat.stop.click()
        await chat.says("Stopped.")
        assert await relay.requests[-1].finished(timeout=SOON) == "gone"

    async def test_closing_the_tab_stops_the_model(self, chat, relay):
        """Nobody is there to read it."""
        relay.script(stream(["Once upon", Stall()]))
        await chat.ask()
        await chat.shows("Once upon")
        await chat.page.close()
        assert await relay.requests[-1].finished(timeout=SOON) == "gone"

    async def test_a_stopped_answer_can_be_asked_for_again(self, chat, relay):
        """It takes the place of what there was."""
        relay.script(stream(["Once upon", Stall()]), stream("The whole story."))
        await chat.ask()
        await chat.shows("Once upon")
        await chat.stop.click()
        await chat.retry.click()
        await chat.shows("The whole story.")
        await chat.ended()
        assert await chat.page.locator(".turn").count() == 1


class TestTrouble:
    @pytest.mark.parametrize(
        "reply, words",
        [
            (error(400, "max_tokens is too large"), "The request was refused (400). max_tokens is too large"),
            (error(404, "no such model", code="model_not_found"), "The request was refused (404). no such model"),
            (BUSY, "Too many requests at the moment. Try again in 90\xa0s."),
            (error(401, "wrong key"), "The model could not answer. The service's log says why."),
        ],
        ids=["400", "404", "429", "401"],
    )
    async def test_before_the_answer_it_is_told_in_words(self, chat, relay, reply, words):
        """And Retry asks again."""
        relay.script(reply, stream("Here it is."))
        await chat.ask()
        await chat.says(words)
        await chat.ended()
        await chat.retry.click()
        await chat.shows("Here it is.")
        await chat.expect(chat.trouble).to_be_empty()

    async def test_in_the_midst_what_came_before_stays(self, chat, relay):
        """An answer that broke off does not look like one that ended; Retry begins it anew."""
        relay.script(stream(["Once upon", FAULT], done=False), stream("The whole story."))
        await chat.ask()
        await chat.says("The answer broke off. The service's log says why.")
        await chat.shows("Once upon")
        await chat.retry.click()
        await chat.shows("The whole story.")
        await chat.expect(chat.trouble).to_be_empty()

    async def test_a_service_that_dies_is_a_connection_that_is_lost(self, open_page, relay, name):
        """And one that is not there cannot be reached; both can be retried."""
        async with serving(name, relay.base_url) as service:
            chat = await open_page(at=await service.listening())
            relay.script(stream(["Once upon", Stall()]))
            await chat.ask()
            await chat.shows("Once upon")
            service.process.kill()
            await chat.says("The connection to the service was lost.")
            await chat.shows("Once upon")
            await service.ended()
            await chat.retry.click()
            await chat.says("The service cannot be reached.")
            await chat.expect(chat.retry).to_be_visible()

    @pytest.mark.parametrize(
        "answer, words",
        [
            ((200, "text/event-stream", "data: {}\n\n"), "The answer was cut off: its end never came."),
            ((200, "text/event-stream", ""), "The answer was cut off: its end never came."),
            ((200, "text/event-stream", "data: {\n\n"), "The service sent something that is not an answer."),
            ((200, "text/event-stream", "data: [DONE]\n\n"), "The model answered nothing."),
            ((413, "text/plain", "too large"), "This conversation is too long for the service. Begin a new one."),
            ((500, "text/html", "<h1>Oops</h1>"), "The service failed (500). Its log says why."),
            ((504, "application/json", "{}"), "The model did not answer in time."),
        ],
    )
    async def test_what_a_proxy_in_between_does_is_told_too(self, chat, answer, words):
        """Whatever the answer is, the page says what it means."""
        status, kind, body = answer
        await chat.page.route("**/chat", lambda route: route.fulfill(status=status, content_type=kind, body=body))
        await chat.ask()
        await chat.says(words)
        await chat.ended()

    async def test_a_limit_that_was_reached_is_told(self, chat, relay):
        """An answer that ends where the limit is looks unfinished, and is."""
        relay.script(stream("Once upon", finish_reason="length"))
        await chat.ask()
        await chat.says("The answer reached the limit of its length.")


class TestReading:
    async def test_it_scrolls_along_only_at_the_end(self, chat, relay):
        """Who reads further up stays there, and a button leads back."""
        go_on = asyncio.Event()
        relay.script(stream([*(f"line {number}\n" for number in range(100)), Hold(go_on), "the last line"]))
        await chat.ask()
        await chat.expect(chat.answer).to_contain_text("line 99")
        conversation = chat.page.locator("#conversation")
        await chat.page.wait_for_function(AT_THE_END)
        await chat.expect(chat.latest).to_be_hidden()
        await conversation.evaluate("it => it.scrollTop = 50")
        await chat.expect(chat.latest).to_be_visible()
        go_on.set()
        await chat.ended()
        assert await conversation.evaluate("it => it.scrollTop") == 50
        await chat.latest.click()
        await chat.page.wait_for_function(AT_THE_END)
        await chat.expect(chat.latest).to_be_hidden()

    async def test_screen_readers_hear_the_answer_once(self, chat, relay):
        """That it begins, and then the whole of it; not each token."""
        go_on = asyncio.Event()
        relay.script(stream(["Once", Hold(go_on), " upon"]))
        status = chat.page.get_by_role("status")
        await chat.ask()
        await chat.shows("Once")
        await chat.expect(status).to_have_text("The model is answering.")
        go_on.set()
        await chat.expect(status).to_have_text("Answer: Once upon")
        assert await chat.page.locator("[aria-live], [role=log]").count() == 0

    async def test_dark_or_light_is_what_the_system_has(self, open_page, relay):
        """Until the reader chooses; then it stays, also when the page is loaded again."""
        dark = await open_page(color_scheme="dark")
        light = await open_page(color_scheme="light")
        assert await dark.page.evaluate(BRIGHTNESS) < 60
        assert await light.page.evaluate(BRIGHTNESS) > 230
        await dark.expect(dark.theme).to_have_attribute("aria-pressed", "true")
        await dark.theme.click()
        assert await dark.page.evaluate(BRIGHTNESS) > 230
        await dark.page.reload()
        assert await dark.page.evaluate(BRIGHTNESS) > 230
        await dark.expect(dark.theme).to_have_attribute("aria-pressed", "false")

    async def test_text_stands_out_in_both_themes(self, open_page, relay):
        """All that is written has a contrast of 4.5 : 1 at least (WCAG 2.2, 1.4.3)."""
        for theme in ("light", "dark"):
            relay.script(stream("Text\n```python\ncode\n```"), BUSY)
            chat = await open_page(color_scheme=theme)
            await chat.ask()
            await chat.ended()
            await chat.ask()
            await chat.expect(chat.retry).to_be_visible()
            for place, contrast in (await chat.page.evaluate(CONTRASTS)).items():
                assert contrast >= 4.5, (theme, place)

    async def test_nothing_moves_for_those_who_asked_for_that(self, open_page, relay):
        """The mark at the end of a text that grows breathes for all others."""
        for motion, name in (("no-preference", "breathe"), ("reduce", "none")):
            relay.script(stream(["Once", Stall()]))
            chat = await open_page(reduced_motion=motion)
            await chat.ask()
            await chat.shows("Once")
            mark = "getComputedStyle(document.querySelector('.answer .text'), '::after').animationName"
            assert await chat.page.evaluate(mark) == name
            await chat.stop.click()
            await chat.ended()


class TestKeys:
    async def test_a_conversation_needs_no_mouse(self, chat, relay):
        """Write, begin a line, send, stop, retry: each is a key, and the focus is where one goes on."""
        relay.script(stream(["Once", Stall()]), stream("Twice."))
        keyboard = chat.page.keyboard
        await chat.expect(chat.box).to_be_focused()
        await keyboard.type("a line")
        await keyboard.press("Shift+Enter")
        await keyboard.type("another")
        await keyboard.press("Enter")
        await chat.shows("Once")
        await chat.expect(chat.box).to_have_value("")
        assert relay.requests[-1].json["messages"][-1]["content"] == "a line\nanother"
        await keyboard.type("meanwhile")
        await keyboard.press("Enter")  # an answer is coming; nothing is lost
        await chat.expect(chat.box).to_have_value("meanwhile")
        await keyboard.press("Escape")
        await chat.says("Stopped.")
        assert await relay.requests[-1].finished(timeout=SOON) == "gone"
        await chat.expect(chat.box).to_be_focused()
        await keyboard.press("Shift+Tab")
        await chat.expect(chat.retry).to_be_focused()
        assert await chat.retry.evaluate("it => getComputedStyle(it).outlineStyle") == "solid"
        await keyboard.press("Enter")
        await chat.shows("Twice.")
        await chat.expect(chat.box).to_be_focused()

    async def test_every_control_can_be_reached(self, chat, relay):
        """And shows that it has the focus."""
        reached = []
        for _ in range(12):
            await chat.page.keyboard.press("Tab")
            reached.append(await chat.page.evaluate(FOCUSED))
        names = {name for name, _ in reached}
        assert names >= {"model", "new", "theme", "conversation", "question", "send", "suggestion"}
        assert [name for name, visible in reached if not visible and name] == []

    async def test_a_suggestion_is_asked_by_enter(self, chat, relay):
        """And the focus goes on to the next question."""
        await chat.page.get_by_role("button", name="Why is the sky blue?").focus()
        await chat.page.keyboard.press("Enter")
        await chat.expect(chat.page.locator(".question")).to_have_text("Why is the sky blue?")
        await chat.expect(chat.box).to_be_focused()
        await chat.ended()

    async def test_enter_that_ends_a_composition_does_not_send(self, chat, relay):
        """Writers of Japanese and Chinese press it to choose a word."""
        await chat.box.fill("にほん")
        await chat.box.dispatch_event("keydown", {"key": "Enter", "isComposing": True})
        await chat.expect(chat.box).to_have_value("にほん")
        await chat.expect(chat.page.locator(".turn")).to_have_count(0)

    async def test_nothing_is_sent_for_nothing(self, chat, relay):
        """A question of blanks is none."""
        await chat.ask("  \n ")
        await chat.expect(chat.page.locator(".turn")).to_have_count(0)
        assert [request for request in relay.requests if request.method == "POST"] == []


class TestPhone:
    @pytest.mark.parametrize("width", [390, 320])
    async def test_nothing_is_wider_than_the_screen(self, open_page, relay, width):
        """Long words break, and long lines of code scroll in their block."""
        relay.script(stream(WIDE, reasoning="w" * 300), BUSY)
        chat = await open_page(**{**PHONE, "viewport": {"width": width, "height": 700}})
        assert await chat.page.evaluate(OVERFLOW) == []
        await chat.ask("q" * 300)
        await chat.ended()
        await chat.page.get_by_text("Reasoning").tap()
        await chat.ask()
        await chat.expect(chat.retry).to_be_visible()
        assert await chat.page.evaluate(OVERFLOW) == []
        assert await chat.page.locator("pre").evaluate("it => it.scrollWidth > it.clientWidth")

    async def test_everything_is_large_enough_for_a_finger(self, open_page, relay):
        """Whatever can be tapped is 44 pixels wide and high."""
        relay.script(stream("Text", reasoning="Hm."), BUSY, stream([f"{number}\n" for number in range(99)]))
        chat = await open_page(**PHONE)
        assert await chat.page.evaluate(SMALL) == []
        for _ in range(2):
            await chat.ask()
            await chat.ended()
        await chat.expect(chat.retry).to_be_visible()
        assert await chat.page.evaluate(SMALL) == []
        await chat.ask()
        await chat.ended()
        await chat.page.locator("#conversation").evaluate("it => it.scrollTop = 0")
        await chat.expect(chat.latest).to_be_visible()
        assert await chat.page.evaluate(SMALL) == []

    async def test_sending_by_tap_does_not_keep_the_keyboard_open(self, open_page, relay):
        """It would cover the answer."""
        relay.script(stream("Because."))
        chat = await open_page(**PHONE)
        await chat.box.tap()
        await chat.page.keyboard.type("Why?")
        await chat.send.tap()
        await chat.shows("Because.")
        await chat.expect(chat.box).not_to_be_focused()

    async def test_the_whole_page_fits(self, open_page, relay):
        """The box is at the bottom of the screen, and the page itself does not scroll."""
        chat = await open_page(**PHONE)
        box = await chat.page.locator("#form").bounding_box()
        assert box is not None
        assert 700 < box["y"] < 844 - 44
        assert await chat.page.evaluate("document.documentElement.scrollHeight <= innerHeight")


@pytest.mark.parametrize("name", NAMES[:1])  # the file is the same
async def test_events_are_the_same_whatever_the_split(chat):
    """In `sse.js`, as in the standard: line ends, characters and events may be cut anywhere."""
    for text, events in STREAMS:
        body = text.encode()
        for size in (1, 2, 3, 5, 1000):
            parts = [list(body[place : place + size]) for place in range(0, len(body), size)]
            assert await chat.page.evaluate(EVENTS, parts) == events, (text, size)


STREAMS = [
    ("data: a\n\ndata: b\n\n", ["a", "b"]),
    ("data: a\r\n\r\ndata: b\r\n\r\n", ["a", "b"]),
    ("data: a\r\rdata: b\r\r", ["a", "b"]),
    ("data: a\r\n\ndata: b\n\r\n", ["a", "b"]),
    ("data: a\ndata:b\ndata:  c\ndata\n\n", ["a\nb\n c\n"]),
    (": comment\n\ndata: a\n: comment\n\n: \n\n", ["a"]),
    ("event: x\nid: 7\nretry: 1\ndata: a\n\nevent: y\n\n", ["a"]),
    ("\n\n\r\n\n\ndata: a\n\n\n\n", ["a"]),
    ("\ufeffdata: \ufeff日本語 😀\n\n", ["\ufeff日本語 😀"]),
    ("data: a\x0b\x0c\x85\u2028b\n\n", ["a\x0b\x0c\x85\u2028b"]),
    ("data: a\r\n\r\n\r\n: \r\ndata: b\r\ndata: \r\n\r\n", ["a", "b\n"]),
    ("data: a\n\ndata: cut", ["a"]),
    ("data: a\n\ndata: cut\n", ["a"]),
    ("datax: a\nxdata: b\n data: c\n\n", []),
    ("", []),
]

AT_THE_END = """() => {
  const it = document.querySelector("#conversation");
  return it.scrollHeight - it.scrollTop - it.clientHeight < 2;
}"""

BRIGHTNESS = """() => {
  const numbers = getComputedStyle(document.body).backgroundColor.match(/[\\d.]+/g).map(Number);
  return (numbers[0] + numbers[1] + numbers[2]) / 3;
}"""

FOCUSED = """() => {
  const it = document.activeElement;
  if (it === document.body) return ["", false];
  const shown = it.id === "question" ? getComputedStyle(it.form).boxShadow : getComputedStyle(it).outlineStyle;
  return [it.id || it.className, shown !== "none"];
}"""

OVERFLOW = """() => [...document.querySelectorAll("html, body, body *")]
  .filter((it) => it.checkVisibility() && !it.closest("pre, svg, select, .hidden"))
  .filter((it) => it.getBoundingClientRect().right > innerWidth + 0.5 || (it.scrollWidth > it.clientWidth + 1
    && !["inline", "inline-block"].includes(getComputedStyle(it).display)))
  .map((it) => `${it.nodeName}#${it.id}.${it.className} ${it.scrollWidth} > ${it.clientWidth}`)"""

SMALL = """() => [...document.querySelectorAll("button, select, textarea, summary, a, input")]
  .filter((it) => it.checkVisibility())
  .map((it) => [it.id || it.textContent, it.getBoundingClientRect()])
  .filter(([, { width, height }]) => width < 43.99 || height < 43.99)
  .map(([name, { width, height }]) => `${name} ${width}x${height}`)"""

CONTRASTS = """() => {
  const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
  const light = (colour) => {
    canvas.fillStyle = colour;
    canvas.fillRect(0, 0, 1, 1);
    const [r, g, b] = [...canvas.getImageData(0, 0, 1, 1).data].map((each) => each / 255)
      .map((each) => (each <= 0.04045 ? each / 12.92 : ((each + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const behind = (it) => {
    const colour = getComputedStyle(it).backgroundColor;
    return colour === "rgba(0, 0, 0, 0)" ? behind(it.parentElement) : colour;
  };
  const places = ["h1", "#model", "#new", ".question", ".text", "pre", ".figures", ".trouble p", ".trouble button",
    "textarea", "#send", ".hint span"];
  return Object.fromEntries(places.map((place) => {
    const it = document.querySelector(place);
    const [low, high] = [light(getComputedStyle(it).color), light(behind(it))].sort((a, b) => a - b);
    return [place, (high + 0.05) / (low + 0.05)];
  }));
}"""

EVENTS = """async (parts) => {
  const { events } = await import("/sse.js");
  const body = new ReadableStream({
    pull(controller) {
      const part = parts.shift();
      if (part) controller.enqueue(new Uint8Array(part));
      else controller.close();
    },
  });
  const found = [];
  for await (const data of events(body)) found.push(data);
  return found;
}"""
