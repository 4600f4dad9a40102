// Reaching the server: its models and their limits, the key it asks for, the settings of a request.

import { ApiError, hasKey, isReady, listModels, setKey } from "./api.js";
import { t } from "./strings.js";

const find = (id) => document.getElementById(id);

/** The fields of a request that the user has set. */
export function settings() {
  const number = (id) => (find(id).value === "" ? null : Number(find(id).value));
  const all = {
    model: find("model").value || null,
    system: find("system").value.trim(),
    temperature: number("temperature"),
    max_completion_tokens: number("max-tokens"),
    seed: number("seed"),
  };
  return Object.fromEntries(Object.entries(all).filter(([, value]) => value !== null && value !== ""));
}

/** List the models, waiting for one that loads; `onLimits` is called with the limits on pictures, null until then. */
export async function connect(onLimits) {
  try {
    const models = await listModels();
    const before = find("model").value;
    find("model").replaceChildren(...models.map(({ id }) => new Option(id, id, false, id === before)));
    const limits = models[0]?.qvl?.limits ?? null;
    onLimits(limits);
    notify(limits ? "" : t("loading"));
    if (!limits) setTimeout(() => waitUntilReady(onLimits), 500);
  } catch (error) {
    if (!(error instanceof ApiError)) throw error;
    if (error.status === 401 && (await askKey(hasKey()))) return connect(onLimits);
    notify(messageOf(error));
  }
}

/** Ask for the API key; returns whether one was given. */
export function askKey(refused = false) {
  const dialog = find("key-dialog");
  if (refused) notify(t("badKey"));
  find("key").value = "";
  dialog.returnValue = "";
  dialog.showModal();
  return new Promise((resolve) => {
    dialog.onclose = () => {
      const given = dialog.returnValue === "ok" && find("key").value;
      if (given) setKey(find("key").value);
      find("forget-key").hidden = !hasKey();
      resolve(Boolean(given));
    };
  });
}

/** What to say of an error: the server's own words, or the page's where there was no answer. */
export function messageOf(error) {
  return error.code === "lost" || error.code === "offline" ? t(error.code) : error.message;
}

/** Show a line below the question; an empty one clears it. */
export function notify(text) {
  find("notice").textContent = text;
}

async function waitUntilReady(onLimits) {
  if (await isReady()) await connect(onLimits);
  else setTimeout(() => waitUntilReady(onLimits), 1000);
}
