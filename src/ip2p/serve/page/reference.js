// The sections of the page at /docs, from the OpenAPI schema. Pure functions.

/** @type {Record<string, string>} */
const TITLES = {
  edits: "Edits",
  openai: "OpenAI-compatible",
  a1111: "AUTOMATIC1111-compatible",
  server: "Server",
};

/**
 * @typedef {{ name: string, type: string, fallback: string, words: string }} Row
 * @typedef {{ head: string, summary: string, words: string, types: string[], rows: Row[] }} Operation
 */

/** All operations, grouped by API. @param {any} schema @returns {{ title: string, operations: Operation[] }[]} */
export function sectionsOf(schema) {
  /** @type {Record<string, Operation[]>} */
  const byTag = Object.fromEntries(Object.keys(TITLES).map((tag) => [tag, []]));
  for (const [path, operations] of Object.entries(schema.paths)) {
    for (const [method, operation] of Object.entries(operations)) {
      (byTag[operation.tags?.at(-1) ?? "server"] ??= []).push(operationOf(path, method, operation));
    }
  }
  return Object.entries(byTag)
    .filter(([, operations]) => operations.length)
    .map(([tag, operations]) => ({ title: TITLES[tag] ?? tag, operations }));
}

/** @param {string} path @param {string} method @param {any} operation @returns {Operation} */
function operationOf(path, method, operation) {
  const rows = (operation.parameters ?? []).map((/** @type {any} */ each) =>
    rowOf(each.name, each.schema ?? {}, each.required, `in the ${each.in}`),
  );
  const contents = Object.entries(operation.requestBody?.content ?? {});
  const body = contents[0]?.[1].schema; // a form has the same fields as JSON
  for (const [name, field] of Object.entries(body?.properties ?? {})) {
    rows.push(rowOf(name, field, body.required?.includes(name), ""));
  }
  const { summary = "", description = "" } = operation;
  return { head: `${method.toUpperCase()} ${path}`, summary, words: description, types: contents.map(([type]) => type), rows };
}

/** @param {string} name @param {any} field @param {boolean} required @param {string} place @returns {Row} */
function rowOf(name, field, required, place) {
  const own = field.default ?? null;
  return {
    name,
    type: [typeOf(field), rangeOf(field)].filter(Boolean).join(", "),
    fallback: required ? "required" : own === null ? "" : JSON.stringify(own),
    words: [field.description, place].filter(Boolean).join(" "),
  };
}

/** A range as text, such as "1 to 150"; empty without bounds. @param {any} field @returns {string} */
export function rangeOf(field) {
  const { minimum: low, maximum } = [field, ...(field.anyOf ?? [])].find((each) => "minimum" in each || "maximum" in each) ?? {};
  const high = maximum > Number.MAX_SAFE_INTEGER ? undefined : maximum; // too large to be a practical limit
  if (low === undefined && high === undefined) return "";
  if (high === undefined) return `at least ${low}`;
  return low === undefined ? `at most ${high}` : `${low} to ${high}`;
}

/** A type as text. @param {any} field @returns {string} */
export function typeOf(field) {
  if (field.anyOf) {
    const kinds = field.anyOf.filter((/** @type {any} */ each) => each.type !== "null").map(typeOf);
    return [...new Set(kinds.filter(Boolean))].join(" or ");
  }
  if (field.enum) return field.enum.join(" or ");
  if (field.const !== undefined) return String(field.const);
  if (field.type === "array") {
    const inner = typeOf(field.items ?? field.prefixItems?.[0] ?? {});
    return `list${field.minItems && field.minItems === field.maxItems ? ` of ${field.minItems}` : ""}${inner ? ` (${inner})` : ""}`;
  }
  if (field.format === "binary" || field.format === "picture") return "file";
  return field.type ?? "";
}
