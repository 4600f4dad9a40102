// What has been said: turns of the user and the model, and the request that asks for the next answer.

import { streamChat } from "./api.js";
import { dataUrl } from "./pictures.js";

export const BOX = "[box]"; // stands in a question's text for the rectangle that the user drew

/** The turns of a conversation, and the pictures in them, in order. */
export class Conversation {
  constructor() {
    this.turns = []; // { role: "user", text, pictures, box } and { role: "assistant", text, boxes, ... }
  }

  /** All pictures that were sent, as the model numbers them. */
  get pictures() {
    return this.turns.flatMap((turn) => turn.pictures ?? []);
  }

  /** Ask a question, and begin its answer. */
  ask(text, pictures, box) {
    this.turns.push({ role: "user", text, pictures, box });
    return this.begin();
  }

  /** Begin an answer to the last question; an answer that is there is dropped. */
  begin() {
    if (this.turns.at(-1)?.role === "assistant") this.turns.pop();
    const turn = { role: "assistant", text: "", boxes: [], complete: false, question: this.turns.at(-1).text };
    this.turns.push(turn);
    return turn;
  }

  /** Take back a question and all that came after it; returns it. */
  takeBack(turn) {
    return this.turns.splice(this.turns.indexOf(turn))[0];
  }

  /** The boxes of an answer that lie on a picture: { number, box, all }, the number being that in the answer. */
  boxesOn(turn, picture) {
    if (!turn?.boxes?.length) return [];
    const before = this.turns.slice(0, this.turns.indexOf(turn)).flatMap((other) => other.pictures ?? []);
    const left = before.length - (turn.kept ?? before.length); // pictures that the context had no room for
    const pictureOf = ({ image_index: at }) => (at === null ? before.at(-1) : before[at + left]);
    const entries = turn.boxes.map((box, number) => ({ number, box, all: turn.boxes }));
    return entries.filter((entry) => pictureOf(entry.box) === picture);
  }

  /** The messages up to the last question, in the form of the API. */
  async messages(system) {
    const messages = system ? [{ role: "system", content: system }] : [];
    for (const turn of this.turns.slice(0, -1)) {
      messages.push({ role: turn.role, content: turn.role === "user" ? await userContent(turn) : turn.text });
    }
    return messages;
  }

  /** Stream the last turn's answer into it; `onChange` is called after each piece. Throws ApiError or AbortError. */
  async answer(turn, settings, signal, onChange) {
    const { system, ...fields } = settings;
    for await (const chunk of streamChat({ ...fields, messages: await this.messages(system) }, signal)) {
      const [choice] = chunk.choices;
      turn.model = chunk.model;
      if (chunk.usage) Object.assign(turn, { usage: chunk.usage, timings: chunk.timings });
      if (!choice) continue;
      turn.text += choice.delta.content ?? "";
      if (choice.finish_reason) turn.finish = choice.finish_reason;
      // the last chunk has all boxes, with their scores
      if (choice.delta.qvl) {
        turn.boxes = (choice.finish_reason ? [] : turn.boxes).concat(choice.delta.qvl.boxes);
        turn.kept = choice.delta.qvl.pictures.length;
      }
      onChange();
    }
    turn.complete = true;
  }
}

async function userContent({ text, pictures, box }) {
  if (pictures.length === 0 && !box) return text;
  const images = await Promise.all(pictures.map(async (picture) => ({ type: "image_url", image_url: { url: await dataUrl(picture) } })));
  const [before, ...after] = box ? text.split(BOX) : [text];
  const parts = [{ type: "text", text: before }];
  if (box) parts.push({ type: "box", box }, { type: "text", text: after.join(BOX) });
  return [...images, ...parts.filter((part) => part.type !== "text" || part.text)];
}
