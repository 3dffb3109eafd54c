// The web UI: its state, event handlers and display.

import * as api from "./api.js";
import { Batch } from "./batch.js";
import { button, el, input, isText, make, pixelsOf, saveFile, thumbnail, toBlob } from "./dom.js";
import { Explore } from "./explore.js";
import { adopted, fieldsOf } from "./fields.js";
import { UNCHANGED, difference } from "./pixels.js";
import { Settings } from "./settings.js";
import { Stage } from "./stage.js";
import * as store from "./store.js";
import * as trees from "./tree.js";
import { anyOf, editedName, factsOf, ideas, progressWords, within } from "./words.js";

/**
 * A step of the history with its picture. words: suggested instructions.
 * @typedef {trees.Step & {
 *   blob: Blob, shown: Blob | null, thumb: Blob, format: string, name: string, width: number, height: number,
 *   infotext: string, mask: Blob | null, words: string[] }} Step
 * @typedef {{ blob: Blob, seed: number, infotext: string, mask: Blob | null }} Candidate
 * @typedef {{ model: string, models: string[], about: string, defaults: Record<string, any>,
 *   grid: { text_cfg: number[], image_cfg: number[] }, suggestions: string[], limits: Record<string, number> }} Card
 */

const PREVIEWS = 10; // per edit; more would not help
/** @type {Card | null} */
let card = null;
/** @type {import("./fields.js").Field[]} */
let fields = [];
/** @type {trees.Tree<Step>} */
let tree = trees.emptyTree();
/** @type {Candidate[]} */
let candidates = [];
/** @type {(string | null)[] | null} a preview for each candidate in progress */
let previews = null;
let chosen = 0;
/** @type {Candidate[]} results removed by undo, for redo */
let aside = [];
/** @type {AbortController | null} */
let running = null;
/** @type {string | null} the step that the grid was made from */
let gridOf = null;
let runs = "edit"; // the view in which the current run was started
let view = "edit";
let typed = false; // whether the user changed the instruction; Ctrl+Z is then left to the field
let kept = true; // whether the browser can save the history
/** @type {Candidate[]} */
let saved = candidates; // the candidates that the browser has saved

const words = input("instruction");
const stage = new Stage({ changed: maskChanged, announce: say });
const settings = new Settings(el("front"), el("more"), remember);
const explore = new Explore(adoptCell);
const batch = new Batch(showRun);

// --- helpers ------------------------------------------------------------------------------------

/** @param {string} text */
function say(text) {
  el("status").textContent = text;
}

/** Object URLs, one per blob. @type {WeakMap<Blob, string>} */
const urls = new WeakMap();

/** @param {Blob} blob */
function urlOf(blob) {
  const known = urls.get(blob) ?? URL.createObjectURL(blob);
  urls.set(blob, known);
  return known;
}

/** @param {string} text */
function setWords(text) {
  words.value = text;
  typed = false;
}

const newId = () => Date.now().toString(36) + Math.random().toString(36).slice(2, 10);

/**
 * Show a message until it is closed or replaced by one with the same id.
 * @param {string} id @param {string} text @param {{ kind?: "wrong" | "note", acts?: [string, () => void][] }} [how]
 */
function tell(id, text, { kind = "note", acts = [] } = {}) {
  hush(id);
  const close = make("button", { className: "icon", "aria-label": "Close this message" }, "✕");
  const box = make("div", { className: `banner ${kind}`, role: kind === "wrong" ? "alert" : "status" }, make("p", {}, text));
  box.dataset.id = id;
  for (const [label, act] of acts) {
    const choice = make("button", { className: "small" }, label);
    choice.addEventListener("click", () => {
      box.remove();
      act();
    });
    box.append(choice);
  }
  close.addEventListener("click", () => box.remove());
  box.append(close);
  el("banners").append(box);
}

/** @param {string[]} ids */
function hush(...ids) {
  for (const box of el("banners").querySelectorAll(".banner")) {
    if (box instanceof HTMLElement && ids.includes(box.dataset.id ?? "")) box.remove();
  }
}

/** Show an error and, where it may help, offer to try again. @param {unknown} error @param {() => void} again */
function complain(error, again) {
  if (api.stopped(error)) return say("Stopped.");
  const text = error instanceof Error ? error.message : String(error);
  say("");
  if (error instanceof api.ApiError && error.status === 0) {
    tell("gone", `${text} Is it still running? Your pictures and history are safe in this browser.`, { kind: "wrong", acts: [["Try again", again]] });
    void waitForServer(again);
    return;
  }
  const busy = error instanceof api.ApiError && error.retry;
  tell("wrong", text, { kind: "wrong", acts: busy ? [["Try again", again]] : [] });
  const field = error instanceof api.ApiError ? document.getElementById(`set-${error.field}`) : null;
  field?.setAttribute("aria-invalid", "true");
}

