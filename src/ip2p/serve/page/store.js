// State that survives a reload, in IndexedDB: steps with their pictures, and the state of the page.

const NAME = "ip2p";

/** @type {Promise<IDBDatabase> | null} */
let opened = null;

function open() {
  opened ??= new Promise((resolve, reject) => {
    const request = indexedDB.open(NAME, 1);
    request.onupgradeneeded = () => {
      request.result.createObjectStore("steps", { keyPath: "id" });
      request.result.createObjectStore("page");
    };
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
    request.onblocked = () => reject(new Error("another tab blocks it"));
  });
  return opened;
}

/** @param {"readonly" | "readwrite"} mode @param {(steps: IDBObjectStore, page: IDBObjectStore) => void} work */
async function within(mode, work) {
  const database = await open();
  await new Promise((resolve, reject) => {
    const change = database.transaction(["steps", "page"], mode);
    change.oncomplete = () => resolve(undefined);
    change.onerror = change.onabort = () => reject(change.error);
    work(change.objectStore("steps"), change.objectStore("page"));
  });
}

/** Load the saved state. @returns {Promise<{ steps: any[], page: any, candidates: any[] }>} */
export async function load() {
  /** @type {IDBRequest<any[]> | undefined} */
  let steps;
  /** @type {IDBRequest<any> | undefined} */
  let page;
  /** @type {IDBRequest<any> | undefined} */
  let candidates;
  await within("readonly", (a, b) => {
    steps = a.getAll();
    page = b.get("page");
    candidates = b.get("candidates");
  });
  return { steps: steps?.result ?? [], page: page?.result ?? null, candidates: candidates?.result ?? [] };
}

/**
 * Save steps and the state of the page, and delete steps. candidates: pass them only if they changed, because
 * their pictures are large.
 * @param {any[]} put @param {string[]} gone @param {any} state @param {any[]} [candidates]
 */
export const save = (put, gone, state, candidates) =>
  within("readwrite", (steps, page) => {
    for (const step of put) steps.put(step);
    for (const id of gone) steps.delete(id);
    page.put(state, "page");
    if (candidates) page.put(candidates, "candidates");
  });

export const clear = () =>
  within("readwrite", (steps, page) => {
    steps.clear();
    page.clear();
  });
