// The page's pure logic, against values worked out by hand or by another program.

import assert from "node:assert/strict";
import { execFileSync } from "node:child_process";
import { mkdtempSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { test } from "node:test";

import { adopted, fieldsOf, inOrder, readField, written } from "../../src/ip2p/serve/page/fields.js";
import * as pixels from "../../src/ip2p/serve/page/pixels.js";
import { eachOf, patiently } from "../../src/ip2p/serve/page/pool.js";
import { rangeOf, sectionsOf, typeOf } from "../../src/ip2p/serve/page/reference.js";
import * as trees from "../../src/ip2p/serve/page/tree.js";
import * as words from "../../src/ip2p/serve/page/words.js";
import { crc32, zipParts } from "../../src/ip2p/serve/page/zip.js";

/** @param {string} id @param {string | null} parent @param {number} made */
const step = (id, parent, made) => ({ id, parent, made, title: id });

/** @param {[string, string | null][]} steps */
const treeOf = (steps) =>
  steps.reduce((tree, [id, parent], k) => trees.addStep(tree, step(id, parent, k)), trees.emptyTree());

// --- the history --------------------------------------------------------------------------------

test("undo and redo walk the chain", () => {
  let tree = treeOf([["a", null], ["b", "a"], ["c", "b"]]);
  tree = trees.undo(trees.undo(tree));
  assert.equal(tree.at, "a");
  assert.equal(trees.undoTarget(tree), null);
  assert.equal(trees.undo(tree), tree);
  tree = trees.redo(trees.redo(tree));
  assert.equal(tree.at, "c");
  assert.equal(trees.redoTarget(tree), null);
});

test("an edit of an earlier step is a branch, loses nothing, and redo follows the newest", () => {
  let tree = treeOf([["a", null], ["b", "a"], ["c", "b"], ["d", "a"]]);
  assert.deepEqual(trees.rows(tree).map(({ step: { id }, depth }) => [id, depth]), [["a", 0], ["d", 1], ["b", 0], ["c", 0]]);
  assert.equal(trees.redo(trees.undo(tree)).at, "d");
  tree = trees.undo(trees.undo(trees.goTo(tree, "c")));
  assert.equal(trees.redo(trees.redo(tree)).at, "c");
});

test("a step that is not there changes nothing", () => {
  const tree = treeOf([["a", null]]);
  assert.equal(trees.goTo(tree, "gone"), tree);
  assert.equal(trees.current(trees.emptyTree()), null);
});

test("a long history drops its oldest steps and stays whole", () => {
  const { tree, gone } = trees.prune(treeOf([["a", null], ["b", "a"], ["c", "b"], ["d", "c"]]), 2);
  assert.deepEqual(gone, ["a", "b"]);
  assert.deepEqual(trees.rows(tree).map(({ step: { id, parent } }) => [id, parent]), [["c", null], ["d", "c"]]);
  assert.equal(trees.undoTarget(tree), "c");
});

test("the step shown is never dropped", () => {
  const first = trees.goTo(treeOf([["a", null], ["b", "a"], ["c", "b"]]), "a");
  assert.deepEqual(trees.prune(first, 1), { tree: { ...first, steps: { a: first.steps.a }, last: {} }, gone: ["b", "c"] });
});

// --- the schema ---------------------------------------------------------------------------------

const SCHEMA = {
  properties: {
    image: { type: "string", format: "picture" },
    steps: { anyOf: [{ type: "integer", minimum: 1, maximum: 150 }, { type: "null" }], default: null, description: "sampling steps", group: "Common options" },
    sampler: { anyOf: [{ enum: ["euler", "lcm"], type: "string" }, { type: "null" }], default: null },
    cfg_interval: { anyOf: [{ type: "array", minItems: 2, maxItems: 2 }, { type: "null" }], default: null },
    size: { anyOf: [{ type: "integer" }, { type: "string" }, { type: "null" }], default: null },
    control_image: { anyOf: [{ format: "picture", type: "string" }, { type: "null" }], default: null },
    tile: { type: "boolean", default: false, group: "Size" },
  },
};

test("every setting of the schema becomes a control of its kind", () => {
  const fields = fieldsOf(SCHEMA);
  assert.deepEqual(
    fields.map(({ name, kind }) => [name, kind]),
    [["steps", "integer"], ["sampler", "choice"], ["cfg_interval", "pair"], ["size", "text"], ["control_image", "picture"], ["tile", "flag"]],
  );
  assert.deepEqual([fields[0].min, fields[0].max, fields[0].help, fields[0].group], [1, 150, "sampling steps", "Common options"]);
  assert.equal(fields[2].label, "CFG interval");
});

test("the settings in front come first, those of no group last", () => {
  const names = inOrder(fieldsOf({ properties: { ...SCHEMA.properties, seed: { type: "integer" } } }), ["seed", "steps"]).map(({ name }) => name);
  assert.deepEqual(names.slice(0, 2), ["seed", "steps"]);
  assert.ok(names.indexOf("tile") < names.indexOf("control_image"));
});

test("what is typed is read as the API takes it, or named", () => {
  const [steps, , pair, size] = fieldsOf(SCHEMA);
  assert.equal(readField(steps, " 20 "), 20);
  assert.equal(readField(steps, " "), undefined);
  assert.deepEqual(readField(pair, "0.2, 0.9"), [0.2, 0.9]);
  assert.equal(readField(size, "576x384"), "576x384");
  for (const wrong of ["0", "151", "2.5", "many"]) assert.throws(() => readField(steps, wrong), /Steps is .*a whole number from 1 to 150/);
  assert.throws(() => readField(pair, "0.2"), /CFG interval needs two numbers/);
});

test("a file's settings are taken over without a model's defaults", () => {
  const settings = { steps: 9, sampler: "euler", size: [64, 32], seed: 0, other: 1, control_image: "a.png" };
  const fields = [...fieldsOf(SCHEMA), ...fieldsOf({ properties: { seed: { type: "integer" } } })];
  assert.deepEqual(adopted(settings, fields, { sampler: "euler", seed: 0 }), { steps: 9, size: "64x32", seed: 0 });
  assert.equal(written([0.2, 0.9]), "0.2 0.9");
});

test("every operation of OpenAPI stands under its interface, with its fields", () => {
  const field = { type: "string", description: "what to change", default: "x" };
  const body = { properties: { a: field, b: { type: "integer", minimum: 1, maximum: 9 } }, required: ["b"] };
  const post = { tags: ["edits", "openai"], summary: "Edit", requestBody: { content: { "a/b": { schema: body }, "c/d": { schema: body } } } };
  const get = { tags: ["edits"], parameters: [{ name: "id", in: "path", required: true, schema: { type: "string" } }] };
  const [edits, openai] = sectionsOf({ paths: { "/p": { post, get } } });
  assert.deepEqual([edits.title, openai.title], ["Edits", "OpenAI-compatible"]);
  assert.deepEqual(edits.operations, [
    { head: "GET /p", summary: "", words: "", types: [], rows: [{ name: "id", type: "string", fallback: "required", words: "in the path" }] },
  ]);
  assert.deepEqual(openai.operations[0].types, ["a/b", "c/d"]);
  assert.deepEqual(openai.operations[0].rows, [
    { name: "a", type: "string", fallback: '"x"', words: "what to change" },
    { name: "b", type: "integer, 1 to 9", fallback: "required", words: "" },
  ]);
});

test("types are described in words", () => {
  assert.equal(typeOf({ anyOf: [{ type: "integer" }, { type: "null" }] }), "integer");
  assert.equal(typeOf({ anyOf: [{ type: "string", format: "binary" }, { type: "string" }, { type: "null" }] }), "file or string");
  assert.equal(typeOf({ enum: ["png", "jpeg"] }), "png or jpeg");
  assert.equal(typeOf({ type: "array", items: { type: "string" } }), "list (string)");
  assert.equal(typeOf({ type: "array", minItems: 2, maxItems: 2, prefixItems: [{ type: "number" }, { type: "number" }] }), "list of 2 (number)");
});

test("a range is described in words", () => {
  assert.equal(rangeOf({ anyOf: [{ type: "number", minimum: 0, maximum: 1 }, { type: "null" }] }), "0 to 1");
  assert.equal(rangeOf({ minimum: -1, maximum: 2 ** 63 }), "at least -1");
  assert.equal(rangeOf({ maximum: 8 }), "at most 8");
  assert.equal(rangeOf({ type: "string" }), "");
});

// --- words --------------------------------------------------------------------------------------

test("times and progress in words", () => {
  assert.equal(words.duration(8.2), "9 s");
  assert.equal(words.duration(100), "2 min");
  const news = { state: "running", position: 0, step: 3, steps: 20, seconds_left: 4.2 };
  assert.equal(words.progressWords(news), "Step 3 of 20 · about 5 s left");
  assert.equal(words.progressWords({ ...news, seconds_left: null }), "Step 3 of 20");
  assert.equal(words.progressWords({ ...news, state: "waiting", position: 2 }), "Waiting (2 ahead of you)");
});

test("a result is named after its original, in a format that is written", () => {
  assert.equal(words.editedName("holiday.JPG", "jpeg"), "holiday-edited.jpg");
  assert.equal(words.editedName("scan.bmp", "png"), "scan-edited.png");
  assert.equal(words.editedName("a.b-edited.webp", "webp"), "a.b-edited.webp");
  assert.deepEqual(words.distinct(["a.png", "A.png", "b", "a.png", "b"]), ["a.png", "A-2.png", "b", "a-3.png", "b-2"]);
});

test("the grid's values are read or named", () => {
  assert.deepEqual(words.readNumbers("2, 4  6;4", "Edit strength", 0, 100), [2, 4, 6]);
  assert.throws(() => words.readNumbers("2 x", "Edit strength", 0, 100), /Edit strength: “x” is not a number from 0 to 100/);
  assert.throws(() => words.readNumbers(" ", "Keep original", 0, 100), /has no values/);
  assert.throws(() => words.readNumbers("1 2 3 4 5 6 7 8 9", "Keep original", 0, 100), /the maximum is 8/);
});

test("the facts of a result", () => {
  const infotext = "make it night, please\nSteps: 20, Sampler: Euler a, CFG scale: 4, Image CFG scale: 1.5, Seed: 7, Size: 64x64";
  assert.equal(words.factsOf(infotext), "edit strength 4 · keep original 1.5 · seed 7 · steps 20");
  assert.equal(words.factsOf(""), "");
});

test("a picture is made to fit a number of pixels in its own shape", () => {
  assert.deepEqual(words.within(4000, 1000, 1_000_000), { width: 2000, height: 500 });
  assert.deepEqual(words.within(40, 10, 1_000_000), { width: 40, height: 10 });
});

test("events come in pieces", () => {
  const whole = 'event: step\ndata: {"step": 1}\n\nevent: done\ndata: {"state": "done"}\n\n';
  for (let cut = 0; cut <= whole.length; cut++) {
    const first = words.readEvents(whole.slice(0, cut));
    const second = words.readEvents(first.rest + whole.slice(cut));
    assert.deepEqual([...first.events, ...second.events].map(({ name }) => name), ["step", "done"]);
    assert.equal(second.rest, "");
  }
});

// --- pixels -------------------------------------------------------------------------------------

test("masks change between paint and white on black", () => {
  const paint = Uint8ClampedArray.of(255, 64, 48, 200, 255, 64, 48, 20);
  assert.deepEqual([...pixels.alphaToMask(paint)], [255, 255, 255, 255, 0, 0, 0, 255]);
  assert.deepEqual([...pixels.maskToAlpha(pixels.alphaToMask(paint))].filter((_, k) => k % 4 === 3), [255, 0]);
  assert.equal(pixels.anyPaint(paint), true);
  assert.equal(pixels.anyPaint(pixels.invertAlpha(Uint8ClampedArray.of(0, 0, 0, 255))), false);
});

test("the difference of two pictures does not look at their alpha", () => {
  assert.equal(pixels.difference(Uint8ClampedArray.of(10, 20, 30, 0), Uint8ClampedArray.of(13, 20, 24, 255)), 3);
});

test("zooming keeps the point below the pointer and never shows a gap", () => {
  const frame = { width: 400, height: 300 };
  const picture = { width: 100, height: 100 };
  const whole = pixels.fitted(frame, picture);
  assert.deepEqual(whole, { scale: 3, x: 50, y: 0 });
  const near = pixels.zoomed(whole, 2, 200, 150, frame, picture);
  assert.deepEqual([(200 - near.x) / near.scale, (150 - near.y) / near.scale], [50, 50]);
  assert.deepEqual(pixels.zoomed(near, 0.01, 0, 0, frame, picture), whole);
  assert.equal(pixels.bounded({ ...near, x: 900 }, frame, picture).x, 0);
});

// --- many at once -------------------------------------------------------------------------------

test("no more than so many run at once, and none begins after an abort", async () => {
  let [now, most, done] = [0, 0, 0];
  const stop = new AbortController();
  await eachOf(
    [...Array(10).keys()],
    3,
    async () => {
      most = Math.max(most, ++now);
      await new Promise((resolve) => setTimeout(resolve, 1));
      now--;
      if (++done === 5) stop.abort();
    },
    stop.signal,
  );
  assert.equal(most, 3);
  assert.ok(done >= 5 && done <= 7);
});

test("a full server is asked again after the time that it names, another error is not", async () => {
  let asked = 0;
  const full = Object.assign(new Error("full"), { retry: 0.001 });
  const answer = await patiently(async () => (++asked < 3 ? Promise.reject(full) : "here"), new AbortController().signal);
  assert.deepEqual([answer, asked], ["here", 3]);
  await assert.rejects(patiently(() => Promise.reject(new Error("wrong")), new AbortController().signal), /wrong/);
});

// --- zip ----------------------------------------------------------------------------------------

test("a zip is what Python's zipfile reads", () => {
  assert.equal(crc32(new TextEncoder().encode("123456789")), 0xcbf43926); // the check value of CRC-32
  const files = [
    { name: "página.txt", data: new TextEncoder().encode("one") },
    { name: "b.bin", data: Uint8Array.from({ length: 70_000 }, (_, k) => k % 251) },
  ];
  const path = join(mkdtempSync(join(tmpdir(), "zip-")), "a.zip");
  writeFileSync(path, Buffer.concat(zipParts(files)));
  const code = "import sys, zipfile; z = zipfile.ZipFile(sys.argv[1]); print(z.testzip(), z.namelist(), len(z.read('b.bin')), z.read(z.namelist()[0]))";
  assert.equal(execFileSync("python3", ["-c", code, path], { encoding: "utf-8" }), "None ['página.txt', 'b.bin'] 70000 b'one'\n");
});
