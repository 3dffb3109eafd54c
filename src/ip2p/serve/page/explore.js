// Explore mode: a grid over edit strength and keep original, with one full edit per cell.

import * as api from "./api.js";
import { el, input, make } from "./dom.js";
import { eachOf, patiently } from "./pool.js";
import { readNumbers } from "./words.js";

/** @typedef {{ text_cfg: number, image_cfg: number, blob: Blob, infotext: string, seed: number }} Cell */

export class Explore {
  /** @param {(cell: Cell) => void} adopt  called when a cell is chosen */
  constructor(adopt) {
    this.adopt = adopt;
    /** @type {string[]} */
    this.urls = [];
  }

  /** Fill in the model's values worth comparing. @param {{ text_cfg: number[], image_cfg: number[] }} values */
  suggest(values) {
    input("columns").value = values.text_cfg.join(" ");
    input("rows").value = values.image_cfg.join(" ");
  }

  /**
   * Run the edits of the grid. Throws the error of a cell that fails.
   * @param {Record<string, unknown>} fields @param {AbortSignal} signal @param {(done: number, all: number) => void} tell
   */
  async run(fields, signal, tell) {
    const columns = readNumbers(input("columns").value, "Edit strength", 0, 100);
    const rows = readNumbers(input("rows").value, "Keep original", 0, 100);
    const cells = this.lay(columns, rows);
    let done = 0;
    tell(0, cells.length);
    await eachOf(
      cells,
      2,
      async ({ text_cfg, image_cfg, box }) => {
        box.classList.add("busy");
        const own = { ...fields, text_cfg, image_cfg, count: 1 };
        const { results } = await patiently(() => api.edit(own, signal), signal);
        const [result] = results;
        const blob = await api.readBlob(result.url, signal);
        this.fill(box, { text_cfg, image_cfg, blob, infotext: result.settings, seed: result.seed });
        tell(++done, cells.length);
      },
      signal,
    );
  }

  /** @param {number[]} columns @param {number[]} rows */
  lay(columns, rows) {
    for (const url of this.urls.splice(0)) URL.revokeObjectURL(url);
    const head = make("tr", {}, make("th", { scope: "col" }, "keep\u00a0↓", make("br"), "strength\u00a0→"));
    head.append(...columns.map((value) => make("th", { scope: "col" }, String(value))));
    const body = make("tbody");
    const cells = [];
    for (const image_cfg of rows) {
      const row = make("tr", {}, make("th", { scope: "row" }, String(image_cfg)));
      for (const text_cfg of columns) {
        const box = make("td");
        row.append(box);
        cells.push({ text_cfg, image_cfg, box });
      }
      body.append(row);
    }
    el("grid").style.setProperty("--columns", String(columns.length));
    el("grid").style.setProperty("--rows", String(rows.length));
    el("grid").replaceChildren(make("thead", {}, head), body);
    return cells;
  }

  /** @param {HTMLElement} box @param {Cell} cell */
  fill(box, cell) {
    const src = URL.createObjectURL(cell.blob);
    this.urls.push(src);
    const words = `Edit strength ${cell.text_cfg}, keep original ${cell.image_cfg}`;
    const choose = make("button", { type: "button", title: "Use these settings" }, make("img", { src, alt: words }));
    choose.addEventListener("click", () => this.adopt(cell));
    box.classList.remove("busy");
    box.replaceChildren(choose);
  }
}
