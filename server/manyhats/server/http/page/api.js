// Calls to the server that this page came from. What it answers is data, never markup.

const TOKEN = "manyhats.token";

export const token = {
  get: () => sessionStorage.getItem(TOKEN) ?? "",
  set: (value) => (value ? sessionStorage.setItem(TOKEN, value) : sessionStorage.removeItem(TOKEN)),
};

// Why a call has no answer; status 0: the server did not answer at all.
export class Refusal extends Error {
  constructor(status, message, code = "") {
    super(message);
    this.status = status;
    this.code = code;
  }
}

export const unreachable = () => new Refusal(0, "The server does not answer.");

export const headers = () => (token.get() ? { authorization: `Bearer ${token.get()}` } : {});

async function send(path, { method = "GET", json, signal } = {}) {
  const sent = json === undefined ? {} : { "content-type": "application/json" };
  const body = json === undefined ? undefined : JSON.stringify(json);
  let response;
  try {
    response = await fetch(path, { method, body, signal, headers: { ...headers(), ...sent }, cache: "no-store" });
  } catch (error) {
    throw error.name === "AbortError" ? error : unreachable();
  }
  if (!response.ok) throw refusal(response.status, await response.text().catch(() => ""), response.headers);
  return response;
}

export function refusal(status, text, given = new Headers()) {
  let error = {};
  try {
    error = JSON.parse(text).error ?? {};
  } catch {
    // not from the API, such as a proxy's page
  }
  let message = error.message ?? `The server answered ${status}.`;
  const seconds = given.get("retry-after");
  if (status === 429 && seconds) message = `${message} (in ${seconds} s)`;
  return new Refusal(status, message, error.code ?? "");
}

export const call = async (path, options) => (await send(path, options)).json();

// The events of a stream, decoded, and the headers it came with.
export async function stream(path, json, signal) {
  const response = await send(path, { method: "POST", json, signal });
  return { version: response.headers.get("x-manyhats-version") ?? "", events: events(response.body) };
}

async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) throw new Refusal(0, "The server closed the connection before the answer's end.");
      const parts = (rest + value).split("\n\n");
      rest = parts.pop();
      for (const part of parts) {
        if (!part.startsWith("data: ")) continue; // a comment that keeps the connection alive
        const data = part.slice("data: ".length);
        if (data === "[DONE]") return;
        const event = JSON.parse(data);
        if (event.error) throw new Refusal(200, event.error.message, event.error.code);
        yield event;
      }
    }
  } catch (error) {
    throw error instanceof TypeError ? new Refusal(0, "The connection to the server broke.") : error;
  } finally {
    reader.cancel().catch(() => {});
  }
}

// Samples of metrics: [{name, labels, value}], of the Prometheus text format.
export async function metrics(names) {
  const query = names.map((name) => `name[]=${encodeURIComponent(name)}`).join("&");
  const text = await (await send(`/metrics?${query}`)).text();
  const samples = [];
  for (const line of text.split("\n")) {
    const found = /^([a-zA-Z_:][\w:]*)(?:\{(.*)\})? (\S+)$/.exec(line);
    if (found) samples.push({ name: found[1], labels: labels(found[2] ?? ""), value: Number(found[3]) });
  }
  return samples;
}

function labels(text) {
  const found = text.matchAll(/([a-zA-Z_]\w*)="((?:[^"\\]|\\.)*)"/g);
  return Object.fromEntries([...found].map(([, name, value]) => [name, value.replace(/\\(.)/g, (_, c) => (c === "n" ? "\n" : c))]));
}