/** Focus the first invalid setting. */
function showWrong() {
  const field = document.querySelector("#panel [aria-invalid='true']");
  if (!(field instanceof HTMLElement)) return;
  const folded = field.closest("details");
  if (folded) folded.open = true;
  field.focus();
}

let waiting = false;
/** @param {() => void} again */
async function waitForServer(again) {
  if (waiting) return;
  waiting = true;
  for (;;) {
    await new Promise((resolve) => setTimeout(resolve, 2000));
    try {
      if ((await fetch("readyz")).ok) break;
    } catch {
      // still not responding
    }
  }
  waiting = false;
  hush("gone");
  tell("back", "The server is back.", { acts: [["Try again", again]] });
  if (!card) void begin();
}

// --- history ------------------------------------------------------------------------------------

/** @type {ReturnType<typeof setTimeout> | undefined} */
let later;
/** Save the state of the page, after a short delay. */
function remember() {
  clearTimeout(later);
  later = setTimeout(() => void keep([], []), 300);
}

/** @param {Step[]} put @param {string[]} gone */
async function keep(put, gone) {
  if (!kept) return;
  const state = {
    at: tree.at,
    last: tree.last,
    instruction: words.value,
    values: settings.values,
    model: card?.model ?? null,
    chosen,
  };
  const changed = candidates === saved ? undefined : (saved = candidates);
  try {
    await store.save(put, gone, state, changed);
  } catch (error) {
    kept = false;
    const why = error instanceof Error && error.name === "QuotaExceededError" ? "its storage is full" : "storage is blocked";
    tell("unkept", `This browser cannot save the history (${why}). You lose it when you close the page.`);
  }
}

/** @param {Omit<Step, "id" | "made" | "thumb">} found */
async function addStep(found) {
  const thumb = await thumbnail(found.shown ?? found.blob);
  /** @type {Step} */
  const step = { ...found, id: newId(), made: Date.now(), thumb };
  const pruned = trees.prune(trees.addStep(tree, step));
  const before = tree;
  tree = pruned.tree;
  moved();
  // Children of a pruned step have a new parent.
  const changed = Object.values(tree.steps).filter((each) => each.id !== step.id && before.steps[each.id] !== each);
  await keep([step, ...changed], pruned.gone);
}

/** Show the current step, without the results of another one. A running batch or grid continues. */
function moved() {
  if (runs === "edit") running?.abort();
  candidates = [];
  aside = [];
  previews = null;
  chosen = 0;
  stage.clearMask();
  hush("unchanged", "outside", "settings");
  showAll();
  remember();
}

/** @param {string | null} id */
function goTo(id) {
  if (id === tree.at && candidates.length) return putAside();
  if (!id || id === tree.at) return;
  tree = trees.goTo(tree, id);
  moved();
}

/** Show the step without its results, which redo restores. */
function putAside() {
  [aside, candidates, chosen] = [candidates, [], 0];
  hush("unchanged", "outside");
  showAll();
  remember();
  say("Results removed. Redo restores them.");
}

/** @param {"undo" | "redo"} how */
function step(how) {
  if (adding) return void adding.then(() => step(how));
  if (how === "undo" && candidates.length) return putAside();
  if (how === "redo" && aside.length) {
    [candidates, aside] = [aside, []];
    showAll();
    remember();
    return say("Results restored.");
  }
  const target = how === "undo" ? trees.undoTarget(tree) : trees.redoTarget(tree);
  if (!target) return;
  tree = trees[how](tree);
  moved();
  say(`${how === "undo" ? "Undone" : "Redone"}: ${trees.current(tree)?.title}`);
}

/** Go to the parent of the current step, and restore the settings that made this step. */
async function runAgain() {
  const here = trees.current(tree);
  if (!here?.parent || !here.infotext) return;
  const { mask, title } = here;
  const found = await api.look(here.blob).catch((error) => complain(error, runAgain));
  if (!found?.settings) return;
  tree = trees.goTo(tree, here.parent);
  moved();
  applySettings(found.settings);
  setWords(title);
  if (mask) stage.takeMask(await createImageBitmap(mask));
  say("The settings of that step are restored. Change them, then click Edit.");
}

async function clearHistory() {
  const before = tree;
  tree = trees.emptyTree();
  moved();
  await store.clear().catch(() => {});
  const restore = () => {
    tree = before;
    moved();
    void keep(Object.values(tree.steps), []);
  };
  tell("cleared", "History cleared.", { acts: [["Restore it", restore]] });
}

// --- opening pictures ---------------------------------------------------------------------------

