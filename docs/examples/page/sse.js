// Server-sent events from the body of a response, as https://html.spec.whatwg.org/#parsing-an-event-stream has it.
// The browser's own EventSource can only GET, and asks again by itself when a stream ends.

/** The network failed before the body had ended. */
export class LostConnection extends Error {}

/**
 * Yield the data of each event. It does not matter where the network splits the bytes: half a character, half a line
 * end and half an event wait for the rest of them. What comes after the last blank line is no event.
 *
 * @param {ReadableStream<Uint8Array>} body
 * @returns {AsyncGenerator<string>}
 */
export async function* events(body) {
  const reader = body.getReader();
  const decoder = new TextDecoder();
  let rest = ""; // the beginning of a line
  let data = []; // the lines of an event
  let returned = false; // whether the last character was a carriage return
  try {
    for (;;) {
      const { value, done } = await reader.read().catch((cause) => {
        throw new LostConnection("the connection was lost", { cause });
      });
      if (done) return;
      const text = decoder.decode(value, { stream: true });
      if (!text) continue; // the beginning of a character
      // A carriage return ends a line at once; a line feed that comes after it belongs to it.
      const lines = (rest + (returned && text.startsWith("\n") ? text.slice(1) : text)).split(/\r\n|\r|\n/);
      returned = text.endsWith("\r");
      rest = lines.pop();
      for (const line of lines) {
        if (line === "") {
          if (data.length) yield data.join("\n");
          data = [];
        } else if (line === "data" || line.startsWith("data:")) {
          data.push(line.slice(5).replace(/^ /, ""));
        } // All other fields, and comments, mean nothing here.
      }
    }
  } finally {
    reader.cancel().catch(() => {}); // whoever stops in between wants no more of it
  }
}
