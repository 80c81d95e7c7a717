// Talking to the server.

const KEY = "ctxdocs-key";

export class Refused extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

export function useKey(key) {
  sessionStorage.setItem(KEY, key);
}

function headers(more = {}) {
  const key = sessionStorage.getItem(KEY);
  return key ? { ...more, Authorization: `Bearer ${key}` } : more;
}

async function refusal(response) {
  try {
    return new Refused(response.status, (await response.json()).error.message);
  } catch {
    return new Refused(response.status, `the server answered with status ${response.status}`);
  }
}

export async function call(path, { method = "GET", body, signal } = {}) {
  const sent = body === undefined ? {} : { body: JSON.stringify(body) };
  const type = body === undefined ? {} : { "Content-Type": "application/json" };
  const response = await fetch(path, { method, signal, headers: headers(type), ...sent });
  if (!response.ok) throw await refusal(response);
  return response;
}

/** Yield the JSON values of an answer that is streamed. */
export async function* stream(body, signal) {
  const options = { stream: true, stream_options: { include_usage: true } };
  const response = await call("/v1/chat/completions", { method: "POST", body: { ...body, ...options }, signal });
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const events = (held + value).split("\n\n");
    held = events.pop();
    for (const event of events) {
      const data = event.replace(/^data: /, "");
      if (data === "[DONE]") return;
      const part = JSON.parse(data);
      if (part.error) throw new Refused(0, part.error.message);
      yield part;
    }
  }
}

/** Send a file; `onSent` is told which part of it has gone. */
export function send(file, onSent) {
  return new Promise((resolve, reject) => {
    const request = new XMLHttpRequest();
    request.open("POST", "/v1/documents");
    for (const [name, value] of Object.entries(headers())) request.setRequestHeader(name, value);
    request.upload.addEventListener("progress", (event) => event.lengthComputable && onSent(event.loaded / event.total));
    request.addEventListener("error", () => reject(new Refused(0, "the server cannot be reached")));
    request.addEventListener("load", () => {
      let value;
      try {
        value = JSON.parse(request.responseText);
      } catch {
        value = { error: { message: `the server answered with status ${request.status}` } };
      }
      if (request.status === 202) resolve(value);
      else reject(new Refused(request.status, value.error.message));
    });
    const form = new FormData();
    form.append("file", file);
    request.send(form);
  });
}