/** Open a file as a new picture. @param {Blob} file @param {string} name @param {string[]} [suggestions] */
async function open(file, name, suggestions = []) {
  hush("wrong", "settings", "large", "notes", "cleared");
  const most = card?.limits.body_bytes ?? Infinity;
  say(`Opening ${name} …`);
  /** @type {any} */
  let found;
  try {
    if (file.size > most) throw new api.ApiError(`${name} is larger than this server's limit of ${most / 1e6} MB.`, 413);
    found = await api.look(file);
  } catch (error) {
    await offerSmaller(file, name, error);
    return false;
  }
  await addStep({
    parent: null,
    title: name,
    blob: file,
    shown: api.fromBase64(found.preview, "image/webp"),
    format: found.format,
    name,
    width: found.width,
    height: found.height,
    infotext: found.infotext ?? "",
    mask: null,
    words: suggestions,
  });
  select("edit");
  if (found.warnings.length) tell("notes", found.warnings.join(" "));
  if (found.settings) {
    tell("settings", `This file was edited with ip2p: “${found.settings.instruction}”.`, {
      acts: [["Use its settings", () => applySettings(found.settings, true)]],
    });
  }
  say("Describe what to change.");
  if (matchMedia("(hover: hover)").matches) words.focus();
  return true;
}

/** Show why a file cannot be opened. Offer to resize or convert it if that helps. @param {Blob} file @param {string} name @param {unknown} error */
async function offerSmaller(file, name, error) {
  const limits = card?.limits;
  const large = error instanceof api.ApiError && (error.status === 413 || /pixels|larger/.test(error.message));
  const unknown = error instanceof api.ApiError && error.status === 422;
  const bitmap = limits && (large || unknown) ? await createImageBitmap(file).catch(() => null) : null;
  if (!limits || !bitmap || Math.min(bitmap.width, bitmap.height) < 16) return complain(error, () => void open(file, name));
  const { width, height } = within(bitmap.width, bitmap.height, limits.pixels * 0.98);
  const pixels = bitmap.width * bitmap.height;
  const [has, most] = [pixels, limits.pixels].map((count) => (count / 1e6).toFixed(1).replace(/\.0$/, ""));
  const what = width < bitmap.width ? `Resize it to ${width} × ${height}` : "Convert it to JPEG";
  const message =
    pixels > limits.pixels
      ? `${name} has ${has} megapixels. This server accepts up to ${most} megapixels.`
      : /** @type {Error} */ (error).message;
  say("");
  tell("large", `${message} Its metadata will not be kept.`, {
    kind: "wrong",
    acts: [
      [
        what,
        async () => {
          const { canvas } = pixelsOf(bitmap, width, height);
          await open(await toBlob(canvas, "image/jpeg"), name.replace(/\.[^.]*$/, "") + ".jpg");
        },
      ],
    ],
  });
}

/** @param {Record<string, any>} found @param {boolean} [aloud] */
function applySettings(found, aloud = false) {
  settings.set(adopted(found, fields, settings.defaults));
  setWords(found.instruction ?? words.value);
  remember();
  if (!aloud) return;
  const mask = found.mask && found.auto_mask == null;
  say(`Settings restored.${mask ? " The file does not contain the mask. Paint it again." : ""}`);
}

/** @param {FileList | File[] | null | undefined} files */
function take(files) {
  const found = [...(files ?? [])];
  if (!found.length) return;
  if (view === "batch" || found.length > 1) {
    select("batch");
    batch.add(found);
  } else void open(found[0], found[0].name || "picture.png");
}

// --- editing ------------------------------------------------------------------------------------

/** The fields of a request; null, with a message, if one is missing or invalid. */
async function request() {
  const instruction = words.value.trim();
  if (!instruction) {
    tell("wrong", "The instruction is empty. Describe what to change, for example “make it night”.", { kind: "wrong" });
    words.focus();
    return null;
  }
  /** @type {Record<string, unknown>} */
  let own;
  try {
    own = settings.request();
  } catch (error) {
    tell("wrong", /** @type {Error} */ (error).message, { kind: "wrong" });
    openPanel(true);
    showWrong();
    return null;
  }
  if (card && card.models.length > 1) own.model = card.model;
  return { ...own, instruction };
}

function needPicture() {
  tell("wrong", "Open a picture first, or try an example.", { kind: "wrong", acts: [["Choose a picture", () => input("file").click()]] });
}

