// The conversation as elements of the page.

import { caption } from "./stage.js";
import { colorOf, pieces } from "./answer.js";
import { t } from "./strings.js";

/**
 * The element of a turn. `numbers` maps its pictures to their numbers in the conversation; `act` has the functions
 * light(turn, number), select(turn), edit(turn), regenerate(turn), retry(turn) and show(picture).
 */
export function turnElement(turn, numbers, last, act) {
  const item = document.createElement("li");
  item.className = turn.role;
  item.append(make("h2", "visually-hidden", t(turn.role === "user" ? "you" : "assistant")));
  const text = item.appendChild(make("p", "text"));
  if (turn.role === "user") {
    text.textContent = turn.text;
    for (const picture of turn.pictures) text.before(thumbnail(picture, numbers.get(picture), () => act.show(picture)));
    if (turn.box) item.append(make("p", "facts", `[box] = (${turn.box.slice(0, 2)}),(${turn.box.slice(2)})`));
    item.append(actions([["edit", () => act.edit(turn)]]));
    return item;
  }
  text.append(...pieces(turn.text, turn.boxes, turn.complete).map((piece) => pieceElement(piece, turn, act)));
  if (!turn.complete && !turn.error && !turn.stopped) text.append(make("span", "cursor"));
  if (turn.error) item.append(make("p", "error", turn.error));
  const facts = factsOf(turn);
  if (facts) item.append(make("p", "facts", facts));
  if (turn.complete || turn.error || turn.stopped) item.append(actions(answerActions(turn, last, act)));
  item.addEventListener("click", () => act.select(turn));
  return item;
}

/** A small button that shows a picture, with its number. */
export function thumbnail(picture, number, onClick) {
  const button = make("button", "thumbnail");
  button.type = "button";
  button.setAttribute("aria-label", t("showPicture", { n: number }));
  const image = document.createElement("img");
  image.src = picture.url;
  image.alt = "";
  button.append(image, make("span", "number", number));
  button.addEventListener("click", onClick);
  return button;
}

/** A picture of the next question: a button that shows it, and one that removes it. */
export function pendingElement(picture, number, show, removePicture) {
  const item = document.createElement("li");
  const remove = make("button", "quiet", "✕");
  remove.type = "button";
  remove.setAttribute("aria-label", t("removePicture", { n: number }));
  remove.addEventListener("click", () => removePicture(picture));
  item.append(thumbnail(picture, number, () => show(picture)), remove);
  return item;
}

/** An element with a class and a text. */
export function make(tag, name = "", text = "") {
  const element = document.createElement(tag);
  element.className = name;
  element.textContent = text;
  return element;
}

function pieceElement(piece, turn, act) {
  if (piece.text !== undefined) return document.createTextNode(piece.text);
  if (piece.boxes.length === 0) return make("span", "label", piece.label);
  const [number] = piece.boxes;
  const scores = piece.boxes.map((at) => turn.boxes[at]).filter((box) => box.score !== null);
  const button = make("button", "label", piece.label);
  button.type = "button";
  button.title = piece.boxes.map((at) => caption(turn.boxes[at])).join(", ");
  button.dataset.number = number;
  button.style.setProperty("--color", colorOf(turn.boxes, number));
  if (scores.length) button.append(make("small", "", ` ${scores.map((box) => box.score.toFixed(2)).join(" ")}`));
  const lit = [["pointerenter", number], ["focus", number], ["pointerleave", null], ["blur", null]];
  for (const [event, value] of lit) button.addEventListener(event, () => act.light(turn, value));
  return button;
}

function factsOf({ usage, timings, finish, stopped }) {
  const facts = [];
  if (stopped) facts.push(t("stopped"));
  if (finish === "length") facts.push(t("cut"));
  if (usage && timings) {
    const rate = Math.round(timings.decode_tokens_per_s);
    const cached = usage.prompt_tokens_details?.cached_tokens;
    const speed = t("speed", { tokens: usage.completion_tokens, ttft: timings.ttft_s.toFixed(2), rate });
    facts.push(speed + (cached ? t("cached", { n: cached }) : ""));
  }
  return facts.join(" · ");
}

function answerActions(turn, last, act) {
  const copy = async (event) => {
    await navigator.clipboard.writeText(turn.text);
    event.target.textContent = t("copied");
  };
  const again = turn.error ? ["retry", () => act.regenerate()] : ["regenerate", () => act.regenerate()];
  return [...(last ? [again] : []), ...(navigator.clipboard && turn.text ? [["copy", copy]] : [])];
}

function actions(entries) {
  const row = make("p", "actions");
  for (const [key, onClick] of entries) {
    const button = make("button", "quiet", t(key));
    button.type = "button";
    button.addEventListener("click", (event) => {
      event.stopPropagation();
      onClick(event);
    });
    row.append(button);
  }
  return row;
}
