// DOM helpers.

/** The element with an id. @template {HTMLElement} T @param {string} id @param {new () => T} [kind] @returns {T} */
export function el(id, kind) {
  const found = document.getElementById(id);
  if (!found || (kind && !(found instanceof kind))) throw new Error(`the page has no ${id}`);
  return /** @type {T} */ (found);
}

export const button = (/** @type {string} */ id) => el(id, HTMLButtonElement);
export const input = (/** @type {string} */ id) => el(id, HTMLInputElement);
export const image = (/** @type {string} */ id) => el(id, HTMLImageElement);

/**
 * Create an element with properties and children.
 * @template {keyof HTMLElementTagNameMap} K
 * @param {K} tag @param {Record<string, unknown>} [properties] @param {(Node | string)[]} children
 * @returns {HTMLElementTagNameMap[K]}
 */
export function make(tag, properties = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name.includes("-")) made.setAttribute(name, String(value));
    else Reflect.set(made, name, value);
  }
  made.append(...children);
  return made;
}

/** Create an icon from the sprite. @param {string} name */
export function icon(name) {
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  const use = document.createElementNS("http://www.w3.org/2000/svg", "use");
  use.setAttribute("href", `#i-${name}`);
  svg.append(use);
  return svg;
}

/** Download a file. @param {Blob} blob @param {string} name */
export function saveFile(blob, name) {
  const link = make("a", { href: URL.createObjectURL(blob), download: name });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60_000);
}

/** Whether an element uses key presses itself, as text fields and selects do. @param {EventTarget | null} target */
export function isText(target) {
  return (
    target instanceof HTMLTextAreaElement ||
    target instanceof HTMLSelectElement ||
    (target instanceof HTMLInputElement && !["range", "checkbox", "file", "button"].includes(target.type))
  );
}

/** Draw a picture at a size and return its pixels. @param {CanvasImageSource} source @param {number} width @param {number} height */
export function pixelsOf(source, width, height) {
  const canvas = make("canvas", { width, height });
  const pen = /** @type {CanvasRenderingContext2D} */ (canvas.getContext("2d", { willReadFrequently: true }));
  pen.drawImage(source, 0, 0, width, height);
  return { canvas, pen, data: pen.getImageData(0, 0, width, height) };
}

/** @param {HTMLCanvasElement} canvas @param {string} [type] @param {number} [quality] @returns {Promise<Blob>} */
export function toBlob(canvas, type = "image/png", quality = 0.95) {
  return new Promise((resolve, reject) => {
    canvas.toBlob((blob) => (blob ? resolve(blob) : reject(new Error("no picture"))), type, quality);
  });
}

/** A small copy for lists. @param {Blob} blob @param {number} [side] */
export async function thumbnail(blob, side = 160) {
  const bitmap = await createImageBitmap(blob);
  const share = Math.min(1, side / Math.max(bitmap.width, bitmap.height));
  const size = [bitmap.width, bitmap.height].map((length) => Math.max(1, Math.round(length * share)));
  const { canvas } = pixelsOf(bitmap, size[0], size[1]);
  bitmap.close();
  return toBlob(canvas, "image/webp", 0.85);
}