/** Run the current view: what the main button does. */
async function start() {
  if (running) return;
  if (adding) await adding;
  hush("wrong", "gone", "back", "unchanged", "outside", "large");
  const here = trees.current(tree);
  if (view !== "batch" && !here) return needPicture();
  if (view === "batch" && !batch.entries.length) {
    return tell("wrong", "Add pictures first.", { kind: "wrong", acts: [["Add pictures", () => input("batch-files").click()]] });
  }
  const own = await request();
  if (!own) return;
  const controller = (running = new AbortController());
  runs = view;
  if (!(document.activeElement instanceof HTMLInputElement) || !matchMedia("(hover: hover)").matches) {
    if (document.activeElement === words) words.blur();
  }
  showRun();
  showMeasure("Starting …", 0);
  try {
    if (runs === "batch") await runBatch(own, controller.signal);
    else if (runs === "explore") await runGrid(own, /** @type {Step} */ (here), controller.signal);
    else await runEdit(own, /** @type {Step} */ (here), controller.signal);
  } catch (error) {
    if (running === controller) complain(error, start);
  } finally {
    if (running === controller) running = null;
    controller.abort(); // other requests of this run
    previews = null;
    showAll();
  }
}

function stop() {
  running?.abort();
  say("Stopped.");
}

/** @param {Step} here @param {Record<string, any>} own */
async function masked(here, own) {
  const mask = await stage.maskFile();
  const feather = Number(input("mask-feather").value);
  return { ...own, image: here.blob, mask, auto_mask: mask ? null : own.auto_mask, feather: mask && feather ? feather : own.feather };
}

/** @param {Record<string, any>} own @param {Step} here @param {AbortSignal} signal */
async function runEdit(own, here, signal) {
  stage.mask(false);
  showMask();
  const steps = Number(settings.value("steps")) || 20;
  const sent = await masked(here, own);
  candidates = [];
  aside = [];
  previews = Array.from({ length: Number(own.count) || 1 }, () => null);
  chosen = 0;
  showAll();
  say("Working …");
  const made = await api.edit({ ...sent, previews: Math.max(1, Math.round(steps / PREVIEWS)) }, signal, (name, news) => {
    showProgress(news);
    if (name === "preview" && previews && news.result !== undefined) {
      previews[news.result] = `data:image/jpeg;base64,${news.b64}`;
      showStrip();
      if (news.result === chosen) showStage();
    }
  });
  const found = await Promise.all(
    made.results.map(async (result) => ({
      blob: await api.readBlob(result.url, signal),
      seed: result.seed,
      infotext: result.settings,
      mask: result.mask ? api.fromBase64(result.mask, "image/png") : /** @type {Blob | null} */ (sent.mask),
    })),
  );
  if (signal.aborted || tree.at !== here.id) return;
  candidates = found;
  previews = null;
  running = null;
  showAll();
  remember();
  warn(made.warnings);
  await checkChange(here);
  say(found.length > 1 ? `${found.length} results. Compare them and use one.` : "Done. Use this result, or try again.");
  // Move the focus to the results, so that Enter uses one.
  if (document.activeElement === words || document.activeElement === button("run") || document.activeElement === document.body) {
    /** @type {HTMLElement | null} */ (el("strip").querySelector("button"))?.focus({ preventScroll: true });
  }
}

/** @param {string[]} warnings */
function warn(warnings) {
  if (warnings.length) tell("outside", warnings.join(" "));
}

/** Show a message if no result has a visible change. @param {Step} here */
async function checkChange(here) {
  const before = await sample(here.shown ?? here.blob);
  const after = await Promise.all(candidates.map(({ blob }) => sample(blob)));
  if (!after.length || after.some((each) => difference(before, each) >= UNCHANGED)) return;
  const strength = Number(settings.value("text_cfg"));
  tell("unchanged", "Almost nothing changed. Raise Edit strength, lower Keep original, or rephrase the instruction.", {
    acts: [
      [
        "Try it stronger",
        () => {
          settings.set({ ...settings.values, text_cfg: Math.min(100, Math.round(strength * 15) / 10) });
          void start();
        },
      ],
    ],
  });
}

/** @param {Blob} blob */
async function sample(blob) {
  const bitmap = await createImageBitmap(blob);
  const { data } = pixelsOf(bitmap, 96, 96);
  bitmap.close();
  return data.data;
}

/** A step that is being added. Other actions wait for it. @type {Promise<void> | null} */
let adding = null;

/** Continue from the selected candidate. */
async function use() {
  if (adding) return;
  adding = goOn();
  await adding.finally(() => (adding = null));
}

async function goOn() {
  const here = trees.current(tree);
  const made = candidates[chosen];
  if (!here || !made) return;
  const title = made.infotext.split("\n")[0] || words.value;
  setWords("");
  const bitmap = await createImageBitmap(made.blob);
  const { width, height } = bitmap;
  bitmap.close();
  await addStep({
    parent: here.id,
    title,
    blob: made.blob,
    shown: null,
    format: here.format,
    name: here.name,
    width,
    height,
    infotext: made.infotext,
    mask: made.mask,
    words: here.words,
  });
  say("Describe the next change, or undo.");
  if (matchMedia("(hover: hover)").matches) words.focus({ preventScroll: true });
}

