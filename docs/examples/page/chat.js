// A chat with the service's POST /chat. Everything a model says is set as text, never as HTML.

import { LostConnection, events } from "./sse.js";

const find = (selector) => document.querySelector(selector);
const [conversation, form, question, send, model, status, latest, welcome] = [
  "#conversation", "#form", "#question", "#send", "#model", "#status", "#latest", "#welcome",
].map(find);

const REMEMBERED = 40; // earlier turns that the model is told of
const turns = [];
let running = null; // what aborts the answer that is coming

/** Something went wrong that is told in words. */
class Problem extends Error {}

// One question and its answer

class Turn {
  constructor(text) {
    this.question = text;
    this.element = find("#turn").content.cloneNode(true).firstElementChild;
    this.part(".question").textContent = text;
  }

  part(selector) {
    return this.element.querySelector(selector);
  }

  clear() {
    this.text = "";
    this.reasoning = "";
    this.finish = null; // why the model ended
    this.figures = { began: performance.now(), first: null, last: null, deltas: 0, tokens: null };
    this.blocks = [];
    this.drawing = null; // a frame that was asked for
    this.part(".answer").replaceChildren();
    this.part(".trouble").replaceChildren();
    this.part(".trouble").classList.remove("stopped");
    this.element.classList.add("running");
    this.draw();
  }

  add(chunk) {
    const choice = chunk.choices?.[0];
    const text = choice?.delta?.content ?? choice?.delta?.refusal ?? "";
    const reasoning = choice?.delta?.reasoning_content ?? "";
    if (chunk.usage) this.figures.tokens = chunk.usage.completion_tokens;
    if (choice?.finish_reason) this.finish = choice.finish_reason;
    if (!text && !reasoning) return;
    this.figures.last = performance.now();
    this.figures.first ??= this.figures.last;
    this.figures.deltas += 1;
    this.text += text;
    this.reasoning += reasoning;
    // A model may send faster than a screen shows.
    this.drawing ??= requestAnimationFrame(() => this.draw());
  }

  draw() {
    cancelAnimationFrame(this.drawing);
    this.drawing = null;
    split(this.text).forEach((block, index) => {
      this.blocks[index] ??= this.part(".answer").appendChild(makeBlock());
      fill(this.blocks[index], block);
    });
    this.part(".reasoning").hidden = !this.reasoning;
    this.part(".reasoning p").textContent = this.reasoning;
    this.part(".figures").textContent = told(this.figures);
    follow();
  }

  /** Show why there is no (whole) answer, and offer to ask again. */
  trouble(words, { stopped = false } = {}) {
    const retry = document.createElement("button");
    retry.type = "button";
    retry.textContent = "Retry";
    retry.addEventListener("click", () => {
      if (running) return;
      ask(this);
      focus(); // the button is gone
    });
    const text = document.createElement("p");
    text.textContent = words;
    this.part(".trouble").classList.toggle("stopped", stopped);
    this.part(".trouble").replaceChildren(text, retry);
  }
}

/** What was measured here, in the browser. A delta is what the model sends at a time; how many tokens it is, it says. */
function told({ began, first, last, deltas, tokens }) {
  if (first === null) return "";
  const words = [`${((first - began) / 1000).toFixed(2)} s to the first delta`];
  if (last > first) words.push(`${(((deltas - 1) * 1000) / (last - first)).toFixed(1)} deltas/s`);
  words.push(Number.isInteger(tokens) ? `${deltas} deltas, ${tokens} tokens` : `${deltas} deltas`);
  return words.join(" · ");
}

// Text, and code between fences

