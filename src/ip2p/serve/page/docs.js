// The page at /docs: all API operations and their fields, from the OpenAPI schema.

import { el, make } from "./dom.js";
import { sectionsOf } from "./reference.js";

const schema = await (await fetch("openapi.json")).json();
el("title").textContent = `${schema.info.title} ${schema.info.version}`;
for (const { title, operations } of sectionsOf(schema)) {
  el("operations").append(make("h2", {}, title));
  for (const { head, summary, words, types, rows } of operations) {
    const about = make("details", {}, make("summary", {}, make("code", {}, head), ` ${summary}`));
    if (words) about.append(make("p", {}, words));
    if (types.length) about.append(make("p", {}, "Body: ", make("code", {}, types.join(" or "))));
    const titles = ["Field", "Type", "Default", "Description"].map((text) => make("th", { scope: "col" }, text));
    const table = make("table", {}, make("tr", {}, ...titles));
    for (const row of rows) {
      const name = make("th", { scope: "row" }, make("code", {}, row.name));
      const cells = [row.type, row.fallback, row.words].map((text) => make("td", {}, text));
      table.append(make("tr", {}, name, ...cells));
    }
    if (rows.length) about.append(table);
    el("operations").append(about);
  }
}
document.body.dataset.ready = "";