/** Let the model find the area to edit: run an edit with auto_mask, and use its region as the mask. */
async function selectAutomatically() {
  if (running) return stop();
  const here = trees.current(tree);
  const own = await request();
  if (!here || !own) return;
  const controller = (running = new AbortController());
  runs = "edit";
  showRun();
  showMeasure("Starting …", 0);
  say("Finding the area to edit …");
  try {
    const threshold = Number(settings.value("auto_mask")) || 0.5;
    const sent = { ...own, image: here.blob, count: 1, auto_mask: threshold, mask: null };
    const { results } = await api.edit(sent, controller.signal, (_name, news) => showProgress(news));
    const mask = results[0].mask;
    if (mask) stage.takeMask(await createImageBitmap(api.fromBase64(mask, "image/png")));
    say(stage.painted ? "This is the area that the instruction would edit. Paint or erase to adjust it, then click Done." : "The model found no area to edit. Paint it yourself.");
  } catch (error) {
    complain(error, selectAutomatically);
  } finally {
    if (running === controller) running = null;
    showRun();
  }
}

/** @param {Record<string, any>} own @param {Step} here @param {AbortSignal} signal */
async function runGrid(own, here, signal) {
  const seed = Number(own.seed) >= 0 ? own.seed : Math.floor(Math.random() * 1e6); // one for all cells
  const sent = await masked(here, { ...own, seed });
  gridOf = here.id;
  say("Creating the grid …");
  await explore.run(sent, signal, (done, all) => showMeasure(`Grid: ${done} of ${all} done`, done / all));
  say("Click a result to use its settings.");
}

/** @param {import("./explore.js").Cell} cell */
function adoptCell({ text_cfg, image_cfg, seed, blob, infotext }) {
  if (runs !== "batch") running?.abort();
  if (gridOf !== tree.at) goTo(gridOf);
  const before = settings.values;
  settings.set({ ...before, text_cfg, image_cfg, seed });
  candidates = [{ blob, seed, infotext, mask: null }];
  aside = [];
  chosen = 0;
  select("edit");
  showAll();
  remember();
  say(`Edit strength ${text_cfg} and keep original ${image_cfg} are set. Use this result, or edit again.`);
}

/** @param {Record<string, any>} own @param {AbortSignal} signal */
async function runBatch(own, signal) {
  say("Editing …");
  await batch.run({ ...own, mask: null }, signal, (done, failed, all) => {
    showMeasure(`Batch: ${done} of ${all} done${failed ? `, ${failed} failed` : ""}`, (done + failed) / all);
    say(`${done} of ${all} done${failed ? `, ${failed} failed (see the list)` : ""}.`);
  });
}

// --- download -----------------------------------------------------------------------------------

/** Download the picture shown, in the original's format, with its metadata and the settings. */
async function download() {
  const here = trees.current(tree);
  if (!here) return;
  const made = candidates[chosen];
  try {
    if (!made && !here.parent) return saveFile(here.blob, here.name);
    const blob = made ? made.blob : here.blob;
    const file = here.format === "png" ? blob : await api.convert(blob, here.format);
    saveFile(file, editedName(here.name, here.format));
    say("Downloaded. The file contains its settings.");
  } catch (error) {
    complain(error, download);
  }
}

// --- display ------------------------------------------------------------------------------------

function showAll() {
  const here = trees.current(tree);
  document.body.toggleAttribute("data-empty", !here);
  el("start").hidden = Boolean(here);
  el("stage").hidden = !here;
  el("explore-empty").hidden = Boolean(here);
  el("grid-box").hidden = !here;
  button("undo").disabled = !candidates.length && !trees.undoTarget(tree);
  button("redo").disabled = !aside.length && !trees.redoTarget(tree);
  button("download").disabled = !here;
  button("again").disabled = !here?.parent || !here.infotext;
  button("clear").disabled = !here;
  showStage();
  showStrip();
  showSteps();
  showSuggestions();
  showRun();
}

function showStage() {
  const here = trees.current(tree);
  if (!here) return;
  const made = candidates[chosen];
  const preview = previews?.[chosen];
  const parent = here.parent ? tree.steps[here.parent] : null;
  const own = urlOf(here.shown ?? here.blob);
  if (made) stage.show(own, here.title, urlOf(made.blob), `Result ${chosen + 1}: ${made.infotext.split("\n")[0]}`, here, { compare: true });
  else if (preview) stage.show(own, here.title, preview, `Preview of result ${chosen + 1}`, here, { compare: true, soft: true });
  else if (parent) stage.show(urlOf(parent.shown ?? parent.blob), parent.title, own, here.title, here);
  else stage.show(own, here.title, null, "", here);
  button("compare").disabled = stage.after.hidden;
  const facts = made?.infotext ?? (here.parent ? here.infotext : "");
  el("facts").textContent = facts ? factsOf(facts) : `${here.width} × ${here.height}`;
  el("facts").title = facts;
}

