// The canvas: a picture before and after an edit, zoom and pan, and the mask.

import { button, el, image, input, make, pixelsOf, toBlob } from "./dom.js";
import { alphaToMask, anyPaint, bounded, fitted, invertAlpha, maskToAlpha, zoomed } from "./pixels.js";

const MOST = 2048; // maximum longer side of the mask while painting
const NEAR = 24; // distance in pixels within which a drag moves the divider
const PAINT = "rgb(255 64 48)";

/** @typedef {{ x: number, y: number }} Point */

export class Stage {
  /** @param {{ changed: () => void, announce: (words: string) => void }} events */
  constructor(events) {
    this.events = events;
    this.frame = el("view");
    this.sheet = el("sheet");
    this.before = image("before");
    this.after = image("after");
    this.divider = el("divider");
    this.paint = el("paint", HTMLCanvasElement);
    this.pen = /** @type {CanvasRenderingContext2D} */ (this.paint.getContext("2d", { willReadFrequently: true }));
    this.cursor = el("cursor");
    /** The size of the picture in pixels. */
    this.size = { width: 1, height: 1 };
    /** @type {import("./pixels.js").View} */
    this.view = { scale: 1, x: 0, y: 0 };
    this.split = 0.5; // position of the divider, as a fraction of the frame
    this.comparing = false;
    this.held = false; // whether only the picture before the edit is shown
    this.masking = false;
    this.erasing = false;
    this.painted = false;
    /** @type {Map<number, Point>} */
    this.pointers = new Map();
    /** @type {"divide" | "pan" | "paint" | "pinch" | null} */
    this.doing = null;
    /** @type {Point | null} */
    this.keys = null; // position of the brush when moved with arrow keys
    this.listen();
  }

  /**
   * Show a picture and, on top of it, the edited one.
   * @param {string} before @param {string} beforeWords @param {string | null} after @param {string} afterWords
   * @param {{ width: number, height: number }} size @param {{ compare?: boolean, soft?: boolean }} [how]
   *   compare: show the divider; soft: `after` is a small preview
   */
  show(before, beforeWords, after, afterWords, size, how = {}) {
    const other = size.width !== this.size.width || size.height !== this.size.height;
    this.size = size;
    if (this.before.getAttribute("src") !== before) this.before.src = before;
    this.before.alt = beforeWords;
    this.after.hidden = !after;
    if (after && this.after.getAttribute("src") !== after) this.after.src = after;
    this.after.alt = afterWords;
    this.after.classList.toggle("soft", Boolean(how.soft));
    this.comparing = Boolean(after && how.compare);
    if (other) this.clearMask();
    if (other || !this.fits) this.fit();
    else this.lay();
  }

  get fits() {
    return this.view.scale >= fitted(this.room, this.size).scale * 0.999;
  }

  get room() {
    return { width: this.frame.clientWidth || 1, height: this.frame.clientHeight || 1 };
  }

  fit() {
    this.view = fitted(this.room, this.size);
    this.lay();
  }

  /** @param {number} factor @param {Point} [at] */
  zoom(factor, at) {
    const { width, height } = this.room;
    const { x, y } = at ?? { x: width / 2, y: height / 2 };
    this.view = zoomed(this.view, factor, x, y, this.room, this.size);
    this.lay();
  }

  /** Update the layout from the view. */
  lay() {
    const { scale, x, y } = this.view;
    const { width } = this.room;
    Object.assign(this.sheet.style, {
      left: `${x}px`,
      top: `${y}px`,
      width: `${this.size.width * scale}px`,
      height: `${this.size.height * scale}px`,
    });
    this.sheet.classList.toggle("coarse", scale >= 4);
    const shown = this.comparing && !this.held && !this.masking;
    this.divider.hidden = !shown;
    const at = this.split * width;
    // The divider stays within the picture.
    const left = Math.min(Math.max(at, Math.max(0, x)), Math.min(width, x + this.size.width * scale));
    this.divider.style.left = `${left}px`;
    this.divider.setAttribute("aria-valuenow", String(Math.round(this.split * 100)));
    this.divider.setAttribute("aria-valuetext", `${Math.round(this.split * 100)}% before`);
    this.after.style.clipPath = shown ? `inset(0 0 0 ${left - x}px)` : "none";
    this.after.style.visibility = this.held || (this.masking && this.comparing) ? "hidden" : "visible";
    el("tag-before").hidden = !(shown || (this.held && !this.after.hidden));
    el("tag-after").hidden = !shown;
    this.paint.hidden = !(this.masking || this.painted);
    this.paint.classList.toggle("faint", !this.masking);
    this.frame.classList.toggle("masking", this.masking);
    this.layCursor();
  }

  /** Show only the picture before the edit, while a key or button is held. @param {boolean} on */
  hold(on) {
    this.held = on && !this.after.hidden;
    this.lay();
  }

  // --- the mask ---------------------------------------------------------------------------------

  /** @param {boolean} on */
  mask(on) {
    this.masking = on;
    if (on && (this.paint.width !== this.maskSize.width || this.paint.height !== this.maskSize.height)) this.clearMask();
    this.keys = null;
    this.lay();
  }

