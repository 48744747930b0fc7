// @ts-check
"use strict";
// The Pi: how it is asked, and what is wrong if it does not answer as hoped.

const http = require("node:http");
const https = require("node:https");
const tls = require("node:tls");
const { urlToHttpOptions } = require("node:url");

const CONNECT_MS = 5_000;
const CHECK_MS = 10_000;
const TIMEOUT_MS = 1_800_000; // a model may have to be loaded, and write 2,048 tokens
const MAX_ANSWER = 4_000_000; // characters
const BUSY = [409, 429]; // statuses that pass by themselves
const NO_PI = "the address is another program's, not a Pi's";
/** @type {[RegExp, string][]} */
const FAULTS = [
  [/EPROTO|ERR_SSL/, "does not speak https"],
  [/CERT_HAS_EXPIRED/, "has a certificate that has expired"],
  [/ALTNAME/, "has the certificate of another name"],
  [/CERT|SELF_SIGNED|UNABLE_TO/, "has a certificate of a CA that the system does not know"],
];

/** The Pi did not answer as hoped. `status` is HTTP's, 0 without an answer. */
class PiError extends Error {
  /** @param {number} status @param {string} message */
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

/**
 * One request. `body` makes it a POST. `onData` gets the text of a stream as it comes instead of the
 * answer, and may throw a PiError, which ends the request. PiError, or what aborted it: a connection
 * that never came about is a PiError even if nobody waits for it any more.
 * @param {{url: string, key: string, version: string}} pi
 * @param {string} path
 * @param {{body?: object, signal?: AbortSignal, onConnect?: () => void, onData?: (text: string) => void,
 *   limit?: number}} [given]
 * @returns {Promise<{status: number, headers: import("node:http").IncomingHttpHeaders, text: string}>}
 */
function ask(pi, path, { body, signal, onConnect, onData, limit = TIMEOUT_MS } = {}) {
  const url = new URL(pi.url);
  const isTls = url.protocol === "https:";
  const json = body && JSON.stringify(body);
  /** @type {Record<string, string>} */
  const headers = { "User-Agent": `cerebrum-vscode/${pi.version}` };
  if (pi.key) headers.Authorization = `Bearer ${pi.key}`;
  if (json) headers["Content-Type"] = "application/json";
  const options = {
    ...urlToHttpOptions(url),
    path: url.pathname.replace(/\/$/, "") + path,
    method: json ? "POST" : "GET",
    headers,
    agent: isTls ? new https.Agent({ secureContext: trust() }) : new http.Agent(),
  };
  return new Promise((resolve, reject) => {
    let isConnected = false;
    const fail = (/** @type {any} */ error) => {
      clearTimeout(timer);
      if (error instanceof PiError || (isConnected && signal?.aborted)) return reject(error);
      reject(new PiError(0, reasonOf(url, error)));
    };
    // Not http.request: VS Code's own sends all to the proxy of its settings, which cannot reach the
    // home network, and would see the key.
    const request = new http.ClientRequest(options, (answer) => {
      let size = 0;
      let text = "";
      answer.setEncoding("utf8");
      answer.on("data", (/** @type {string} */ part) => {
        size += part.length;
        if (size > MAX_ANSWER) return request.destroy(new PiError(0, NO_PI));
        if (!onData || answer.statusCode !== 200) return (text += part);
        try {
          onData(part);
        } catch (error) {
          request.destroy(/** @type {Error} */ (error));
        }
      });
      answer.on("end", () => {
        clearTimeout(timer);
        resolve({ status: answer.statusCode ?? 0, headers: answer.headers, text });
      });
      answer.on("error", fail);
    });
    const stop = () => request.destroy(new Error("aborted"));
    const timeOut = () => request.destroy(new Error("ETIMEDOUT"));
    let timer = setTimeout(timeOut, CONNECT_MS);
    request.on("socket", (socket) => {
      socket.once(isTls ? "secureConnect" : "connect", () => {
        isConnected = true;
        onConnect?.();
        clearTimeout(timer);
        timer = setTimeout(timeOut, limit);
        if (signal?.aborted) stop();
      });
    });
    signal?.addEventListener("abort", () => isConnected && stop());
    request.on("error", fail);
    request.end(json);
  });
}

/** @type {tls.SecureContext | undefined} */
let trusted;

/**
 * The CAs that node knows, and those of the system's store, which a household's own may be in. Reading
 * hundreds of certificates takes a tenth of a second, so it is done once.
 */
function trust() {
  if (!trusted) {
    const ca = new Set([...tls.getCACertificates("default"), ...tls.getCACertificates("system")]);
    trusted = tls.createSecureContext({ ca: [...ca] });
  }
  return trusted;
}

/** @param {URL} url @param {any} error */
function reasonOf(url, error) {
  const code = error.code ?? error.message;
  const [, fault] = FAULTS.find(([codes]) => codes.test(code)) ?? [];
  return fault ? `the Pi at ${url.host} ${fault} (${code})` : `no Pi answers at ${url.host} (${code})`;
}

/**
 * The JSON object of an answer; PiError for another answer or an error.
 * @param {{status: number, text: string}} answer
 */
function read(answer) {
  let found = null;
  try {
    found = JSON.parse(answer.text);
  } catch {
    // told below
  }
  if (found === null || typeof found !== "object") {
    throw new PiError(0, "the address is another program's: its answer is not JSON");
  }
  if (answer.status !== 200) throw refusal(answer.status, found);
  return found;
}

/** @param {number} status @param {any} found */
function refusal(status, found) {
  const { message = "without a reason" } = typeof found.error === "object" ? found.error : found;
  if (status === 401) return new PiError(401, "the Pi asks for a key, or for another one");
  return new PiError(status, `the Pi answers ${status}: ${message}`);
}

/**
 * The Pi's version, and the `problem` that it has, "" for none. PiError if it cannot be used.
 * @param {{url: string, key: string, version: string}} pi @param {AbortSignal} [signal]
 */
async function check(pi, signal) {
  const given = { limit: CHECK_MS, signal };
  const health = await ask(pi, "/health", given);
  const found = read({ ...health, status: 200 });
  if (typeof found.vps_available !== "boolean") {
    throw new PiError(0, NO_PI);
  }
  const stats = read(await ask(pi, "/v1/stats", given));
  const problem = found.vps_available ? "" : "the Pi answers, but has no backend now";
  return { problem, version: String(stats.version ?? "") };
}

module.exports = { ask, BUSY, check, NO_PI, PiError, read };