function showStrip() {
  const list = el("strip");
  const count = previews?.length ?? candidates.length;
  el("results").hidden = !count;
  el("suggestions").hidden = count > 0;
  button("use").disabled = !candidates.length;
  while (list.children.length > count) list.lastChild?.remove();
  for (let k = 0; k < count; k++) {
    if (!list.children[k]) {
      const choose = make("button", { type: "button" }, make("img", { alt: "" }), make("span"));
      choose.addEventListener("click", () => choose_(k));
      list.append(make("li", {}, choose));
    }
    const made = candidates[k];
    const [choose] = list.children[k].children;
    const picture = /** @type {HTMLImageElement} */ (choose.querySelector("img"));
    const src = made ? urlOf(made.blob) : (previews?.[k] ?? "");
    if (src) picture.src = src;
    else picture.removeAttribute("src");
    choose.classList.toggle("busy", !made);
    choose.setAttribute("aria-pressed", String(k === chosen));
    choose.setAttribute("aria-label", made ? `Candidate ${k + 1} of ${count}, seed ${made.seed}` : `Candidate ${k + 1} of ${count}, in progress`);
    /** @type {HTMLElement} */ (choose.querySelector("span")).textContent = String(k + 1);
  }
}

/** @param {number} number */
function choose_(number) {
  const count = previews?.length ?? candidates.length;
  chosen = (number + count) % count;
  showStage();
  showStrip();
  remember();
}

function showSteps() {
  const list = el("steps");
  list.replaceChildren();
  for (const { step: each, depth } of trees.rows(tree)) {
    const here = each.id === tree.at;
    const go = make(
      "button",
      { type: "button", title: each.title, "aria-label": `Step: ${each.title}` },
      make("img", { src: urlOf(each.thumb), alt: "", width: 64, height: 64 }),
      make("span", {}, each.title),
    );
    if (here) go.setAttribute("aria-current", "step");
    go.addEventListener("click", () => {
      goTo(each.id);
      openRail(false);
    });
    const line = make("li", {}, go);
    line.style.setProperty("--depth", String(Math.min(depth, 3)));
    line.classList.toggle("branch", depth > 0);
    list.append(line);
    if (here) line.scrollIntoView({ block: "nearest" });
  }
}

/** Run an instruction as if it had been typed. @param {string} text */
function ask(text) {
  setWords(text);
  void start();
}

function showSuggestions() {
  const here = trees.current(tree);
  // Instructions that were already applied, including the edit stored in the file.
  const done = trees.path(tree).flatMap((each) => [each.title, each.infotext.split("\n")[0]]);
  const { sure, general } = ideas(here?.words ?? [], card?.suggestions ?? [], done);
  const surprise = make("button", { type: "button", className: "chip strong", id: "surprise" }, "Surprise me");
  surprise.addEventListener("click", () => ask(anyOf(sure.length ? sure : general, words.value)));
  surprise.disabled = !sure.length && !general.length;
  const chips = [...sure, ...general].map((each) => {
    const chip = make("button", { type: "button", className: "chip" }, each);
    chip.addEventListener("click", () => ask(each));
    return chip;
  });
  const note = make("span", { className: "dim" }, "Not tried on your picture:");
  el("suggestions").replaceChildren(surprise, ...(here && !here.words.length ? [note] : []), ...chips);
  el("known-instructions").replaceChildren(...[...sure, ...general].map((value) => make("option", { value })));
}

function showRun() {
  const run = button("run");
  const labels = { edit: "Edit", explore: "Create grid", batch: "Edit all" };
  run.textContent = running ? "Stop" : labels[/** @type {keyof typeof labels} */ (view)];
  run.classList.toggle("stop", Boolean(running));
  el("working").hidden = !running;
  document.body.toggleAttribute("data-running", Boolean(running));
  el("suggestions").inert = Boolean(running);
  button("batch-clear").disabled = !batch.entries.length || Boolean(running && runs === "batch");
  button("mask-auto").lastElementChild?.replaceChildren(running ? "Stop" : "Select automatically");
  if (!running) showMeasure("", 0);
}

/** @param {api.News} news */
function showProgress(news) {
  showMeasure(progressWords(news), news.step / news.steps);
}

/** @param {string} text @param {number} share */
function showMeasure(text, share) {
  const bar = el("progress", HTMLProgressElement);
  bar.value = share;
  el("progress-words").textContent = text;
  if (view !== "edit" && running && text) say(text);
}