  get maskSize() {
    const share = Math.min(1, MOST / Math.max(this.size.width, this.size.height));
    return {
      width: Math.max(1, Math.round(this.size.width * share)),
      height: Math.max(1, Math.round(this.size.height * share)),
    };
  }

  clearMask() {
    Object.assign(this.paint, this.maskSize); // setting the size clears the canvas
    this.painted = false;
    this.lay();
    this.events.changed();
  }

  invertMask() {
    this.change(invertAlpha);
  }

  /** Use a picture as the mask: white is edited. @param {ImageBitmap} mask */
  takeMask(mask) {
    Object.assign(this.paint, this.maskSize);
    const { data } = pixelsOf(mask, this.paint.width, this.paint.height);
    this.change(() => maskToAlpha(data.data));
  }

  /** @param {(rgba: Uint8ClampedArray) => Uint8ClampedArray} how */
  change(how) {
    const { width, height } = this.paint;
    const alpha = how(this.pen.getImageData(0, 0, width, height).data);
    const data = new ImageData(width, height);
    for (let k = 0; k < alpha.length; k += 4) {
      [data.data[k], data.data[k + 1], data.data[k + 2], data.data[k + 3]] = [255, 64, 48, alpha[k + 3]];
    }
    this.pen.putImageData(data, 0, 0);
    this.painted = anyPaint(data.data);
    this.lay();
    this.events.changed();
  }

  /** The mask in the API's format, at the size of the picture; null if nothing is painted. */
  async maskFile() {
    if (!this.painted) return null;
    const { data } = pixelsOf(this.paint, this.size.width, this.size.height);
    const canvas = make("canvas", this.size);
    const pixels = new ImageData(alphaToMask(data.data), this.size.width, this.size.height);
    /** @type {CanvasRenderingContext2D} */ (canvas.getContext("2d")).putImageData(pixels, 0, 0);
    return toBlob(canvas);
  }

  /** The width of the brush in mask pixels. At least 3: a thinner one would not fully cover any pixel. */
  get brush() {
    const side = Math.max(this.paint.width, this.paint.height);
    return Math.max(3, (Number(input("brush-size").value) / 100) * side);
  }

  /** Paint from one point of the frame to another. @param {Point} from @param {Point} to */
  stroke(from, to) {
    const share = this.paint.width / (this.size.width * this.view.scale);
    const [a, b] = [from, to].map(({ x, y }) => ({ x: (x - this.view.x) * share, y: (y - this.view.y) * share }));
    Object.assign(this.pen, { lineWidth: this.brush, lineCap: "round", lineJoin: "round", strokeStyle: PAINT });
    this.pen.globalCompositeOperation = this.erasing ? "destination-out" : "source-over";
    this.pen.beginPath();
    this.pen.moveTo(a.x, a.y);
    this.pen.lineTo(b.x, b.y + 0.01); // a line of length 0 paints nothing
    this.pen.stroke();
    this.pen.globalCompositeOperation = "source-over";
  }

  /** Update the state after a stroke. */
  settle() {
    const { width, height } = this.paint;
    this.painted = anyPaint(this.pen.getImageData(0, 0, width, height).data);
    this.lay();
    this.events.changed();
  }

  layCursor() {
    const show = this.masking && this.keys;
    this.cursor.hidden = !show;
    if (!show || !this.keys) return;
    const side = (this.brush * this.size.width * this.view.scale) / this.paint.width;
    Object.assign(this.cursor.style, {
      left: `${this.keys.x - side / 2}px`,
      top: `${this.keys.y - side / 2}px`,
      width: `${side}px`,
      height: `${side}px`,
    });
  }

  // --- input ------------------------------------------------------------------------------------

  listen() {
    new ResizeObserver(() => {
      if (this.size.width > 1) this.fit();
    }).observe(this.frame);
    this.frame.addEventListener("pointerdown", (event) => this.down(event));
    this.frame.addEventListener("pointermove", (event) => this.move(event));
    for (const name of /** @type {const} */ (["pointerup", "pointercancel"])) {
      this.frame.addEventListener(name, (event) => this.up(event));
    }
    this.frame.addEventListener(
      "wheel",
      (event) => {
        event.preventDefault();
        this.zoom(Math.exp(-event.deltaY / (event.ctrlKey ? 100 : 400)), this.point(event));
      },
      { passive: false },
    );
    this.frame.addEventListener("keydown", (event) => this.key(event));
    this.divider.addEventListener("keydown", (event) => {
      const steps = { ArrowLeft: -0.05, ArrowDown: -0.05, ArrowRight: 0.05, ArrowUp: 0.05, PageDown: -0.2, PageUp: 0.2, Home: -1, End: 1 };
      const by = steps[/** @type {keyof typeof steps} */ (event.key)];
      if (by === undefined) return;
      event.preventDefault();
      event.stopPropagation();
      this.split = Math.min(1, Math.max(0, this.split + by));
      this.lay();
    });
    const compare = button("compare");
    for (const [on, names] of /** @type {const} */ ([[true, ["pointerdown"]], [false, ["pointerup", "pointerleave", "pointercancel", "blur"]]])) {
      for (const name of names) compare.addEventListener(name, () => this.hold(on));
    }
    for (const name of /** @type {const} */ (["keydown", "keyup"])) {
      compare.addEventListener(name, (event) => {
        if (event.key === " " || event.key === "Enter") this.hold(name === "keydown");
      });
    }
    button("zoom-in").addEventListener("click", () => this.zoom(1.5));
    button("zoom-out").addEventListener("click", () => this.zoom(1 / 1.5));
    button("zoom-fit").addEventListener("click", () => this.fit());
  }

