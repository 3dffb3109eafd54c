// Batch mode: one instruction for many pictures.

import * as api from "./api.js";
import { button, el, icon, make, saveFile, thumbnail } from "./dom.js";
import { eachOf, patiently } from "./pool.js";
import { distinct, editedName, progressWords, size } from "./words.js";
import { zipParts } from "./zip.js";

/**
 * @typedef {object} Entry
 * @property {File} file
 * @property {HTMLLIElement} line
 * @property {Blob | null} result
 * @property {string} name  of the result
 * @property {boolean} saved  whether the result was downloaded
 */

export class Batch {
  /** @param {() => void} changed */
  constructor(changed) {
    this.changed = changed;
    /** @type {Entry[]} */
    this.entries = [];
    button("batch-zip").addEventListener("click", () => this.zip());
    button("batch-clear").addEventListener("click", () => {
      this.entries = [];
      el("files").replaceChildren();
      this.update();
    });
  }

  /** @param {Iterable<File>} files */
  add(files) {
    for (const file of files) {
      const line = make(
        "li",
        {},
        make("img", { alt: "", width: 56, height: 56 }),
        make("span", { className: "name" }, file.name),
        make("span", { className: "state" }, size(file.size)),
        make("progress", { max: 1, value: 0, "aria-label": `Progress of ${file.name}` }),
        make("span", { className: "act" }),
      );
      this.entries.push({ file, line, result: null, name: "", saved: false });
      el("files").append(line);
      void this.picture(line, file);
    }
    this.update();
  }

  /** @param {HTMLElement} line @param {Blob} blob */
  async picture(line, blob) {
    const shown = /** @type {HTMLImageElement} */ (line.querySelector("img"));
    try {
      shown.src = URL.createObjectURL(await thumbnail(blob, 112));
      shown.classList.remove("unknown");
    } catch {
      shown.classList.add("unknown"); // the browser cannot decode it, but the server may
    }
  }

  update() {
    const done = this.entries.filter((entry) => entry.result).length;
    button("batch-zip").disabled = !done;
    el("batch-hint").hidden = this.entries.length > 0;
    this.changed();
  }

  /**
   * Edit all pictures. A failed one shows the error in its line.
   * @param {Record<string, unknown>} fields @param {AbortSignal} signal @param {(done: number, failed: number, all: number) => void} tell
   */
  async run(fields, signal, tell) {
    let [done, failed] = [0, 0];
    for (const entry of this.entries) Object.assign(entry, { result: null, name: "", saved: false });
    tell(done, failed, this.entries.length);
    await eachOf(
      this.entries,
      2,
      async (entry) => {
        const { file, line } = entry;
        const [state, bar, act] = [".state", "progress", ".act"].map((each) => /** @type {HTMLElement} */ (line.querySelector(each)));
        line.className = "busy";
        state.textContent = "Starting …";
        act.replaceChildren();
        try {
          const { format, preview } = await patiently(() => api.look(file), signal);
          if (line.querySelector("img.unknown")) await this.picture(line, api.fromBase64(preview, "image/webp"));
          const own = { ...fields, image: file, count: 1, format };
          const { results } = await patiently(
            () =>
              api.edit(own, signal, (_name, news) => {
                state.textContent = progressWords(news);
                Object.assign(bar, { value: news.step / news.steps });
              }),
            signal,
          );
          entry.result = await api.readBlob(results[0].url, signal);
          entry.name = editedName(file.name, format);
          state.textContent = "Done";
          Object.assign(bar, { value: 1 });
          line.className = "done";
          const save = make("button", { type: "button", className: "icon", "aria-label": `Download ${entry.name}` }, icon("down"));
          save.addEventListener("click", () => this.save(entry));
          act.append(save);
          await this.picture(line, entry.result);
          done++;
        } catch (error) {
          if (signal.aborted) {
            state.textContent = "Stopped";
            line.className = "";
            return;
          }
          failed++;
          line.className = "failed";
          state.textContent = /** @type {Error} */ (error).message;
        }
        tell(done, failed, this.entries.length);
        this.update();
      },
      signal,
    );
  }

  /** Whether any result was not downloaded yet. */
  get unsaved() {
    return this.entries.some((entry) => entry.result && !entry.saved);
  }

  /** @param {Entry} entry */
  save(entry) {
    if (entry.result) saveFile(entry.result, entry.name);
    entry.saved = true;
  }

  async zip() {
    const made = this.entries.filter((entry) => entry.result);
    const names = distinct(made.map((entry) => entry.name));
    const files = await Promise.all(
      made.map(async (entry, k) => ({
        name: names[k],
        data: new Uint8Array(await /** @type {Blob} */ (entry.result).arrayBuffer()),
      })),
    );
    saveFile(new Blob(zipParts(files), { type: "application/zip" }), "edited.zip");
    for (const entry of made) entry.saved = true;
  }
}