function showMask() {
  button("mask").setAttribute("aria-pressed", String(stage.masking));
  el("mask-tools").hidden = !stage.masking;
  el("tools").hidden = stage.masking;
  button("brush").setAttribute("aria-pressed", String(!stage.erasing));
  button("eraser").setAttribute("aria-pressed", String(stage.erasing));
}

function maskChanged() {
  const mask = button("mask");
  mask.classList.toggle("set", stage.painted);
  /** @type {HTMLElement} */ (mask.querySelector("span")).textContent = stage.painted ? "Mask on" : "Mask";
}

/** @param {boolean} on */
function setMasking(on) {
  if (!trees.current(tree)) return;
  stage.mask(on);
  showMask();
  if (on) {
    say("Paint the area to edit. The rest stays unchanged.");
    stage.frame.focus({ preventScroll: true });
  } else say(stage.painted ? "Only the painted area will change." : "");
}

/** @param {string} name */
function select(name) {
  view = name;
  document.body.dataset.view = name;
  for (const each of ["edit", "explore", "batch"]) {
    const tab = button(`tab-${each}`);
    tab.setAttribute("aria-selected", String(each === name));
    tab.tabIndex = each === name ? 0 : -1;
    el(each).hidden = each !== name;
  }
  showRun();
}

/** @param {boolean} on */
function openPanel(on) {
  document.body.toggleAttribute("data-panel", on);
  button("settings-open").setAttribute("aria-expanded", String(on));
  if (on && getComputedStyle(button("settings-close")).display !== "none") button("settings-close").focus();
}

/** @param {boolean} on */
function openRail(on) {
  document.body.toggleAttribute("data-rail", on);
  button("history-open").setAttribute("aria-expanded", String(on));
  if (on) button("history-close").focus();
}

// --- events -------------------------------------------------------------------------------------

/** @param {string} id @param {() => void} act */
const on = (id, act) => button(id).addEventListener("click", act);

function wire() {
  on("undo", () => step("undo"));
  on("redo", () => step("redo"));
  on("again", runAgain);
  on("clear", clearHistory);
  on("download", download);
  on("use", use);
  for (const id of ["open", "choose", "explore-choose"]) on(id, () => input("file").click());
  on("explore-example", () => select("edit"));
  on("batch-choose", () => input("batch-files").click());
  on("help-open", () => el("help", HTMLDialogElement).showModal());
  on("settings-open", () => openPanel(!document.body.hasAttribute("data-panel")));
  on("settings-close", () => {
    openPanel(false);
    button("settings-open").focus();
  });
  on("history-open", () => openRail(!document.body.hasAttribute("data-rail")));
  on("history-close", () => {
    openRail(false);
    button("history-open").focus();
  });
  on("reset", () => {
    settings.set({});
    remember();
    say("Settings reset to the model's defaults.");
  });
  on("mask", () => setMasking(!stage.masking));
  on("mask-done", () => {
    setMasking(false);
    button("mask").focus();
  });
  for (const [id, erasing] of /** @type {const} */ ([["brush", false], ["eraser", true]])) {
    on(id, () => {
      stage.erasing = erasing;
      showMask();
    });
  }
  on("mask-invert", () => stage.invertMask());
  on("mask-clear", () => stage.clearMask());
  on("mask-auto", selectAutomatically);
  for (const id of ["file", "batch-files"]) {
    input(id).addEventListener("change", () => {
      take(input(id).files);
      input(id).value = "";
    });
  }
  el("bar").addEventListener("submit", (event) => {
    event.preventDefault();
    if (!running) void start();
    else if (document.activeElement === words) say("An edit is running. Click Stop or press Esc to cancel it.");
    else stop();
  });
  words.addEventListener("input", () => {
    typed = true;
    remember();
  });
  el("model", HTMLSelectElement).addEventListener("change", () => void takeModel(el("model", HTMLSelectElement).value));

  const names = ["edit", "explore", "batch"];
  for (const [k, name] of names.entries()) {
    on(`tab-${name}`, () => {
      hush("wrong");
      select(name);
    });
    button(`tab-${name}`).addEventListener("keydown", (event) => {
      const by = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
      if (by) button(`tab-${names[(k + by + 3) % 3]}`).focus();
    });
  }
  el("strip").addEventListener("keydown", (event) => {
    const by = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (by) {
      choose_(chosen + by);
      /** @type {HTMLElement} */ (el("strip").children[chosen].firstElementChild).focus();
    } else if (event.key === "Enter" && candidates.length) void use();
    else return;
    event.preventDefault();
  });
  document.addEventListener("keydown", keyDown);
  document.addEventListener("keyup", (event) => {
    if (event.key.toLowerCase() === "b") stage.hold(false);
  });
  document.addEventListener("paste", (event) => {
    const files = event.clipboardData?.files;
    if (!files?.length) return;
    event.preventDefault();
    take(files);
  });
  window.addEventListener("beforeunload", (event) => {
    if (batch.unsaved || (running && runs === "batch")) event.preventDefault(); // its results are not saved anywhere else
  });
  let inside = 0;
  for (const name of /** @type {const} */ (["dragenter", "dragover", "dragleave", "drop"])) {
    document.addEventListener(name, (event) => {
      if (!event.dataTransfer?.types.includes("Files")) return;
      event.preventDefault();
      inside = name === "drop" ? 0 : inside + { dragenter: 1, dragover: 0, dragleave: -1 }[name];
      el("veil").hidden = inside <= 0;
      if (name === "drop") take(event.dataTransfer.files);
    });
  }
}

