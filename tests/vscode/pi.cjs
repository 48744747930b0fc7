// Plays a Pi, for the tests of the extension.
"use strict";
const http = require("node:http");
const https = require("node:https");

const HEALTHY = { status: "healthy", vps_available: true };

/** A Pi: `answers` maps a path to the status and the body of its answer, or to a function of both sides. */
class Pi {
  constructor(tls) {
    this.asked = []; // of each request its path, its key and its body
    this.left = 0; // requests whose client has left
    this.answers = {
      "/health": [200, HEALTHY],
      "/v1/stats": [200, { version: "1.1.0" }],
      "/infill": [200, { content: "return 1", chance: 0.9 }],
      "/v1/accepted": [200, {}],
    };
    const answer = (request, response) => void this.answer(request, response);
    this.server = tls ? https.createServer(tls, answer) : http.createServer(answer);
  }

  async answer(request, response) {
    let text = "";
    for await (const part of request) text += part;
    const asked = { path: request.url, key: request.headers.authorization ?? "", body: text ? JSON.parse(text) : null };
    this.asked.push(asked);
    response.on("close", () => { if (!response.writableEnded) this.left += 1; });
    const given = this.answers[request.url] ?? [404, { error: true, message: "no such path" }];
    if (typeof given === "function") return given(asked, response);
    const [status, body, headers = {}] = given;
    response.writeHead(status, headers).end(typeof body === "string" ? body : JSON.stringify(body));
  }

  /** The bodies of the requests for completions, and for reading. */
  get infills() { return this.asked.filter(({ path: asked }) => asked === "/infill").map(({ body }) => body); }

  async start(port = 0, host = "127.0.0.1") {
    await new Promise((resolve) => this.server.listen(port, host, resolve));
    this.port = this.server.address().port;
    this.url = `http://127.0.0.1:${this.port}`;
    return this;
  }

  async stop() {
    this.server.closeAllConnections();
    await new Promise((resolve) => this.server.close(resolve));
  }
}

module.exports = { Pi };
