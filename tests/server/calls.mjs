// Every call of the npm client against a server on the small checkpoint. Prints "all passed", or throws.
import assert from "node:assert/strict";
import OpenAI from "openai";

const [url, key, image] = process.argv.slice(2);
const client = new OpenAI({ baseURL: url, apiKey: key, maxRetries: 0, timeout: 60_000 });
const model = "nano";
const say = (text) => [{ role: "user", content: text }];
const ask = (text) => [
  { role: "user", content: [{ type: "image_url", image_url: { url: image } }, { type: "text", text }] },
];

const models = (await client.models.list()).data.map((entry) => entry.id);
assert.ok(models.includes(model));
await assert.rejects(client.models.retrieve("gpt-4"), OpenAI.NotFoundError);

const whole = await client.chat.completions.create({ model, messages: ask("Box the cat.") });
assert.equal(whole.choices[0].finish_reason, "stop");
assert.equal(whole.choices[0].message.qvl.boxes[0].label, "cat");
assert.ok(whole.usage.prompt_tokens_details.image_tokens > 0);

let text = "";
let usage;
const boxes = [];
const stream = await client.chat.completions.create({
  model, messages: ask("Box the cat."), stream: true, stream_options: { include_usage: true },
});
for await (const chunk of stream) {
  if (chunk.usage) usage = chunk.usage;
  text += chunk.choices[0]?.delta.content ?? "";
  if (chunk.choices[0]?.delta.content) boxes.push(...(chunk.choices[0].delta.qvl?.boxes ?? []));
}
assert.equal(text, whole.choices[0].message.content);
const corners = (list) => list.map((box) => [box.label, box.box, box.span]);
assert.deepEqual(corners(boxes), corners(whole.choices[0].message.qvl.boxes));
assert.equal(usage.completion_tokens, whole.usage.completion_tokens);

const sampled = { model, messages: say("Tell me"), n: 2, seed: 7, temperature: 1.5, max_tokens: 9 };
const [once, again] = await Promise.all([1, 2].map(() => client.chat.completions.create(sampled)));
assert.deepEqual(once.choices.map((c) => c.message.content), again.choices.map((c) => c.message.content));
assert.equal(once.choices.length, 2);

const stopped = await client.chat.completions.create({
  model, messages: say("hi"), stop: ["e"], logprobs: true, top_logprobs: 2, max_tokens: 30,
});
assert.ok(!stopped.choices[0].message.content.includes("e"));
assert.equal(stopped.choices[0].logprobs.content[0].top_logprobs.length, 2);

const completion = await client.completions.create({ model, prompt: "The cat", echo: true, logprobs: 1, max_tokens: 2 });
assert.ok(completion.choices[0].text.startsWith("The cat"));
assert.equal(completion.choices[0].logprobs.token_logprobs[0], null);

const long = await client.chat.completions.create({
  model, messages: say("Go on"), stream: true, max_tokens: 1500, ignore_eos: true,
});
for await (const _ of long) {
  long.controller.abort();
  break;
}

const refused = { model, messages: say("hi") };
await assert.rejects(
  client.chat.completions.create({ ...refused, temperature: -1 }),
  (error) => error instanceof OpenAI.BadRequestError && error.param === "temperature" && Boolean(error.requestID),
);
await assert.rejects(client.chat.completions.create({ ...refused, model: "gpt-4" }), OpenAI.NotFoundError);
const stranger = new OpenAI({ baseURL: url, apiKey: "wrong", maxRetries: 0 });
await assert.rejects(stranger.models.list(), OpenAI.AuthenticationError);
await assert.rejects(client.chat.completions.create(refused, { timeout: 1 }), OpenAI.APIConnectionTimeoutError);
console.log("all passed");
