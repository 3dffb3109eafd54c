// Texts of the page, and small parsers. Pure functions.

/** 8.2 → "9 s", 100 → "2 min". @param {number} seconds */
export function duration(seconds) {
  const whole = Math.max(1, Math.ceil(seconds));
  return whole < 100 ? `${whole} s` : `${Math.round(whole / 60)} min`;
}

/** text_cfg_rescale → "Text CFG rescale". @param {string} name */
export function titleOf(name) {
  const words = name.replaceAll("_", " ").replace(/\bcfg\b/g, "CFG");
  return words[0].toUpperCase() + words.slice(1);
}

/**
 * The progress of an edit as text.
 * @param {{ state: string, position: number, step: number, steps: number, seconds_left: number | null }} news
 */
export function progressWords(news) {
  if (news.state === "waiting") return news.position ? `Waiting (${news.position} ahead of you)` : "Waiting";
  const left = news.seconds_left === null ? "" : ` · about ${duration(news.seconds_left)} left`;
  return `Step ${news.step} of ${news.steps}${left}`;
}

/** The file name of a result: holiday.jpg → holiday-edited.jpg. @param {string} source @param {string} format */
export function editedName(source, format) {
  const stem = source.replace(/\.[^.]*$/, "").replace(/-edited(-\d+)?$/, "") || "picture";
  const own = /\.(jpe?g|png|webp)$/i.exec(source)?.[0].toLowerCase();
  const usual = { jpeg: ".jpg", png: ".png", webp: ".webp" }[format] ?? ".png";
  const kept = own && (own.startsWith(".jp") ? ".jpg" : own) === usual ? own : usual;
  return `${stem}-edited${kept}`;
}

/** Make names unique: the second "a.png" becomes "a-2.png". @param {string[]} names */
export function distinct(names) {
  const taken = new Set();
  return names.map((name) => {
    const [, stem, ending] = /^(.*?)(\.[^.]*)?$/s.exec(name) ?? ["", name, ""];
    let own = name;
    for (let k = 2; taken.has(own.toLowerCase()); k++) own = `${stem}-${k}${ending ?? ""}`;
    taken.add(own.toLowerCase());
    return own;
  });
}

/**
 * Parse numbers separated by spaces or commas. Throws an Error that explains the expected input.
 * @param {string} text @param {string} label @param {number} low @param {number} high
 */
export function readNumbers(text, label, low, high) {
  const words = text.split(/[\s,;]+/).filter(Boolean);
  const numbers = words.map(Number);
  const wrong = words.find((_, k) => !(numbers[k] >= low && numbers[k] <= high));
  if (wrong !== undefined) throw new Error(`${label}: “${wrong}” is not a number from ${low} to ${high}.`);
  if (!words.length) throw new Error(`${label} has no values. Enter values such as 3 4 6.`);
  if (words.length > 8) throw new Error(`${label} has ${words.length} values; the maximum is 8.`);
  return [...new Set(numbers)];
}

/** The main settings of a result, in one line. @param {string} infotext */
export function factsOf(infotext) {
  const names = { "CFG scale": "edit strength", "Image CFG scale": "keep original", Seed: "seed", Steps: "steps" };
  const line = infotext.split("\n").at(-1) ?? "";
  return Object.entries(names)
    .map(([name, shown]) => [shown, new RegExp(`(?:^|, )${name}: ([^,]+)`).exec(line)?.[1]])
    .filter(([, value]) => value)
    .map((pair) => pair.join(" "))
    .join(" · ");
}

/** Scale a size down to at most `pixels`, with the same aspect ratio. @param {number} width @param {number} height @param {number} pixels */
export function within(width, height, pixels) {
  const share = Math.min(1, Math.sqrt(pixels / (width * height)));
  return { width: Math.max(1, Math.floor(width * share)), height: Math.max(1, Math.floor(height * share)) };
}

/**
 * Suggestions for a picture, without duplicates and without instructions that were used already. sure: those
 * known to suit the picture; general: those that suit the model and any picture.
 * @param {string[]} known @param {string[]} any @param {string[]} done
 */
export function ideas(known, any, done) {
  const sure = [...new Set(known)].filter((each) => !done.includes(each));
  const general = [...new Set(any)].filter((each) => !done.includes(each) && !sure.includes(each));
  return { sure, general };
}

/** A random text, different from `last` if possible. @param {string[]} texts @param {string} last */
export function anyOf(texts, last) {
  const others = texts.filter((each) => each !== last);
  const from = others.length ? others : texts;
  return from[Math.floor(Math.random() * from.length)];
}

/** @param {number} bytes */
export function size(bytes) {
  return bytes < 1e6 ? `${Math.ceil(bytes / 1e3)} kB` : `${(bytes / 1e6).toFixed(1)} MB`;
}

/**
 * Parse server-sent events. rest: an incomplete event at the end of the text.
 * @param {string} text @returns {{ events: { name: string, data: any }[], rest: string }}
 */
export function readEvents(text) {
  const blocks = text.split("\n\n");
  const rest = blocks.pop() ?? "";
  const events = blocks.map((block) => {
    let name = "message";
    let data = "";
    for (const line of block.split("\n")) {
      if (line.startsWith("event: ")) name = line.slice(7);
      if (line.startsWith("data: ")) data += line.slice(6);
    }
    return { name, data: JSON.parse(data || "null") };
  });
  return { events, rest };
}
