// The public HTTP API of this server: models, and answers as they are written.

let key = sessionStorage.getItem("key") ?? "";

/** An answer of the server that is no success; status 0: it could not be reached, or left in the middle. */
export class ApiError extends Error {
  constructor(message, status, code) {
    super(message);
    this.status = status;
    this.code = code;
  }
}

/** Keep the API key for this tab; an empty one forgets it. */
export function setKey(value) {
  key = value;
  if (value) sessionStorage.setItem("key", value);
  else sessionStorage.removeItem("key");
}

export function hasKey() {
  return key !== "";
}

/** The models, each with its limits once it is loaded. */
export async function listModels() {
  const response = await ask("v1/models");
  return (await response.json()).data;
}

/** Whether the model is loaded. */
export async function isReady() {
  const response = await fetch("health/ready").catch(() => null);
  return response?.ok ?? false;
}

/** The chunks of a streamed answer. Throws ApiError; an abort of the signal throws AbortError. */
export async function* streamChat(body, signal) {
  const response = await ask("v1/chat/completions", {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify({ ...body, stream: true, stream_options: { include_usage: true } }),
    signal,
  });
  for await (const data of events(response.body)) {
    if (data === "[DONE]") return;
    const chunk = JSON.parse(data);
    if (chunk.error) throw new ApiError(chunk.error.message, 500, chunk.error.code);
    yield chunk;
  }
  throw new ApiError("", 0, "lost");
}

/** The data of each server-sent event; bytes may be cut anywhere, inside a character or a line. */
export async function* events(stream) {
  const reader = stream.getReader();
  const decoder = new TextDecoder();
  let rest = "";
  let data = [];
  try {
    for (;;) {
      const { value, done } = await reader.read().catch((error) => {
        throw error.name === "AbortError" ? error : new ApiError("", 0, "lost");
      });
      if (done) return;
      const lines = (rest + decoder.decode(value, { stream: true })).split("\n");
      rest = lines.pop();
      for (const line of lines) {
        const text = line.endsWith("\r") ? line.slice(0, -1) : line;
        if (text.startsWith("data:")) data.push(text.slice(text[5] === " " ? 6 : 5));
        else if (text === "" && data.length) {
          yield data.join("\n");
          data = [];
        }
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

async function ask(path, options = {}) {
  const headers = { ...options.headers, ...(key && { Authorization: `Bearer ${key}` }) };
  const response = await fetch(path, { ...options, headers }).catch((error) => {
    throw error.name === "AbortError" ? error : new ApiError("", 0, "offline");
  });
  if (response.ok) return response;
  const error = await response.json().then((content) => content.error, () => null);
  throw new ApiError(error?.message ?? `HTTP ${response.status}`, response.status, error?.code);
}
