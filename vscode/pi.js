// @ts-check
"use strict";
// The Pi: how it is asked, and what is wrong if it does not answer as hoped.

const http = require("node:http");
const https = require("node:https");

const CONNECT_MS = 5_000;
const TIMEOUT_MS = 600_000; // a model may have to be loaded, and the Pi itself gives up in time
const BUSY = [409, 429]; // statuses that pass by themselves
const NO_PI = "the address is another program's, not a Pi's";
const CERTIFICATE = /CERT|SELF_SIGNED|UNABLE_TO|ALTNAME|ERR_TLS|ERR_SSL|EPROTO/;

/** The Pi did not answer as hoped. `status` is HTTP's, 0 without an answer. */
class PiError extends Error {
  /** @param {number} status @param {string} message */
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

/**
 * One request. `body` makes it a POST; `onData` gets the text of a stream as it comes.
 * @param {{url: string, key: string, version: string}} pi
 * @param {string} path
 * @param {{body?: object, signal?: AbortSignal, onData?: (text: string) => void}} [given]
 * @returns {Promise<{status: number, headers: import("node:http").IncomingHttpHeaders, text: string}>}
 */
function ask(pi, path, { body, signal, onData } = {}) {
  const url = new URL(pi.url);
  const json = body && JSON.stringify(body);
  /** @type {Record<string, string>} */
  const headers = { "User-Agent": `cerebrum-vscode/${pi.version}` };
  if (pi.key) headers.Authorization = `Bearer ${pi.key}`;
  if (json) headers["Content-Type"] = "application/json";
  const options = {
    method: json ? "POST" : "GET",
    headers,
    signal,
    agent: false,
    // A proxy in VS Code's settings cannot reach the home network.
    _vscodeProxySupport: "off",
  };
  const { request } = url.protocol === "https:" ? https : http;
  return new Promise((resolve, reject) => {
    const fail = (/** @type {any} */ error) => {
      clearTimeout(connecting);
      reject(signal?.aborted ? error : new PiError(0, reasonOf(url, error)));
    };
    const sent = request(url.origin + url.pathname.replace(/\/$/, "") + path, options, (answer) => {
      let text = "";
      answer.setEncoding("utf8");
      answer.on("data", (part) => {
        text += part;
        if (answer.statusCode === 200) onData?.(part);
      });
      answer.on("end", () => resolve({ status: answer.statusCode ?? 0, headers: answer.headers, text }));
      answer.on("error", fail);
    });
    const connecting = setTimeout(() => sent.destroy(new Error("ETIMEDOUT")), CONNECT_MS);
    const connected = url.protocol === "https:" ? "secureConnect" : "connect";
    sent.on("socket", (socket) => socket.once(connected, () => clearTimeout(connecting)));
    sent.setTimeout(TIMEOUT_MS, () => sent.destroy(new Error("ETIMEDOUT")));
    sent.on("error", fail);
    sent.end(json);
  });
}

/** @param {URL} url @param {any} error */
function reasonOf(url, error) {
  const code = error.code ?? error.message;
  if (CERTIFICATE.test(code)) {
    return `the certificate of ${url.host} is not trusted (${code}): the system must know its CA`;
  }
  return `no Pi answers at ${url.host} (${code})`;
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
    throw new PiError(answer.status, "the address is another program's: its answer is not JSON");
  }
  if (answer.status !== 200) throw refusal(answer.status, found);
  return found;
}

/** @param {number} status @param {any} found */
function refusal(status, found) {
  const message = (typeof found.error === "object" ? found.error : found).message;
  if (status === 401) return new PiError(401, "the Pi asks for a key, or for another one");
  return new PiError(status, `the Pi answers ${status}: ${message}`);
}

/**
 * The Pi's version, and the `problem` that it has, "" for none. PiError if it cannot be used.
 * @param {{url: string, key: string, version: string}} pi
 */
async function check(pi) {
  const health = await ask(pi, "/health");
  const found = read({ ...health, status: 200 });
  if (typeof found.vps_available !== "boolean") {
    throw new PiError(health.status, NO_PI);
  }
  const stats = read(await ask(pi, "/v1/stats"));
  const problem = found.vps_available ? "" : "the Pi answers, but has no backend now";
  return { problem, version: String(stats.version ?? "") };
}

module.exports = { ask, BUSY, check, NO_PI, PiError, read };
