// Descriptions of form controls, from the API's JSON schema. Pure functions.

import { titleOf } from "./words.js";

/**
 * The control of one setting.
 * @typedef {object} Field
 * @property {string} name
 * @property {string} label
 * @property {string} help
 * @property {string} group
 * @property {"number" | "integer" | "choice" | "flag" | "text" | "pair" | "picture"} kind
 * @property {number} [min]
 * @property {number} [max]
 * @property {string[]} [choices]
 * @property {unknown} fallback  the API's default
 */

// Fields that the page sets itself.
const OURS = new Set([
  ...["image", "mask", "instruction", "model", "format", "quality", "response", "stream", "previews", "wait"],
]);

const OTHER = "Other options"; // for fields without a group in the schema

/** Sort fields: those in `first` in that order, then the others, with fields without a group last. @param {Field[]} fields @param {string[]} first */
export function inOrder(fields, first) {
  /** @param {Field} field */
  const rank = ({ name, group }) => {
    const place = first.indexOf(name);
    return place >= 0 ? place : first.length + Number(group === OTHER);
  };
  return [...fields].sort((a, b) => rank(a) - rank(b));
}

/** The fields that the user can set, from the JSON schema of an edit. @param {any} schema @returns {Field[]} */
export function fieldsOf(schema) {
  return Object.entries(schema.properties)
    .filter(([name]) => !OURS.has(name))
    .map(([name, found]) => fieldOf(name, found));
}

/** @param {string} name @param {any} found @returns {Field} */
function fieldOf(name, found) {
  const kinds = (found.anyOf ?? [found]).filter((/** @type {any} */ each) => each.type !== "null");
  const [first] = kinds;
  /** @type {Field} */
  const field = {
    name,
    label: titleOf(name),
    help: found.description ?? "",
    group: found.group ?? OTHER,
    kind: "text",
    fallback: found.default ?? null,
  };
  if (first.format === "picture") return { ...field, kind: "picture" };
  if (kinds.length > 1) return field; // several types: a text field accepts all of them
  if (first.enum) return { ...field, kind: "choice", choices: first.enum };
  if (first.type === "boolean") return { ...field, kind: "flag" };
  const bounds = { min: first.minimum, max: first.maximum };
  if (first.type === "number" || first.type === "integer") return { ...field, ...bounds, kind: first.type };
  if (first.type === "array" && first.maxItems === 2) return { ...field, kind: "pair" };
  return field;
}

/**
 * Parse typed text as a value for the API; undefined if it is empty. Throws an Error that names the field.
 * @param {Field} field @param {string} text
 */
export function readField(field, text) {
  const words = text.trim();
  if (!words) return undefined;
  if (field.kind === "pair") {
    const pair = words.split(/[\s,]+/).map(Number);
    if (pair.length !== 2 || pair.some(Number.isNaN)) throw new Error(`${field.label} needs two numbers, such as 0.2 0.9.`);
    return pair;
  }
  if (field.kind !== "number" && field.kind !== "integer") return words;
  const value = Number(words);
  const { min = -Infinity, max = Infinity } = field;
  if (Number.isNaN(value) || value < min || value > max || (field.kind === "integer" && !Number.isInteger(value))) {
    const whole = field.kind === "integer" ? "a whole number" : "a number";
    throw new Error(`${field.label} is ${words}; it must be ${whole} from ${field.min} to ${field.max}.`);
  }
  return value;
}

/** Format a value for a form field. @param {unknown} value */
export const written = (value) =>
  value === null || value === undefined ? "" : Array.isArray(value) ? value.join(" ") : String(value);

/**
 * The settings from a file that the page has fields for, without the model's defaults, but always with the seed.
 * @param {Record<string, unknown>} settings @param {Field[]} fields @param {Record<string, unknown>} defaults
 */
export function adopted(settings, fields, defaults) {
  /** @type {Record<string, unknown>} */
  const found = {};
  for (const { name, kind } of fields) {
    const value = settings[name];
    if (kind === "picture" || value === null || value === undefined) continue;
    if (name !== "seed" && JSON.stringify(value) === JSON.stringify(defaults[name])) continue;
    found[name] = name === "size" && Array.isArray(value) ? value.join("x") : value;
  }
  return found;
}
