// An answer's text in pieces: plain text, and labels that belong to boxes.

const TAGGED = /<ref>(.*?)<\/ref>((?:\s*<(?:box|quad)>.*?<\/(?:box|quad)>)*)|((?:<(?:box|quad)>.*?<\/(?:box|quad)>\s*)+)/gs;
const SHAPE = /<(?:box|quad)>.*?<\/(?:box|quad)>/gs;
const UNFINISHED = /<(?:box|quad)>[^<]*(?:<\/?[a-z]*)?$|<\/?[a-z]*$/;
const COLORS = ["#b3264a", "#1a66b8", "#26752f", "#8a37a8", "#a34a00", "#0b6a78", "#5a3ec0", "#7a5a00"];

/**
 * Pieces of a text: { text } or { label, boxes }, where boxes are numbers in the answer's list.
 *
 * A box says which characters it is, counted as code points. While the answer is written, what may become a tag at its
 * end is left out.
 */
export function pieces(text, boxes, complete) {
  const shown = complete ? text : text.replace(UNFINISHED, "");
  const starts = boxes.map((box) => (box.span ? utf16Offset(text, box.span[0]) : -1));
  const found = [];
  let end = 0;
  for (const match of shown.matchAll(TAGGED)) {
    if (match.index > end) found.push({ text: shown.slice(end, match.index) });
    end = match.index + match[0].length;
    const inside = [];
    starts.forEach((start, number) => start >= match.index && start < end && inside.push(number));
    const first = boxes[inside[0]];
    const label = match[1]?.trim() || (first ? place(first) : match[0].replace(/<[^>]*>/g, ""));
    found.push(inside.length || match[1] !== undefined ? { label, boxes: inside } : { text: match[0] });
  }
  if (end < shown.length) found.push({ text: complete ? shown.slice(end) : shown.slice(end).replace("<ref>", "") });
  return found;
}

/** The color of a box: one a label, in the order in which labels come. */
export function colorOf(boxes, number) {
  const labels = [...new Set(boxes.map((box) => box.label))];
  return COLORS[labels.indexOf(boxes[number].label) % COLORS.length];
}

/** What to call a box. */
export function nameOf(box) {
  return box.label ?? place(box);
}

function place({ box: [x1, y1, x2, y2] }) {
  return `(${x1},${y1}),(${x2},${y2})`;
}

function utf16Offset(text, codePoints) {
  let at = 0;
  for (let count = 0; count < codePoints && at < text.length; count++) at += text.codePointAt(at) > 0xffff ? 2 : 1;
  return at;
}