/** Split an answer, however much of it there is, into text and fenced code. */
function split(text) {
  const blocks = [];
  let block = null;
  let fence = null;
  for (const line of text.split("\n")) {
    const mark = /^ {0,3}(`{3,}|~{3,})\s*([^\s`]*)[^`]*$/.exec(line);
    if (fence && mark && mark[1].startsWith(fence) && !mark[2]) {
      fence = block = null;
    } else if (!fence && mark) {
      fence = mark[1];
      blocks.push((block = { code: true, language: mark[2], lines: [] }));
    } else {
      if (!block) blocks.push((block = { code: false, language: "", lines: [] }));
      block.lines.push(line);
    }
  }
  return blocks
    .map(({ code, language, lines }) => {
      const joined = lines.join("\n");
      return { code, language, text: code ? joined : joined.replace(/^\n+|\n+$/g, "") };
    })
    .filter(({ code, text: content }) => code || content);
}

function makeBlock() {
  const block = document.createElement("div");
  block.append("");
  return block;
}

function fill(block, { code, language, text }) {
  if (code !== (block.firstChild.nodeName === "PRE")) {
    block.replaceChildren(code ? document.createElement("pre") : "");
    if (code) block.firstChild.append("");
    if (code) block.firstChild.tabIndex = 0; // so that long lines can be scrolled by keys
  }
  block.className = code ? "code" : "text";
  block.dir = code ? "ltr" : "auto";
  if (code) block.firstChild.setAttribute("aria-label", `Code ${language}`.trim());
  if (code && language) block.dataset.language = language;
  // What is there already stays, so that a reader can select it meanwhile.
  const node = code ? block.firstChild.firstChild : block.firstChild;
  if (text.startsWith(node.data)) node.appendData(text.slice(node.length));
  else node.data = text;
}

// Asking

async function ask(turn) {
  const controller = new AbortController();
  for (const retry of document.querySelectorAll(".trouble button")) retry.remove();
  running = controller;
  turn.clear();
  show("The model is answering.");
  toTheEnd();
  try {
    await stream(turn, controller.signal);
    turn.draw();
    const end = { length: "The answer reached the limit of its length.", content_filter: "A filter ended the answer." };
    if (end[turn.finish]) turn.trouble(end[turn.finish], { stopped: true });
    else if (!turn.text) turn.trouble("The model answered nothing.");
    if (running === controller) show(`Answer: ${turn.text}`, null);
  } catch (error) {
    turn.draw();
    const stopped = controller.signal.aborted;
    const words = error instanceof Problem ? error.message : `Something went wrong on this page: ${error.message}`;
    turn.trouble(stopped ? "Stopped." : words, { stopped });
    if (running === controller) show("", null);
  } finally {
    turn.element.classList.remove("running");
    follow();
  }
}

/** Ask, and give the turn what comes. */
async function stream(turn, signal) {
  const body = { messages: messages(turn) };
  if (model.value) body.model = model.value;
  const request = { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body), signal };
  const response = await fetch("chat", request).catch(() => {
    throw new Problem("The service cannot be reached.");
  });
  if (!response.ok) throw new Problem(await refusal(response));
  try {
    for await (const data of events(response.body)) {
      if (data === "[DONE]") return;
      const chunk = JSON.parse(data);
      if (chunk?.error) throw new Problem(`The answer broke off. ${why(chunk.error)}`);
      turn.add(chunk);
    }
  } catch (error) {
    if (error instanceof LostConnection) throw new Problem("The connection to the service was lost.");
    if (error instanceof SyntaxError) throw new Problem("The service sent something that is not an answer.");
    throw error;
  }
  throw new Problem("The answer was cut off: its end never came.");
}

/** The conversation so far. A question that got no answer is not told again. */
function messages(turn) {
  const earlier = turns.slice(0, turns.indexOf(turn)).filter((each) => each.text);
  const before = earlier.slice(-REMEMBERED).flatMap((each) => [
    { role: "user", content: each.question },
    { role: "assistant", content: each.text.slice(0, 100_000) },
  ]);
  return [...before, { role: "user", content: turn.question }];
}

/** Why an answer ended with an error, as far as the service tells. */
function why({ code, message }) {
  return code === "bad_gateway" || !message ? "The service's log says why." : message;
}

/** Say in words why the service did not answer. */
async function refusal(response) {
  const answer = await response.json().catch(() => null);
  const message = answer?.error?.message ?? "";
  const seconds = Number(response.headers.get("Retry-After"));
  switch (response.status) {
    case 413:
      return "This conversation is too long for the service. Begin a new one.";
    case 429:
      return `Too many requests at the moment. ${seconds ? `Try again in ${seconds}\u00a0s.` : "Try again later."}`;
    case 502:
      return "The model could not answer. The service's log says why.";
    case 503:
      return "The service is shutting down, or not ready. Try again in a moment.";
    case 504:
      return "The model did not answer in time.";
  }
  if (response.status < 500) return `The request was refused (${response.status}). ${message}`.trim();
  return `The service failed (${response.status}). Its log says why.`;
}

// The page

/** Show whether an answer is coming; without a second argument, one is. */
function show(words, controller = running) {
  running = controller;
  send.textContent = controller ? "Stop" : "Send";
  send.classList.toggle("stop", controller !== null);
  status.textContent = words;
}

function submit(text) {
  if (running || !text.trim()) return;
  const turn = new Turn(text.trim());
  turns.push(turn);
  find("#turns").append(turn.element);
  welcome.hidden = true;
  question.value = "";
  resize();
  ask(turn);
}

function focus() {
  // On a touch screen this would open the keyboard, over the answer.
  if (!matchMedia("(pointer: coarse)").matches) question.focus();
}

function resize() {
  question.style.height = "auto";
  question.style.height = `${question.scrollHeight}px`;
}

// It scrolls along while its reader is at the end, and only then.
let atEnd = true;

function follow() {
  if (atEnd) conversation.scrollTop = conversation.scrollHeight;
  latest.hidden = atEnd;
}

function toTheEnd() {
  atEnd = true;
  follow();
}

conversation.addEventListener("scroll", () => {
  atEnd = conversation.scrollHeight - conversation.scrollTop - conversation.clientHeight < 40;
  latest.hidden = atEnd;
});
new ResizeObserver(follow).observe(conversation); // a keyboard that opens, a screen that is turned

latest.addEventListener("click", () => {
  toTheEnd();
  focus();
});

form.addEventListener("submit", (event) => {
  event.preventDefault();
  if (running && event.submitter === send) running.abort();
  else submit(question.value);
  focus();
});

question.addEventListener("input", resize);
question.addEventListener("keydown", (event) => {
  // Enter also ends the composition of a character, as in Japanese; then it does not send.
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  submit(question.value);
});

document.addEventListener("keydown", (event) => {
  if (event.key !== "Escape" || !running) return;
  running.abort();
  focus();
});

find("#new").addEventListener("click", () => {
  running?.abort();
  show("", null);
  turns.length = 0;
  find("#turns").replaceChildren();
  welcome.hidden = false;
  toTheEnd();
  focus();
});

for (const suggestion of document.querySelectorAll(".suggestion")) {
  suggestion.addEventListener("click", () => {
    submit(suggestion.textContent);
    focus();
  });
}

/** Offer the models there are. Without them the service asks the one it knows. */
async function offerModels() {
  const response = await fetch("models").catch(() => null);
  if (!response?.ok) return;
  const { default: usual, models } = await response.json();
  model.replaceChildren(...models.map((name) => new Option(name, name, name === usual, name === usual)));
  model.hidden = models.length === 0;
}

focus();
offerModels();
