// @ts-check
"use strict";
// Pure: texts around a cursor, suggestions and what is left of them, answers to instructions.

// Characters before the cursor, and after it, that are sent: more than any context holds, and as
// JSON less than the 1 MiB that the Pi takes.
const MAX_TEXT = 80_000;
const MAX_TOKENS = 2048;
const MAX_TYPED_OVER = 16;
const MIN_PAUSE_MS = 30;
const MAX_PAUSE_MS = 400; // fast typists leave 100 ms between keys
const PAUSE_SHARE = 0.2; // of the median response time

/**
 * @typedef {{uri: string, before: string, after: string}} Gap a cursor in a file
 * @typedef {{text: string, unsure: boolean}} Suggestion `unsure`: it ends where the model becomes
 *   unsure
 */

/** The text with the line ends that the model knows. @param {string} text */
const unix = (text) => text.replace(/\r\n?/g, "\n");

/**
 * The text before and after the cursor for a request. Of a long text the far ends are left out, in
 * steps of a quarter, so that it begins at the same place for many keys and the cache stays valid.
 * @param {Gap} gap
 */
function clip(gap) {
  const step = MAX_TEXT / 4;
  const over = Math.max(0, gap.before.length - MAX_TEXT);
  const cut = Math.ceil(over / step) * step;
  return { input_prefix: gap.before.slice(cut), input_suffix: gap.after.slice(0, MAX_TEXT) };
}

/**
 * What was typed or accepted since an older gap; undefined if anything else has changed.
 * @param {Gap} gap @param {Gap} [older]
 */
function typedSince({ uri, before, after }, older) {
  const isSame = older?.uri === uri && older.after === after && before.startsWith(older.before);
  return isSame ? before.slice(older.before.length) : undefined;
}

/** The latest suggestion, how long the Pi took for the last ones, and what was typed over them. */
class Suggestions {
  constructor() {
    /** @type {{gap: Gap, found: Suggestion} | undefined} */
    this.latest = undefined;
    /** @type {Gap | undefined} */
    this.asked = undefined; // the latest gap that the Pi was asked for or had to read
    this.times = [400]; // ms; a guess, until there are answers
    /** @type {{gap: Gap, text: string, place: string} | undefined} */
    this.shown = undefined; // the latest ghost text
    /** @type {string[]} */
    this.typedOver = []; // the place of each text that was
  }

  /** @param {Gap} gap @param {Suggestion} found @param {number} ms */
  add(gap, found, ms) {
    this.latest = { gap, found };
    this.times = [...this.times.slice(-7), ms];
  }

  /**
   * The rest of the latest suggestion, whose beginning has been typed or accepted; undefined if there
   * is none.
   * @param {Gap} gap
   * @returns {Suggestion | undefined}
   */
  rest(gap) {
    if (!this.latest) return undefined;
    const { text, unsure } = this.latest.found;
    const typed = typedSince(gap, this.latest.gap);
    const isWhole = typed && typed === text;
    if (typed === undefined || isWhole || !text.startsWith(typed)) return undefined;
    return { text: text.slice(typed.length), unsure };
  }

  /**
   * Note the ghost text for a gap, "" for a new request. Returns how many times something else was
   * typed over this text, in a line with this number and the same text before.
   * @param {Gap} gap @param {string} text
   */
  show(gap, text) {
    const lines = gap.before.split("\n");
    const place = JSON.stringify([gap.uri, lines.length, lines.at(-1) + text]);
    const old = this.shown;
    const typed = old && typedSince(gap, old.gap);
    const isAlong = !typed || typed.startsWith(old.text) || old.text.startsWith(typed);
    if (!isAlong) this.typedOver = [old.place, ...this.typedOver.slice(0, MAX_TYPED_OVER)];
    this.shown = { gap, text, place };
    return this.typedOver.filter((one) => one === place).length;
  }

  /** Milliseconds without a key before an automatic request: longer for a slow Pi, none if the latest suggestion was taken. @param {Gap} gap */
  pause(gap) {
    const { latest } = this;
    if (latest && typedSince(gap, latest.gap) === latest.found.text) return 0;
    return Math.min(Math.max(MIN_PAUSE_MS, PAUSE_SHARE * median(this.times)), MAX_PAUSE_MS);
  }
}

/** @param {number[]} values */
function median(values) {
  const sorted = [...values].sort((a, b) => a - b);
  const half = (sorted.length - 1) / 2;
  return (sorted[Math.ceil(half)] + sorted[Math.floor(half)]) / 2;
}

/**
 * Why the answer to an instruction may lack code that it would replace; "" if it is whole.
 * @param {any} answer
 */
function lacks(answer) {
  if (!answer.done) return "the connection ended before the answer did";
  if (answer.kept?.parts?.join() !== "all") return "the text is too long for the model";
  const reason = answer.finish_reason ?? "stop";
  if (reason === "length") return `the answer is longer than ${MAX_TOKENS} tokens`;
  if (reason === "repeat") return "the model began to repeat itself";
  if (reason !== "stop" && reason !== "block") return "the answer broke off";
  if (!answer.completion?.trim()) return "the answer has no code";
  return "";
}

/**
 * Whether a path matches a glob: `*` and `?` within a name, `**` for any folders, a `/` at the end for
 * all in a folder, `{a,b}` for one of several texts. A glob without a `/` is for the name alone, in any
 * folder; so is one that begins with `~/` or `./`, since more is better left out than less.
 * @param {string} glob @param {string} path
 */
function matches(glob, path) {
  const source = glob
    .replace(/^[~.]\//, "")
    .replace(/\/$/, "/**")
    .replace(/[.+^$()|[\]\\]/g, "\\$&")
    .replace(/\*\*\/|\*+|\?/g, (wild) => ({ "**/": "(.*/)?", "*": "[^/]*", "?": "[^/]" })[wild] ?? ".*")
    .replace(/\{([^{}]*)\}/g, (_, several) => oneOf(several.split(",")));
  return new RegExp(`(^|/)${source}$`, "is").test(path);
}

/** The regular expression of one of these texts. @param {string[]} texts */
function oneOf(texts) {
  return `(${texts.map((text) => text.trim()).join("|")})`;
}

module.exports = { clip, lacks, matches, MAX_TOKENS, Suggestions, typedSince, unix };
