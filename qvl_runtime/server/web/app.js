// Joins the parts: what the user does, the conversation, the stage and the page.

import { ApiError, hasKey, setKey } from "./api.js";
import { takePhoto } from "./camera.js";
import { askKey, connect, messageOf, notify, settings } from "./connection.js";
import { BOX, Conversation } from "./conversation.js";
import { PictureError, readPicture, release } from "./pictures.js";
import { changeTheme, otherTheme, remember, remembered } from "./preferences.js";
import { saveJson, savePng } from "./saving.js";
import { Stage } from "./stage.js";
import { otherLanguage, setLanguage, t } from "./strings.js";
import { make, pendingElement, thumbnail, turnElement } from "./turns.js";

const find = (id) => document.getElementById(id);
const question = find("question");
const boxInputs = [...find("box-row").querySelectorAll("input")];
const stage = new Stage(document, { onBox: setBox, onLight: (number) => light(selected, number) });

let conversation = new Conversation();
let pending = []; // pictures of the next question
let box = null; // the rectangle of the next question
let selected = null; // the answer whose boxes are shown
let shown = null; // the picture on the stage
let running = null; // the AbortController of the answer that is being written
let limits = null;

// ---- pictures

const allPictures = () => [...conversation.pictures, ...pending];
const numbers = () => new Map(allPictures().map((picture, at) => [picture, at + 1]));

async function addFiles(files) {
  notify("");
  for (const file of files) {
    if (limits?.max_images && allPictures().length >= limits.max_images) {
      notify(t("tooMany", { n: limits.max_images }));
      break;
    }
    try {
      const picture = await readPicture(file, limits);
      pending.push(picture);
      shown = picture;
      for (const [key, values] of picture.notices) notify(t(key, values));
    } catch (error) {
      if (!(error instanceof PictureError)) throw error;
      notify(t(error.key, error.values));
    }
  }
  render();
}

function removePending(picture) {
  pending = pending.filter((other) => other !== picture);
  release(picture);
  if (shown === picture) shown = allPictures().at(-1) ?? null;
  render();
}

function setBox(corners) {
  box = corners;
  boxInputs.forEach((input, at) => (input.value = corners[at]));
  if (!question.value.includes(BOX)) question.setRangeText(BOX, question.selectionStart, question.selectionEnd, "end");
  question.focus();
  render();
}

function removeBox() {
  box = null;
  question.value = question.value.replaceAll(BOX, "");
  render();
}

// ---- what is on the stage

function select(turn) {
  selected = turn;
  const withBoxes = conversation.pictures.find((picture) => conversation.boxesOn(turn, picture).length);
  if (withBoxes && conversation.boxesOn(turn, shown).length === 0) shown = withBoxes;
  renderStage();
}

function light(turn, number) {
  if (turn !== null && turn !== selected) select(turn);
  stage.light(number);
  for (const label of find("turns").querySelectorAll(".lit")) label.classList.remove("lit");
  const item = find("turns").children[conversation.turns.indexOf(turn)];
  if (number !== null) item?.querySelector(`[data-number="${number}"]`)?.classList.add("lit");
}

function drawnBox() {
  if (box) return shown === allPictures().at(-1) ? box : null;
  const asked = conversation.turns[conversation.turns.indexOf(selected) - 1];
  return asked?.box && conversation.pictures.includes(shown) ? asked.box : null;
}

function renderStage() {
  const entries = conversation.boxesOn(selected, shown);
  find("empty").hidden = shown !== null;
  find("tools").hidden = shown === null;
  stage.show(shown, entries, drawnBox(), shown ? t("pictureN", { n: numbers().get(shown) }) : "");
  const scored = entries.some((entry) => entry.box.score !== null);
  find("score-row").hidden = !scored;
  find("box-count").textContent = entries.length ? countBoxes(stage.shown) : "";
  find("save-png").disabled = find("save-json").disabled = entries.length === 0;
  const buttons = allPictures().map((picture, at) => {
    const item = make("li");
    const button = thumbnail(picture, at + 1, () => showPicture(picture));
    button.setAttribute("aria-current", String(picture === shown));
    item.append(button);
    return item;
  });
  find("thumbnails").replaceChildren(...(buttons.length > 1 ? buttons : []));
}

function showPicture(picture) {
  shown = picture;
  renderStage();
}

const countBoxes = (n) => (n === 1 ? t("oneBox") : t("boxes", { n }));

// ---- the conversation

function render() {
  const known = numbers();
  const act = { light, select, edit, regenerate, show: showPicture };
  const last = conversation.turns.at(-1);
  find("turns").replaceChildren(...conversation.turns.map((turn) => turnElement(turn, known, turn === last, act)));
  find("pending").replaceChildren(...pending.map((picture) => pendingElement(picture, known.get(picture), showPicture, removePending)));
  find("hints").hidden = conversation.turns.length > 0;
  find("box-row").hidden = box === null;
  find("send").hidden = running !== null;
  find("stop").hidden = running === null;
  renderStage();
}

/** While an answer is written only its own element changes, once a frame. */
function renderAnswer(turn) {
  if (turn.scheduled) return;
  turn.scheduled = true;
  requestAnimationFrame(() => {
    turn.scheduled = false;
    const at = conversation.turns.indexOf(turn);
    if (at < 0) return;
    const scroll = find("scroll");
    const following = scroll.scrollHeight - scroll.scrollTop - scroll.clientHeight < 60;
    const act = { light, select, edit, regenerate, show: showPicture };
    find("turns").children[at]?.replaceWith(turnElement(turn, numbers(), true, act));
    if (following) scroll.scrollTop = scroll.scrollHeight;
    if (turn === selected) select(turn);
  });
}

