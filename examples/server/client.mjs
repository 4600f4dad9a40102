// The `openai` client of npm against `qvl serve`: boxes as data, and a stream. Start `qvl serve` first, or set QVL_URL.
import { readFile } from "node:fs/promises";
import OpenAI from "openai";

const client = new OpenAI({
  baseURL: process.env.QVL_URL ?? "http://127.0.0.1:8000/v1",
  apiKey: process.env.QVL_KEY ?? "none",
  maxRetries: 0,
});
const model = (await client.models.list()).data[0].id;
const image = await readFile(new URL("../../qvl_runtime/assets/demo.jpg", import.meta.url));
const url = `data:image/jpeg;base64,${image.toString("base64")}`;
const ask = (text) => [
  { role: "user", content: [{ type: "image_url", image_url: { url } }, { type: "text", text }] },
];

const answer = await client.chat.completions.create({ model, messages: ask("Box the cat.") });
for (const box of answer.choices[0].message.qvl.boxes) {
  console.log(`${box.label} at pixels ${box.pixels}, score ${box.score.toFixed(2)}`);
}

const stream = await client.chat.completions.create({ model, messages: ask("What is the number?"), stream: true });
for await (const chunk of stream) {
  process.stdout.write(chunk.choices[0]?.delta?.content ?? "");
}
console.log();