  /** @param {MouseEvent} event @returns {Point} */
  point(event) {
    const frame = this.frame.getBoundingClientRect();
    return { x: event.clientX - frame.left, y: event.clientY - frame.top };
  }

  /** @param {PointerEvent} event */
  down(event) {
    if (event.button > 1) return;
    const at = this.point(event);
    this.frame.setPointerCapture(event.pointerId);
    this.pointers.set(event.pointerId, at);
    if (this.pointers.size > 1) {
      if (this.doing === "paint") this.settle();
      this.doing = "pinch";
    } else if (event.button === 1) this.doing = "pan";
    else if (this.masking) {
      this.doing = "paint";
      this.keys = null;
      this.stroke(at, at);
    } else if (!this.divider.hidden && (this.wholeShown || Math.abs(at.x - this.divider.offsetLeft) < NEAR)) {
      this.doing = "divide";
      this.divide(at);
    } else this.doing = "pan";
    if (event.pointerType === "mouse") event.preventDefault(); // prevents dragging the image
    this.frame.focus({ preventScroll: true });
  }

  get wholeShown() {
    return this.view.scale <= fitted(this.room, this.size).scale * 1.001;
  }

  /** @param {Point} at */
  divide(at) {
    this.split = Math.min(1, Math.max(0, at.x / this.room.width));
    this.lay();
  }

  /** @param {PointerEvent} event */
  move(event) {
    const from = this.pointers.get(event.pointerId);
    if (!from) return;
    const at = this.point(event);
    if (this.doing === "paint") this.stroke(from, at);
    else if (this.doing === "divide") this.divide(at);
    else if (this.doing === "pan") this.pan(at.x - from.x, at.y - from.y);
    else if (this.doing === "pinch") this.pinch(event.pointerId, at);
    this.pointers.set(event.pointerId, at);
  }

  /** @param {number} x @param {number} y */
  pan(x, y) {
    const { view } = this;
    this.view = bounded({ ...view, x: view.x + x, y: view.y + y }, this.room, this.size);
    this.lay();
  }

  /** Handle a pinch: zoom around the midpoint of two fingers, and pan with it. @param {number} id @param {Point} at */
  pinch(id, at) {
    const from = /** @type {Point} */ (this.pointers.get(id));
    const other = [...this.pointers].find(([each]) => each !== id)?.[1];
    if (!other) return;
    const length = (/** @type {Point} */ p) => Math.hypot(p.x - other.x, p.y - other.y) || 1;
    this.zoom(length(at) / length(from), { x: (at.x + other.x) / 2, y: (at.y + other.y) / 2 });
    this.pan((at.x - from.x) / 2, (at.y - from.y) / 2);
  }

  /** @param {PointerEvent} event */
  up(event) {
    if (!this.pointers.delete(event.pointerId)) return;
    if (this.doing === "paint") this.settle();
    if (!this.pointers.size) this.doing = null;
  }

  /** @param {KeyboardEvent} event */
  key(event) {
    if (event.target !== this.frame || event.ctrlKey || event.metaKey || event.altKey) return;
    const arrows = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
    const arrow = arrows[/** @type {keyof typeof arrows} */ (event.key)];
    if (event.key === "+" || event.key === "=") this.zoom(1.25);
    else if (event.key === "-") this.zoom(0.8);
    else if (event.key === "0") this.fit();
    else if (this.masking && arrow) this.moveKeys(arrow[0], arrow[1], event.shiftKey);
    else if (this.masking && event.key === " ") {
      this.keys ??= { x: this.room.width / 2, y: this.room.height / 2 };
      this.stroke(this.keys, this.keys);
      this.settle();
      this.events.announce(this.erasing ? "Erased" : "Painted");
    } else if (arrow && !this.wholeShown) this.pan(-40 * arrow[0], -40 * arrow[1]);
    else return;
    event.preventDefault();
  }

  /** Move the keyboard brush. With Shift, it paints along the way. @param {number} x @param {number} y @param {boolean} painting */
  moveKeys(x, y, painting) {
    const from = this.keys ?? { x: this.room.width / 2, y: this.room.height / 2 };
    const step = Math.max(4, (this.brush * this.size.width * this.view.scale) / this.paint.width / 2);
    this.keys = {
      x: Math.min(this.room.width, Math.max(0, from.x + x * step)),
      y: Math.min(this.room.height, Math.max(0, from.y + y * step)),
    };
    if (painting) {
      this.stroke(from, this.keys);
      this.settle();
    }
    this.layCursor();
  }
}
