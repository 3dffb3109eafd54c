// Client of the server's HTTP API, which docs/serve.md describes.

import { readEvents } from "./words.js";

/** An error with the server's message. status 0: no response. retry: seconds to wait before a retry, if known. */
export class ApiError extends Error {
  /** @param {string} message @param {number} status @param {{ field?: string | null, retry?: number }} [more] */
  constructor(message, status, more = {}) {
    super(message);
    this.status = status;
    this.field = more.field ?? null;
    this.retry = more.retry ?? null;
  }
}

/**
 * @typedef {{ seed: number, format: string, settings: string, url: string, mask?: string | null }} EditResult
 * @typedef {object} News
 * @property {string} state
 * @property {number} position
 * @property {number} step
 * @property {number} steps
 * @property {number | null} seconds_left
 * @property {string[]} warnings
 * @property {number} [result]
 * @property {string} [b64]
 * @property {EditResult[]} [results]
 */

const GONE = "The server is not responding.";

/** @param {string} path @param {RequestInit} [options] */
async function ask(path, options) {
  let response;
  try {
    response = await fetch(path, options);
  } catch (error) {
    if (options?.signal?.aborted) throw error;
    throw new ApiError(GONE, 0);
  }
  if (response.ok) return response;
  const body = await response.json().catch(() => ({}));
  const fault = body.error ?? {};
  // The page shows the message next to the picture, so the name of the API field adds nothing.
  const message = fault.message?.replace(/^image: /, "") ?? `The server returned an error (${response.status}).`;
  throw new ApiError(message, response.status, {
    field: fault.param,
    retry: Number(response.headers.get("retry-after")) || undefined,
  });
}

/** @param {string} path @returns {Promise<any>} */
export const read = async (path) => (await ask(path)).json();

/** @param {string} path @param {AbortSignal} [signal] */
export const readBlob = async (path, signal) => (await ask(path, { signal })).blob();

/** @param {Record<string, unknown>} fields */
function form(fields) {
  const data = new FormData();
  for (const [name, value] of Object.entries(fields)) {
    if (value === null || value === undefined) continue;
    if (value instanceof Blob) data.append(name, value, "picture");
    else data.append(name, Array.isArray(value) ? value.join(" ") : String(value));
  }
  return data;
}

/** Information about a picture file. @param {Blob} image @returns {Promise<any>} */
export const look = async (image) =>
  (await ask("v1/pictures", { method: "POST", body: form({ image, side: 2048 }) })).json();

/** Convert a picture to another format, with its settings as metadata. @param {Blob} image @param {string} format */
export const convert = async (image, format) =>
  (await ask("v1/pictures", { method: "POST", body: form({ image, convert: format }) })).blob();

/**
 * Run an edit and return its results. tell: called with every progress event.
 * @param {Record<string, unknown>} fields @param {AbortSignal} signal @param {(name: string, news: News) => void} [tell]
 * @returns {Promise<News & { results: EditResult[] }>}
 */
export async function edit(fields, signal, tell = () => {}) {
  const body = form({ ...fields, stream: true, response: "url" });
  const response = await ask("v1/edits", { method: "POST", body, signal });
  if (!response.body) throw new ApiError(GONE, 0);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) throw new ApiError("The connection was lost before the edit was done.", 0);
      const { events, rest } = readEvents(text + value);
      text = rest;
      for (const { name, data } of events) {
        if (name === "done") return data;
        if (name === "failed") throw new ApiError(data.error.message, 500, { field: data.error.param });
        if (name === "cancelled") throw new DOMException("stopped", "AbortError");
        tell(name, data);
      }
    }
  } catch (error) {
    if (error instanceof TypeError && !signal.aborted) throw new ApiError(GONE, 0);
    throw error;
  }
}

/** Whether an error means that the user stopped the edit. @param {unknown} error */
export const stopped = (error) => error instanceof DOMException && error.name === "AbortError";

/** Decode base64 to a Blob. @param {string} text @param {string} type */
export function fromBase64(text, type) {
  const bytes = Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
  return new Blob([bytes], { type });
}
