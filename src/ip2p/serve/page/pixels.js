// Pixel and view calculations. Pure functions.

export const UNCHANGED = 1.5; // mean difference (0 to 255) below which an edit is not visible

/**
 * The mean difference of two pictures of the same size, 0 to 255.
 * @param {Uint8ClampedArray} a RGBA @param {Uint8ClampedArray} b RGBA
 */
export function difference(a, b) {
  let sum = 0;
  for (let k = 0; k < a.length; k += 4) {
    sum += Math.abs(a[k] - b[k]) + Math.abs(a[k + 1] - b[k + 1]) + Math.abs(a[k + 2] - b[k + 2]);
  }
  return sum / ((a.length / 4) * 3);
}

/** Swap painted and unpainted pixels, in place. @param {Uint8ClampedArray} rgba */
export function invertAlpha(rgba) {
  for (let k = 3; k < rgba.length; k += 4) rgba[k] = 255 - rgba[k];
  return rgba;
}

/** Convert paint to the API's mask format: white where it is painted, else black. @param {Uint8ClampedArray} rgba */
export function alphaToMask(rgba) {
  const mask = new Uint8ClampedArray(rgba.length);
  for (let k = 0; k < rgba.length; k += 4) {
    const on = rgba[k + 3] > 127 ? 255 : 0;
    mask[k] = mask[k + 1] = mask[k + 2] = on;
    mask[k + 3] = 255;
  }
  return mask;
}

/** Convert a mask to paint: opaque where the mask is white. @param {Uint8ClampedArray} rgba */
export function maskToAlpha(rgba) {
  const paint = new Uint8ClampedArray(rgba.length).fill(255);
  for (let k = 0; k < rgba.length; k += 4) paint[k + 3] = rgba[k] > 127 ? 255 : 0;
  return paint;
}

/** Whether anything is painted. @param {Uint8ClampedArray} rgba */
export function anyPaint(rgba) {
  for (let k = 3; k < rgba.length; k += 4) if (rgba[k] > 127) return true;
  return false;
}

/**
 * How a picture is placed in its frame: the scale, and the position of its top left corner.
 * @typedef {{ scale: number, x: number, y: number }} View
 * @typedef {{ width: number, height: number }} Size
 */

/** The view that shows the whole picture, centered. @param {Size} frame @param {Size} picture @returns {View} */
export function fitted(frame, picture) {
  const scale = Math.min(frame.width / picture.width, frame.height / picture.height);
  return {
    scale,
    x: (frame.width - picture.width * scale) / 2,
    y: (frame.height - picture.height * scale) / 2,
  };
}

/**
 * Zoom the view around the point (x, y) of the frame. The minimum scale shows the whole picture; the maximum
 * is 32 screen pixels per picture pixel.
 * @param {View} view @param {number} factor @param {number} x @param {number} y
 * @param {Size} frame @param {Size} picture
 */
export function zoomed(view, factor, x, y, frame, picture) {
  const least = fitted(frame, picture).scale;
  const scale = Math.min(Math.max(view.scale * factor, least), Math.max(32, least));
  const by = scale / view.scale;
  return bounded({ scale, x: x - (x - view.x) * by, y: y - (y - view.y) * by }, frame, picture);
}

/** Move the view so that there is no gap that the picture could fill. @param {View} view @param {Size} frame @param {Size} picture */
export function bounded(view, frame, picture) {
  /** @param {number} at @param {number} room @param {number} length */
  const along = (at, room, length) =>
    length <= room ? (room - length) / 2 : Math.min(0, Math.max(room - length, at));
  return {
    scale: view.scale,
    x: along(view.x, frame.width, picture.width * view.scale),
    y: along(view.y, frame.height, picture.height * view.scale),
  };
}
