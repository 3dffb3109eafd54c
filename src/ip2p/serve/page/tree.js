// The history: a forest of steps. Every function takes a tree and returns a new one.

/**
 * A picture, and how it was made from its parent.
 * @typedef {object} Step
 * @property {string} id
 * @property {string | null} parent
 * @property {number} made  milliseconds; orders the steps
 * @property {string} title
 */
/**
 * @template {Step} S
 * @typedef {object} Tree
 * @property {Record<string, S>} steps
 * @property {string | null} at  the current step
 * @property {Record<string, string>} last  by step: the child that redo goes to
 */

export const KEPT = 60;

/** @returns {Tree<any>} */
export const emptyTree = () => ({ steps: {}, at: null, last: {} });

/** Add a step and make it current. @template {Step} S @param {Tree<S>} tree @param {S} step */
export function addStep(tree, step) {
  return goTo({ ...tree, steps: { ...tree.steps, [step.id]: step } }, step.id);
}

/** Make another step current. From its ancestors, redo leads to it. @template {Step} S @param {Tree<S>} tree @param {string} id */
export function goTo(tree, id) {
  if (!tree.steps[id]) return tree;
  const last = { ...tree.last };
  let step = tree.steps[id];
  while (step && step.parent) {
    last[step.parent] = step.id;
    step = tree.steps[step.parent];
  }
  return { ...tree, at: id, last };
}

/** @template {Step} S @param {Tree<S>} tree @returns {S | null} */
export const current = (tree) => (tree.at ? (tree.steps[tree.at] ?? null) : null);

/** The current step and its ancestors. @template {Step} S @param {Tree<S>} tree @returns {S[]} */
export function path(tree) {
  const steps = [];
  for (let step = current(tree); step; step = step.parent ? (tree.steps[step.parent] ?? null) : null) steps.push(step);
  return steps;
}

/** The step that undo goes to, or null. @param {Tree<Step>} tree */
export function undoTarget(tree) {
  const parent = current(tree)?.parent;
  return parent && tree.steps[parent] ? parent : null;
}

/** The step that redo goes to, or null. @param {Tree<Step>} tree */
export function redoTarget(tree) {
  const next = tree.at ? tree.last[tree.at] : undefined;
  return next && tree.steps[next] ? next : null;
}

/** Go back one step. Redo goes forward again. @template {Step} S @param {Tree<S>} tree */
export function undo(tree) {
  const target = undoTarget(tree);
  return target ? { ...tree, at: target } : tree;
}

/** @template {Step} S @param {Tree<S>} tree */
export function redo(tree) {
  const target = redoTarget(tree);
  return target ? { ...tree, at: target } : tree;
}

/**
 * The steps in display order, each with its indentation: branches come indented right below the step that they
 * start from, followed by the first child of that step.
 * @template {Step} S @param {Tree<S>} tree @returns {{ step: S, depth: number }[]}
 */
export function rows(tree) {
  /** @type {Record<string, S[]>} */
  const children = {};
  for (const step of Object.values(tree.steps).sort((a, b) => a.made - b.made)) {
    (children[step.parent ?? ""] ??= []).push(step);
  }
  /** @type {{ step: S, depth: number }[]} */
  const found = [];
  const todo = (children[""] ?? []).map((step) => ({ step, depth: 0 })).reverse();
  for (let next = todo.pop(); next; next = todo.pop()) {
    found.push(next);
    const { depth } = next;
    const own = children[next.step.id] ?? [];
    todo.push(...own.map((step, k) => ({ step, depth: k ? depth + 1 : depth })).sort((a, b) => a.depth - b.depth));
  }
  return found;
}

/**
 * Remove the oldest steps. gone: their ids. The current step stays. The children of a removed step move to its
 * parent.
 * @template {Step} S @param {Tree<S>} tree @param {number} [kept] @returns {{ tree: Tree<S>, gone: string[] }}
 */
export function prune(tree, kept = KEPT) {
  const steps = { ...tree.steps };
  const gone = [];
  for (const old of Object.values(steps).sort((a, b) => a.made - b.made)) {
    if (Object.keys(steps).length <= kept) break;
    if (old.id === tree.at) continue;
    const { parent } = steps[old.id];
    delete steps[old.id];
    gone.push(old.id);
    for (const step of Object.values(steps)) {
      if (step.parent === old.id) steps[step.id] = { ...step, parent };
    }
  }
  const last = Object.fromEntries(
    Object.entries(tree.last).filter(([from, to]) => steps[from] && steps[to]),
  );
  return { tree: { ...tree, steps, last }, gone };
}
