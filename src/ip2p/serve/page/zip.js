// Zip files without compression (pictures are compressed already), according to APPNOTE 6.3.

const TABLE = Uint32Array.from({ length: 256 }, (_, n) => {
  let c = n;
  for (let k = 0; k < 8; k++) c = c & 1 ? 0xedb88320 ^ (c >>> 1) : c >>> 1;
  return c >>> 0;
});

/** @param {Uint8Array} data */
export function crc32(data) {
  let c = 0xffffffff;
  for (const byte of data) c = TABLE[(c ^ byte) & 0xff] ^ (c >>> 8);
  return (c ^ 0xffffffff) >>> 0;
}

/** Pack numbers of 2 or 4 bytes in little-endian order. @param {[number, 2 | 4][]} fields */
function packed(fields) {
  const bytes = [];
  for (const [value, width] of fields) {
    for (let k = 0; k < width; k++) bytes.push((value >>> (8 * k)) & 0xff);
  }
  return Uint8Array.from(bytes);
}

/**
 * The parts of a zip file, for `new Blob(parts)`. The limits are 65,535 files and 4 GB, more than a browser can
 * hold.
 * @param {{ name: string, data: Uint8Array }[]} files
 * @returns {Uint8Array<ArrayBuffer>[]}
 */
export function zipParts(files) {
  /** @type {Uint8Array[]} */
  const parts = [];
  const directory = [];
  let offset = 0;
  const DAY = (0 << 9) | (1 << 5) | 1; // 1980-01-01, since zip has no value for an unknown date
  for (const { name, data } of files) {
    const title = new TextEncoder().encode(name);
    /** @type {[number, 2 | 4][]} */
    const about = [
      ...[[20, 2], [0x0800, 2], [0, 2], [0, 2], [DAY, 2]], // version, UTF-8 names, stored, time, day
      ...[[crc32(data), 4], [data.length, 4], [data.length, 4], [title.length, 2], [0, 2]],
    ].map(([value, width]) => [value, /** @type {2 | 4} */ (width)]);
    const head = packed([[0x04034b50, 4], ...about]);
    parts.push(head, title, data);
    directory.push(
      packed([[0x02014b50, 4], [20, 2], ...about, [0, 2], [0, 2], [0, 2], [0, 4], [offset, 4]]),
      title,
    );
    offset += head.length + title.length + data.length;
  }
  const length = directory.reduce((sum, part) => sum + part.length, 0);
  const end = packed([
    [0x06054b50, 4], [0, 2], [0, 2], [files.length, 2], [files.length, 2],
    [length, 4], [offset, 4], [0, 2],
  ]);
  return /** @type {Uint8Array<ArrayBuffer>[]} */ ([...parts, ...directory, end]);
}
