// What is on the stage as files: the picture with its boxes drawn, and the boxes as data.

import { colorOf } from "./answer.js";
import { caption } from "./stage.js";

/** Save the picture at its own size, with boxes drawn on it. */
export async function savePng(picture, boxes) {
  const bitmap = await createImageBitmap(picture.blob);
  const canvas = document.createElement("canvas");
  canvas.width = picture.width;
  canvas.height = picture.height;
  const context = canvas.getContext("2d");
  context.drawImage(bitmap, 0, 0);
  bitmap.close();
  const unit = Math.max(picture.width, picture.height) / 1000;
  context.lineWidth = Math.max(2, 4 * unit);
  context.font = `${Math.max(12, 22 * unit)}px system-ui, sans-serif`;
  context.textBaseline = "top";
  for (const { number, box, all } of boxes) drawBox(context, box, colorOf(all, number), picture);
  const blob = await new Promise((resolve) => canvas.toBlob(resolve, "image/png"));
  download(blob, `${stem(picture)}-boxes.png`);
}

/** Save the boxes, in pixels and on the grid, with the question and the answer that they come from. */
export function saveJson(picture, boxes, turn) {
  const content = {
    picture: { name: picture.name, width: picture.width, height: picture.height },
    model: turn?.model ?? null,
    question: turn?.question ?? null,
    answer: turn?.text ?? null,
    boxes: boxes.map(({ box: { label, box, quad, score } }) => ({ label, box, quad, score, pixels: pixels(box, picture) })),
  };
  download(new Blob([JSON.stringify(content, null, 1)], { type: "application/json" }), `${stem(picture)}-boxes.json`);
}

function drawBox(context, box, color, picture) {
  const [left, top, right, bottom] = pixels(box.box, picture);
  context.strokeStyle = context.fillStyle = color;
  if (box.quad) {
    context.beginPath();
    for (const [x, y] of box.quad) context.lineTo((x / 1000) * picture.width, (y / 1000) * picture.height);
    context.closePath();
    context.stroke();
  } else context.strokeRect(left, top, right - left, bottom - top);
  const text = caption(box);
  const height = parseFloat(context.font) * 1.3;
  const y = top >= height ? top - height : top;
  context.fillRect(left, y, context.measureText(text).width + 10, height);
  context.fillStyle = "#fff";
  context.fillText(text, left + 5, y + height * 0.12);
}

/** Corners in pixels, rounded down as the model's authors do. */
function pixels([x1, y1, x2, y2], { width, height }) {
  return [x1 * width, y1 * height, x2 * width, y2 * height].map((value) => Math.floor(value / 1000));
}

function stem(picture) {
  return picture.name.replace(/\.[^.]*$/, "");
}

function download(blob, name) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(blob);
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
}
