// Limited concurrency and retries.

/**
 * Call `work` for each item, at most `most` at once. No new calls start after an abort.
 * @template T @param {T[]} items @param {number} most @param {(item: T, number: number) => Promise<void>} work
 * @param {AbortSignal} [signal]
 */
export async function eachOf(items, most, work, signal) {
  let next = 0;
  async function worker() {
    while (next < items.length && !signal?.aborted) {
      const number = next++;
      await work(items[number], number);
    }
  }
  await Promise.all(Array.from({ length: Math.min(most, items.length) }, worker));
}

/**
 * Retry while the server is busy, after the delay that it asks for.
 * @template T @param {() => Promise<T>} work @param {AbortSignal} signal @param {number} [tries]
 * @returns {Promise<T>}
 */
export async function patiently(work, signal, tries = 20) {
  for (let k = 1; ; k++) {
    try {
      return await work();
    } catch (error) {
      const { retry } = /** @type {{ retry?: number | null }} */ (error);
      if (!retry || k >= tries || signal.aborted) throw error;
      await new Promise((resolve) => setTimeout(resolve, retry * 1000));
    }
  }
}
