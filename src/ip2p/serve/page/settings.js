// The settings panel, built from the schema: two sliders on top, everything else below.

import { inOrder, readField, written } from "./fields.js";

/** @typedef {import("./fields.js").Field} Field */

/** Labels and help texts of the settings on top. @type {Record<string, { label: string, help: string }>} */
const FRONT = {
  text_cfg: { label: "Edit strength", help: "How strongly the model follows the instruction (text CFG)" },
  image_cfg: { label: "Keep original", help: "How strongly the model keeps the picture (image CFG)" },
  count: { label: "Candidates", help: "Number of results, each with its own seed" },
  seed: { label: "Seed", help: "−1 is random. The same seed repeats a result" },
};
/** Defaults of the page. @type {Record<string, unknown>} */
const PAGE = { count: 4, seed: -1 };

export class Settings {
  /**
   * @param {HTMLElement} front @param {HTMLElement} more @param {() => void} changed  called when the user changes a setting
   */
  constructor(front, more, changed) {
    this.front = front;
    this.more = more;
    this.changed = changed;
    /** @type {Field[]} */
    this.fields = [];
    /** @type {Record<string, any>} */
    this.defaults = {};
    /** The values that differ from the defaults. @type {Record<string, unknown>} */
    this.values = {};
    /** @type {Record<string, (value: unknown) => void>} */
    this.show = {};
    /** @type {Record<string, string>} */
    this.wrong = {};
  }

  /** Build the controls. @param {Field[]} fields @param {Record<string, any>} defaults  of the model */
  build(fields, defaults) {
    this.fields = fields;
    this.defaults = { ...PAGE, ...defaults };
    this.front.replaceChildren();
    this.more.replaceChildren();
    /** @type {Record<string, HTMLElement>} */
    const groups = {};
    for (const field of inOrder(fields, Object.keys(FRONT))) {
      if (FRONT[field.name]) {
        this.front.append(this.control({ ...field, ...FRONT[field.name] }));
        continue;
      }
      if (!groups[field.group]) {
        const group = (groups[field.group] = document.createElement("fieldset"));
        const legend = document.createElement("legend");
        legend.textContent = field.group;
        group.append(legend);
        this.more.append(group);
      }
      groups[field.group].append(this.control(field));
    }
    this.set(this.values);
  }

  /** @param {string} name */
  value(name) {
    return this.values[name] ?? this.defaults[name];
  }

  /** Replace the chosen values. @param {Record<string, unknown>} values */
  set(values) {
    this.values = { ...values };
    this.wrong = {};
    for (const field of this.fields) this.show[field.name]?.(this.values[field.name]);
  }

  /** The settings for a request. Throws an Error if a field is invalid. @returns {Record<string, unknown>} */
  request() {
    const [wrong] = Object.values(this.wrong);
    if (wrong) throw new Error(wrong);
    return { ...PAGE, ...this.values };
  }

  /** @param {Field} field @param {unknown} value */
  choose(field, value) {
    if (value === undefined || value === this.defaults[field.name]) delete this.values[field.name];
    else this.values[field.name] = value;
    this.changed();
  }

  /** @param {Field} field */
  control(field) {
    const box = document.createElement("div");
    box.className = `field ${field.kind}`;
    const id = `set-${field.name}`;
    const label = document.createElement("label");
    label.htmlFor = id;
    label.textContent = field.label;
    const help = document.createElement("small");
    help.id = `${id}-help`;
    help.textContent = field.help.toLowerCase() === field.label.toLowerCase() ? "" : field.help;
    const own = this.defaults[field.name] ?? field.fallback;
    const input = document.createElement(field.kind === "choice" ? "select" : "input");
    input.id = id;
    input.setAttribute("aria-describedby", help.id);
    box.append(label, input, help);
    if (field.kind === "picture") this.picture(field, /** @type {HTMLInputElement} */ (input));
    else if (field.kind === "flag") this.flag(field, /** @type {HTMLInputElement} */ (input));
    else if (input instanceof HTMLSelectElement) this.choice(field, input, own);
    else this.typed(field, input, own, box);
    return box;
  }

  /** @param {Field} field @param {HTMLInputElement} input */
  picture(field, input) {
    input.type = "file";
    input.accept = "image/*";
    input.addEventListener("change", () => this.choose(field, input.files?.[0]));
    this.show[field.name] = (value) => {
      if (!value) input.value = "";
    };
  }

  /** @param {Field} field @param {HTMLInputElement} input */
  flag(field, input) {
    input.type = "checkbox";
    input.addEventListener("change", () => this.choose(field, input.checked));
    this.show[field.name] = (value) => {
      input.checked = Boolean(value ?? field.fallback);
    };
  }

  /** @param {Field} field @param {HTMLSelectElement} input @param {unknown} own */
  choice(field, input, own) {
    for (const choice of field.choices ?? []) {
      const option = new Option(choice === own ? `${choice} (default)` : choice, choice);
      input.append(option);
    }
    input.addEventListener("change", () => this.choose(field, input.value));
    this.show[field.name] = (value) => {
      input.value = written(value ?? own);
    };
  }

  /** @param {Field} field @param {HTMLInputElement} input @param {unknown} own @param {HTMLElement} box */
  typed(field, input, own, box) {
    const decimal = field.kind === "number" || field.kind === "integer";
    input.inputMode = decimal && (field.min ?? 0) >= 0 ? "decimal" : "text";
    input.placeholder = written(own) || "default";
    input.autocomplete = "off";
    const slider = field.name === "text_cfg" || field.name === "image_cfg" ? this.slider(field, Number(own), box) : null;
    input.addEventListener("input", () => {
      try {
        const value = readField(field, input.value);
        showProblem();
        slider?.(value);
        this.choose(field, value);
      } catch (error) {
        showProblem(/** @type {Error} */ (error).message);
      }
    });
    const help = /** @type {HTMLElement} */ (box.querySelector("small"));
    const usual = help.textContent;
    /** Show an error below the field, or remove it. */
    const showProblem = (wrong = "") => {
      if (wrong) this.wrong[field.name] = wrong;
      else delete this.wrong[field.name];
      help.textContent = wrong || usual;
      help.classList.toggle("wrong", Boolean(wrong));
      if (wrong) input.setAttribute("aria-invalid", "true");
      else input.removeAttribute("aria-invalid");
    };
    const front = field.name in FRONT;
    this.show[field.name] = (value) => {
      input.value = front ? written(value ?? own) : written(value);
      showProblem();
      slider?.(value);
    };
  }

  /**
   * Add a slider next to a number field, with a mark at the model's default.
   * @param {Field} field @param {number} own @param {HTMLElement} box
   */
  slider(field, own, box) {
    const range = document.createElement("input");
    range.type = "range";
    range.min = "0";
    range.max = String(Math.ceil(own * 2.5));
    range.step = own > 2 ? "0.5" : "0.05";
    range.setAttribute("aria-label", `${field.label}, slider`);
    const track = document.createElement("div");
    track.className = "track";
    const mark = document.createElement("button");
    mark.type = "button";
    mark.className = "mark";
    mark.textContent = `default ${own}`;
    mark.title = "Reset to the model's default";
    mark.style.setProperty("--at", String(own / Number(range.max)));
    mark.addEventListener("click", () => {
      this.choose(field, undefined);
      this.show[field.name](undefined);
    });
    track.append(range, mark);
    box.insertBefore(track, box.lastChild);
    range.addEventListener("input", () => {
      this.choose(field, Number(range.value));
      this.show[field.name](Number(range.value));
    });
    return (/** @type {unknown} */ value) => {
      range.value = String(value ?? own);
    };
  }
}