async function send() {
  if (running) return;
  const text = question.value.trim();
  if (!text) return notify(t("nothing"));
  const turn = conversation.ask(text, pending, text.includes(BOX) ? box : null);
  [pending, box, question.value] = [[], null, ""];
  await write(turn);
}

/** Put a question into the composer; one about a rectangle waits for it to be drawn. */
function suggest(text) {
  question.value = text;
  question.focus();
  if (text.includes(BOX) && shown) stage.setDrawing(true);
}

function regenerate() {
  if (!running) write(conversation.begin());
}

async function write(turn) {
  notify("");
  running = new AbortController();
  selected = turn;
  render();
  find("scroll").scrollTop = find("scroll").scrollHeight;
  try {
    await conversation.answer(turn, settings(), running.signal, () => renderAnswer(turn));
    find("status").textContent = t("answered", { boxes: turn.boxes.length ? countBoxes(turn.boxes.length) : "" });
  } catch (error) {
    if (error.name === "AbortError") turn.stopped = true;
    else if (error instanceof ApiError) turn.error = messageOf(error);
    else throw error;
    if (error.status === 401 && (await askKey())) setTimeout(regenerate);
  } finally {
    running = null;
    if (turn.stopped || turn.error) turn.complete = turn.text !== "";
    render();
    select(turn);
  }
}

function edit(turn) {
  running?.abort();
  const taken = conversation.takeBack(turn);
  question.value = taken.text;
  pending = [...taken.pictures, ...pending];
  box = taken.box;
  if (box) boxInputs.forEach((input, at) => (input.value = box[at]));
  selected = conversation.turns.at(-1) ?? null;
  shown = allPictures().at(-1) ?? null;
  render();
  question.focus();
}

function clear() {
  running?.abort();
  allPictures().forEach(release);
  conversation = new Conversation();
  [pending, box, selected, shown, question.value] = [[], null, null, null, ""];
  notify("");
  render();
  question.focus();
}

async function runExample() {
  const [picture, texts] = await Promise.all([fetch("example.jpg"), fetch("example.json")]);
  await addFiles([new File([await picture.blob()], "example.jpg", { type: "image/jpeg" })]);
  question.value = (await texts.json()).caption_prompt;
  await send();
}

// ---- the page

function changeLanguage(code) {
  setLanguage(code);
  find("language").textContent = otherLanguage().name;
  find("language").lang = otherLanguage().code;
  render();
}

function listen() {
  const on = (id, event, handler) => find(id).addEventListener(event, handler);
  for (const button of document.querySelectorAll(".choose")) button.addEventListener("click", () => find("file").click());
  for (const button of document.querySelectorAll(".camera")) {
    button.addEventListener("click", async () => {
      const photo = await takePhoto(document).catch((error) => void notify(t("noCamera", { why: error.message })));
      if (photo) addFiles([photo]);
    });
  }
  on("file", "change", ({ target }) => addFiles([...target.files]).then(() => (target.value = "")));
  for (const hint of document.querySelectorAll(".hint")) hint.addEventListener("click", () => suggest(hint.textContent));
  on("example", "click", runExample);
  on("composer", "submit", (event) => (event.preventDefault(), send()));
  on("question", "keydown", (event) => {
    const composing = event.isComposing || event.keyCode === 229; // Enter chooses a word of an input method
    if (event.key === "Enter" && !event.shiftKey && !composing) (event.preventDefault(), send());
  });
  on("question", "input", () => box && !question.value.includes(BOX) && removeBox());
  on("stop", "click", () => running?.abort());
  on("clear", "click", clear);
  on("remove-box", "click", removeBox);
  for (const input of boxInputs) {
    input.addEventListener("change", () => {
      const [x1, y1, x2, y2] = boxInputs.map((each) => Math.min(Math.max(Math.round(Number(each.value)) || 0, 0), 1000));
      setBox([Math.min(x1, x2), Math.min(y1, y2), Math.max(x1, x2), Math.max(y1, y2)]);
    });
  }
  on("score", "input", ({ target }) => {
    find("score-value").textContent = Number(target.value).toFixed(2);
    stage.setMinimum(Number(target.value));
    find("box-count").textContent = countBoxes(stage.shown);
  });
  const visible = () => conversation.boxesOn(selected, shown).filter(({ box: { score } }) => score === null || score >= stage.minimum);
  on("save-png", "click", () => savePng(shown, visible()));
  on("save-json", "click", () => saveJson(shown, visible(), selected));
  on("key-cancel", "click", () => find("key-dialog").close());
  on("open-settings", "click", () => find("settings").showModal());
  on("forget-key", "click", () => (setKey(""), (find("forget-key").hidden = true)));
  on("language", "click", () => {
    const { code } = otherLanguage();
    remember("language", code);
    changeLanguage(code);
  });
  on("theme", "click", () => {
    const theme = otherTheme();
    remember("theme", theme);
    changeTheme(theme);
  });
  document.addEventListener("paste", ({ clipboardData }) => clipboardData?.files.length && addFiles([...clipboardData.files]));
  // a picture dropped anywhere is meant for the page, which would otherwise be left for it
  document.addEventListener("dragover", (event) => (event.preventDefault(), document.body.classList.add("dropping")));
  document.addEventListener("dragleave", ({ relatedTarget }) => relatedTarget ?? document.body.classList.remove("dropping"));
  document.addEventListener("drop", (event) => {
    event.preventDefault();
    document.body.classList.remove("dropping");
    addFiles([...event.dataTransfer.files]);
  });
}

listen();
changeTheme(remembered("theme"));
changeLanguage(remembered("language") ?? navigator.language.slice(0, 2));
find("forget-key").hidden = !hasKey();
await connect((found) => (limits = found));
if (new URLSearchParams(location.search).has("example")) await runExample();
