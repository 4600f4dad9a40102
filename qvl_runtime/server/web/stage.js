// The picture that is looked at, the boxes over it, and the rectangle that is drawn on it.

import { colorOf, nameOf } from "./answer.js";
import { t } from "./strings.js";

const SVG = "http://www.w3.org/2000/svg";
const SCALE = 1000; // of box coordinates, over the picture's sides

/** Shows one picture; coordinates of boxes are 0 to 1000 over its sides. */
export class Stage {
  /** onBox: called with [x1, y1, x2, y2] once a rectangle is drawn. onLight: with a box's number, or null. */
  constructor(document, { onBox, onLight }) {
    const find = (id) => document.getElementById(id);
    Object.assign(this, { onBox, onLight, picture: null, boxes: [], drawn: null, minimum: 0 });
    this.view = find("view");
    this.frame = find("frame");
    this.image = find("image");
    this.overlay = find("overlay");
    this.drawButton = find("draw");
    new ResizeObserver(() => this.fit()).observe(this.view);
    this.drawButton.addEventListener("click", () => this.setDrawing(!this.drawing));
    this.frame.addEventListener("pointerdown", (event) => this.startDrawing(event));
    document.addEventListener("keydown", (event) => event.key === "Escape" && this.setDrawing(false));
  }

  /** Show a picture (null: none) with boxes, each { number, box, all }, and the user's own rectangle, or null. */
  show(picture, boxes, drawn, label) {
    this.view.hidden = picture === null;
    if (picture !== this.picture) this.setDrawing(false);
    this.picture = picture;
    this.boxes = boxes;
    this.drawn = drawn;
    if (picture === null) return;
    if (this.image.src !== picture.url) this.image.src = picture.url;
    this.image.alt = label;
    this.fit();
    this.draw();
  }

  /** Hide boxes with a score below this. */
  setMinimum(score) {
    this.minimum = score;
    this.draw();
  }

  /** Light up a box, or none. */
  light(number) {
    for (const element of this.overlay.querySelectorAll("[data-number]")) {
      element.classList.toggle("lit", element.dataset.number === String(number));
    }
    this.overlay.classList.toggle("dim", number !== null);
  }

  /** Give the frame the size of the picture as it fits the view, so that percents of it are those of the picture. */
  fit() {
    if (this.picture === null || this.view.hidden) return;
    const { width, height } = this.picture;
    const factor = Math.min(this.view.clientWidth / width, this.view.clientHeight / height, Math.max(1, 480 / width));
    this.frame.style.width = `${width * factor}px`;
    this.frame.style.height = `${height * factor}px`;
  }

  draw() {
    const shown = this.boxes.filter(({ box }) => box.score === null || box.score >= this.minimum);
    const area = ({ box: { box: [x1, y1, x2, y2] } }) => (x2 - x1) * (y2 - y1);
    shown.sort((a, b) => area(b) - area(a)); // small ones on top, where the pointer can reach them
    this.overlay.replaceChildren(...shown.map((entry) => this.boxElement(entry)));
    if (this.drawn) this.overlay.append(rectangle(this.drawn, "drawn"));
    this.shown = shown.length;
  }

  boxElement({ number, box, all }) {
    const element = document.createElement("button");
    place(element, box.box);
    element.type = "button";
    element.className = box.quad ? "box quad" : "box";
    element.dataset.number = number;
    element.style.setProperty("--color", colorOf(all, number));
    element.setAttribute("aria-label", t("box", { label: caption(box) }));
    if (box.quad) element.append(outline(box));
    const tag = document.createElement("span");
    tag.className = box.box[1] < 60 ? "tag inside" : "tag";
    tag.textContent = caption(box);
    element.append(tag);
    for (const [event, value] of [["pointerenter", number], ["focus", number], ["pointerleave", null], ["blur", null]]) {
      element.addEventListener(event, () => this.onLight(value));
    }
    return element;
  }

  get drawing() {
    return this.drawButton.getAttribute("aria-pressed") === "true";
  }

  setDrawing(on) {
    this.drawButton.setAttribute("aria-pressed", String(on));
    this.drawButton.textContent = t(on ? "drawing" : "draw");
    this.frame.classList.toggle("drawing", on);
    if (!on) this.band?.remove();
  }

  startDrawing(event) {
    if (!this.drawing || event.button !== 0) return;
    event.preventDefault();
    const from = this.gridPoint(event);
    this.band?.remove();
    this.band = this.overlay.appendChild(rectangle([...from, ...from], "drawn"));
    this.frame.setPointerCapture(event.pointerId);
    let corners = [...from, ...from];
    const move = (next) => {
      const to = this.gridPoint(next);
      corners = [0, 1].map((axis) => Math.min(from[axis], to[axis])).concat([0, 1].map((axis) => Math.max(from[axis], to[axis])));
      place(this.band, corners);
    };
    const end = (last) => {
      for (const [name, handler] of handlers) this.frame.removeEventListener(name, handler);
      if (!this.drawing) return; // Esc was pressed
      this.setDrawing(false);
      const large = corners[2] - corners[0] >= 5 && corners[3] - corners[1] >= 5;
      if (last.type === "pointerup" && large) this.onBox(corners);
    };
    const handlers = [["pointermove", move], ["pointerup", end], ["pointercancel", end]];
    for (const [name, handler] of handlers) this.frame.addEventListener(name, handler);
  }

  gridPoint(event) {
    const { left, top, width, height } = this.frame.getBoundingClientRect();
    const part = [(event.clientX - left) / width, (event.clientY - top) / height];
    return part.map((value) => Math.round(Math.min(Math.max(value, 0), 1) * SCALE));
  }
}

/** A box's label with its score. */
export function caption(box) {
  return box.score === null ? nameOf(box) : `${nameOf(box)} ${box.score.toFixed(2)}`;
}

function rectangle(corners, name) {
  const element = document.createElement("div");
  element.className = name;
  place(element, corners);
  return element;
}

function place(element, [x1, y1, x2, y2]) {
  element.style.left = `${x1 / 10}%`;
  element.style.top = `${y1 / 10}%`;
  element.style.width = `${(x2 - x1) / 10}%`;
  element.style.height = `${(y2 - y1) / 10}%`;
}

function outline({ quad, box: [x1, y1, x2, y2] }) {
  const svg = document.createElementNS(SVG, "svg");
  svg.setAttribute("viewBox", `${x1} ${y1} ${x2 - x1 || 1} ${y2 - y1 || 1}`);
  svg.setAttribute("preserveAspectRatio", "none");
  svg.append(document.createElementNS(SVG, "polygon"));
  svg.firstChild.setAttribute("points", quad.map((point) => point.join(",")).join(" "));
  return svg;
}