/** @param {KeyboardEvent} event */
function keyDown(event) {
  const key = event.key.toLowerCase();
  if ((event.ctrlKey || event.metaKey) && (!isText(event.target) || (event.target === words && !typed))) {
    const how = key === "y" || (key === "z" && event.shiftKey) ? "redo" : key === "z" ? "undo" : null;
    if (how) {
      event.preventDefault();
      step(how);
    }
    return;
  }
  if (key === "escape") {
    if (document.querySelector("dialog[open]")) return;
    if (running && runs === view) stop();
    else if (stage.masking) setMasking(false);
    else if (document.body.hasAttribute("data-panel")) button("settings-close").click();
    else if (document.body.hasAttribute("data-rail")) button("history-close").click();
    return;
  }
  // Single-key shortcuts work only on the picture and its strip, not in text fields.
  const near = event.target instanceof Node && (el("stage").contains(event.target) || event.target === document.body);
  if (!near || isText(event.target) || event.altKey || event.ctrlKey || event.metaKey) return;
  if (key === "b") stage.hold(true);
  else if (key === "m") setMasking(!stage.masking);
  else if (key === "enter" && event.target === document.body && candidates.length) void use();
}

// --- startup ------------------------------------------------------------------------------------

/** @param {string | null} name @param {Record<string, unknown>} [values] @returns {Promise<void>} */
async function takeModel(name, values = {}) {
  try {
    card = await api.read(name ? `v1/card?model=${encodeURIComponent(name)}` : "v1/card");
  } catch (error) {
    // The model of the last visit is no longer available.
    if (name && error instanceof api.ApiError && error.status === 404) return takeModel(null, values);
    return complain(error, () => void takeModel(name, values));
  }
  const { model, models, about, defaults, grid } = /** @type {Card} */ (card);
  settings.values = values;
  settings.build(fields, defaults);
  explore.suggest(grid);
  el("model-line").textContent = `${model}: ${about}`;
  el("known").textContent = `Model: ${model} (${about})`;
  el("model-box").hidden = models.length < 2;
  el("model").replaceChildren(...models.map((each) => make("option", { value: each, selected: each === model }, each)));
  showSuggestions();
}

async function showExamples() {
  /** @type {{ url: string, title: string, instructions: string[] }[]} */
  const found = await api.read("v1/examples");
  const cards = found.map(({ url, title, instructions }, k) => {
    const choose = make(
      "button",
      { type: "button" },
      make("img", { src: url.slice(1), alt: title, width: 256, height: 256 }),
      make("span", {}, instructions[0]),
    );
    choose.addEventListener("click", async () => {
      try {
        const blob = await api.readBlob(url.slice(1));
        if (await open(blob, `example-${k + 1}.png`, instructions)) setWords(instructions[0]);
      } catch (error) {
        complain(error, () => choose.click());
      }
    });
    return make("li", {}, choose);
  });
  el("examples").replaceChildren(...cards);
  el("examples-title").hidden = false;
}

async function begin() {
  /** @type {any} */
  let page = null;
  try {
    const found = await store.load();
    page = found.page;
    const steps = Object.fromEntries(found.steps.map((each) => [each.id, each]));
    const newest = found.steps.sort((a, b) => b.made - a.made)[0]?.id ?? null;
    tree = { steps, at: steps[page?.at] ? page.at : newest, last: page?.last ?? {} };
    if (tree.at) [candidates, chosen] = [found.candidates, page?.chosen ?? 0];
    saved = candidates;
    words.value = page?.instruction ?? "";
  } catch {
    kept = false;
  }
  showAll();
  const examplesShown = showExamples().catch(() => {
    // takeModel reports a server that does not respond
    el("examples").replaceChildren();
    el("examples-title").hidden = true;
  });
  try {
    fields = fieldsOf(await api.read("v1/schema"));
  } catch (error) {
    return complain(error, () => void begin());
  }
  await takeModel(page?.model ?? null, page?.values ?? {});
  await examplesShown;
  document.body.dataset.ready = "";
}

wire();
void begin();
