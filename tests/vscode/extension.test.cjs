// Tests of the extension for VS Code, with a Pi and a `vscode` that are played here.
//
//     node --test tests/vscode/
"use strict";
const assert = require("node:assert/strict");
const fs = require("node:fs");
const path = require("node:path");
const { test } = require("node:test");
const { setTimeout: wait } = require("node:timers/promises"); // never a test's own clock
const nodeTls = require("node:tls");
const { Pi } = require("./pi.cjs");
const { activate, Desk, Document, Position, Range, Selection, Token, Uri } = require("./stub.cjs");

const FOLDER = path.resolve(__dirname, "../../vscode");

/** Wait for a condition. */
async function until(condition) {
  const deadline = Date.now() + 10_000;
  while (!condition()) {
    assert.ok(Date.now() < deadline, `${condition}`);
    await wait(5);
  }
}

/**
 * A test with a Pi, a desk, and the extension there, which knows the Pi. `clock` is called before the
 * extension begins.
 */
function desk(name, run, settings = {}, clock = () => {}) {
  test(name, async (context) => {
    clock(context);
    const pi = await new Pi().start();
    const at = new Desk();
    Object.assign(at.settings, { url: pi.url }, settings);
    try {
      at.vscode = activate(at, FOLDER);
      await until(() => pi.asked.length >= 2 || at.settings.url !== pi.url);
      await run(at, pi);
    } finally {
      await pi.stop();
    }
  });
}

const python = (text, uri = "file:///work/a.py") => new Document(uri, "python", text);
const END = { triggerKind: 1 };
const ASKED = { triggerKind: 0 };

/** Ask for ghost text at the `|` of a text. */
async function ask(at, document, context = END, token = new Token()) {
  const offset = document.text.indexOf("|");
  document.text = document.text.slice(0, offset) + document.text.slice(offset + 1);
  const before = document.text.slice(0, offset).split("\n");
  const position = new Position(before.length - 1, before.at(-1).length);
  return at.provider.provideInlineCompletionItems(document, position, context, token);
}

const texts = (items) => items.map((item) => item.insertText);

// --------------------------------------------------------------------------------------- ghost text

desk("a gap is sent as it is, and its text is shown", async (at, pi) => {
  const [item] = await ask(at, python("def f():\r\n    |\r\n\r\nf()\r\n"));
  assert.equal(item.insertText, "return 1");
  assert.deepEqual(item.range.start, new Position(1, 4));
  assert.deepEqual(pi.infills, [{
    input_prefix: "def f():\n    ", input_suffix: "\n\nf()\n", filename: "a.py", n_predict: 128,
    t_max_prompt_ms: 500, t_max_predict_ms: 1500, cache_prompt: true, suggest: "normal",
  }]);
  assert.match(at.item.text, /check/);
});

desk("characters beyond 16 bits count as two", async (at, pi) => {
  const [item] = await ask(at, python("s = '😀' + |"));
  assert.equal(pi.infills[0].input_prefix, "s = '😀' + ");
  assert.deepEqual(item.range.start, new Position(0, 11));
});

desk("who asks gets all that the Pi has, from all of the file", async (at, pi) => {
  await ask(at, python("x = |"), ASKED);
  const { suggest, t_max_prompt_ms } = pi.infills[0];
  assert.deepEqual([suggest, t_max_prompt_ms], ["always", 0]);
});

desk("what is typed of a suggestion asks nothing", async (at, pi) => {
  assert.deepEqual(texts(await ask(at, python("x = |"))), ["return 1"]);
  assert.deepEqual(texts(await ask(at, python("x = ret|"))), ["urn 1"]);
  assert.deepEqual(texts(await ask(at, python("x = return 1|"))), ["return 1"]); // all was taken
  assert.deepEqual(pi.infills.map((body) => body.input_prefix), ["x = ", "x = return 1"]);
});

desk("an empty or shortened suggestion is asked for again by a person alone", async (at, pi) => {
  pi.answers["/infill"] = [200, { content: "", unsure: true }];
  assert.deepEqual(await ask(at, python("x = |")), []);
  assert.match(at.item.tooltip, /not sure/);
  assert.deepEqual(await ask(at, python("x = |")), []);
  assert.equal(pi.infills.length, 1);
  assert.deepEqual(await ask(at, python("x = |"), ASKED), []);
  assert.equal(pi.infills.length, 2);
});

for (const why of ["replaced", "preempted"]) {
  desk(`a text that was ${why} is not kept`, async (at, pi) => {
    pi.answers["/infill"] = [200, { content: "", [why]: true }];
    await ask(at, python("x = |"));
    await ask(at, python("x = |"));
    assert.equal(pi.infills.length, 2);
  });
}

desk("other settings forget what is known, also what is on its way", async (at, pi) => {
  const change = () => at.vscode.workspace.getConfiguration().update("tokens", 9);
  await ask(at, python("x = |"));
  await change();
  pi.answers["/infill"] = (_asked, response) => void change().then(() => response.end('{"content": "a"}'));
  assert.deepEqual(texts(await ask(at, python("x = |"))), ["a"]);
  await ask(at, python("x = |"));
  assert.equal(pi.infills.length, 3);
});

desk("a limit of 0 tokens, with which nothing would come, counts for nothing", async (at, pi) => {
  await ask(at, python("x = |"));
  assert.equal(pi.infills[0].n_predict, 128);
}, { tokens: 0 });

desk("what VS Code's menu would insert comes first", async (at, pi) => {
  const range = new Range(new Position(0, 4), new Position(0, 6));
  const context = { ...END, selectedCompletionInfo: { range, text: "print" } };
  const [item] = await ask(at, python("x = pr|"), context);
  assert.equal(item.insertText, "printreturn 1");
  assert.equal(item.range, range);
  assert.equal(pi.infills[0].input_prefix, "x = print");
});

desk("a cancelled request ends at the Pi", async (at, pi) => {
  pi.answers["/infill"] = () => {};
  const token = new Token();
  const items = ask(at, python("x = |"), END, token);
  await until(() => pi.infills.length === 1);
  token.cancel();
  assert.deepEqual(await items, []);
  await until(() => pi.left === 1);
  assert.deepEqual(at.shown, []);
});

desk("a connection that is slow to come about is waited for", async (at, pi) => {
  const slow = { began: Date.now() - 1000 };
  at.provider.connecting.add(slow);
  assert.deepEqual(await ask(at, python("x = |")), []);
  assert.deepEqual(pi.infills, []);
  at.provider.connecting.delete(slow);
  await ask(at, python("x = |"));
  assert.equal(pi.infills.length, 1);
  assert.equal(at.provider.connecting.size, 0);
});

test("the pause follows the Pi's speed, within limits", () => {
  const { Suggestions } = require(`${FOLDER}/text.js`);
  const suggestions = new Suggestions();
  const here = { uri: "", before: "", after: "" };
  assert.equal(suggestions.pause(here), 80); // a guess
  suggestions.add(here, { text: "a" }, 800);
  assert.equal(suggestions.pause(here), 120); // a fifth of the median
  for (let n = 0; n < 8; n++) suggestions.add(here, { text: "a" }, 10_000);
  assert.equal(suggestions.pause(here), 400);
  for (let n = 0; n < 8; n++) suggestions.add(here, { text: "a" }, 1);
  assert.equal(suggestions.pause(here), 30);
  assert.equal(suggestions.pause({ ...here, before: "a" }), 0); // it was taken
});

// An edit (its first column and its text), the text up to the cursor afterwards, and what is shown.
const QUIET = [
  [0, "x = ", "x = |", ["return 1"]],
  [4, "c", "x = c|", ["return 1"]], // over what was shown: once
  [4, "", "x = |", []],
  [4, "c", "x = c|", ["return 1"]], // typed again
  [3, "", "x =|", []],
  [3, " ", "x = |", ["return 1"]],
  [4, "c", "x = c|", ["return 1"]], // twice
  [3, "", "x =|", []],
  [3, " ", "x = |", []],
  [4, "r", "x = r|", []], // the beginning of what was hidden
  [0, "y", "yx = r|", ["return 1"]],
];
desk("what is not shown unasked", async (at, pi) => {
  const document = python("");
  const edit = (character, text) => {
    const contentChanges = [{ range: { start: new Position(0, character) }, text }];
    at.edited.fire({ document, contentChanges });
    at.edited.fire({ document, contentChanges: [] }); // it is no longer as it was saved
  };
  const shown = async (text, context) => texts(await ask(at, Object.assign(document, { text }), context));
  for (const [character, text, after, expected] of QUIET) {
    edit(character, text);
    assert.deepEqual([after, await shown(after)], [after, expected]);
  }
  assert.deepEqual(await shown("x = |", ASKED), ["return 1"]);
  edit(4, "");
  const { length } = pi.infills;
  assert.deepEqual(await shown("y = |"), []);
  assert.equal(pi.infills.length, length);
  assert.deepEqual(await shown("y = |", ASKED), ["return 1"]);
  assert.deepEqual(await shown("y = 1\n|"), ["return 1"]); // elsewhere
  edit(0, "z");
  const selection = new Selection(new Position(0, 0), new Position(0, 1));
  at.vscode.window.activeTextEditor = { document, selection };
  assert.deepEqual(await shown("z|"), []);
  assert.deepEqual(await shown("z|", ASKED), ["return 1"]);
});

desk("what a menu would insert is not typed over anything", async (at) => {
  const range = new Range(new Position(0, 4), new Position(0, 4));
  for (let times = 0; times < 3; times++) {
    assert.deepEqual(texts(await ask(at, python("x = |"), END)), ["return 1"]);
    const context = { ...END, selectedCompletionInfo: { range, text: "c" } };
    assert.deepEqual(texts(await ask(at, python("x = |"), context)), ["creturn 1"]);
  }
});

desk("a key within the pause asks nothing", async (at, pi) => {
  const token = new Token();
  const items = ask(at, python("x = |"), END, token);
  token.cancel();
  assert.deepEqual(await items, []);
  assert.deepEqual(pi.infills, []);
});

desk("an accepted text is counted", async (at, pi) => {
  const [{ command }] = await ask(at, python("x = |"));
  await at.vscode.commands.executeCommand(command.command, ...command.arguments);
  await until(() => pi.asked.at(-1).path === "/v1/accepted");
  assert.deepEqual(pi.asked.at(-1).body, { characters: 8 });
});

desk("the far ends of a long file are left out", async (at, pi) => {
  const line = "x = 1\n";
  await ask(at, python(`${line.repeat(20_000)}|${line.repeat(20_000)}`));
  const { input_prefix, input_suffix } = pi.infills[0];
  assert.deepEqual([input_prefix.length, input_suffix.length], [80_000, 80_000]);
});

// ------------------------------------------------------------------------ reading before the first key

/** A test where what waits for a time waits until `rest` says that so many ms have passed. */
function resting(name, run) {
  let now = 0;
  const waiting = new Map(); // the time of each function
  const clock = ({ mock }) => {
    // Not node's own clock: to clear what has run clears something else there.
    mock.method(globalThis, "setTimeout", (then, ms) => (waiting.set(then, now + ms), then));
    mock.method(globalThis, "clearTimeout", (then) => waiting.delete(then));
  };
  const rest = (ms = 300) => {
    now += ms;
    for (const [then, time] of waiting) {
      if (time <= now) waiting.delete(then) && then();
    }
  };
  desk(name, (at, pi) => run(at, pi, rest), {}, clock);
}

/** Bring a document to the front, with the cursor at the `|` of its text. */
function front(at, document) {
  const [before, after] = document.text.split("|");
  document.text = before + after;
  const lines = before.split("\n");
  const place = new Position(lines.length - 1, lines.at(-1).length);
  const editor = { document, selection: new Selection(place, place) };
  at.vscode.window.activeTextEditor = editor;
  at.fronted.fire(editor);
  return editor;
}

/** Move the cursor, and the other end of the selection. */
function move(at, editor, character, other = character) {
  editor.selection = new Selection(new Position(0, character), new Position(0, other));
  at.moved.fire({ textEditor: editor });
}

/** Have a place read that is not; of all requests until then, what is to be read and how much to be written. */
async function places(at, pi, rest) {
  front(at, python("the last|", "file:///work/last.py"));
  rest();
  await until(() => pi.infills.at(-1)?.input_prefix === "the last");
  return pi.infills.slice(0, -1).map((body) => [body.input_prefix, body.input_suffix, body.n_predict]);
}

resting("the file in front is read, and so is a file that comes there", async (at, pi, rest) => {
  at.vscode.window.activeTextEditor = {
    document: python("a\r\nb"), selection: new Selection(new Position(1, 0), new Position(1, 0)),
  };
  rest(299);
  rest(1);
  await until(() => pi.infills.length === 1);
  assert.deepEqual(pi.infills, [{
    input_prefix: "a\n", input_suffix: "b", filename: "a.py", n_predict: 0,
    t_max_prompt_ms: 500, t_max_predict_ms: 1500, cache_prompt: true, suggest: "normal",
  }]);
  assert.equal(at.provider.status.writing, 0);
  front(at, python("c|d", "file:///work/b.py"));
  rest(299);
  assert.equal(pi.infills.length, 1);
  rest(1);
  await until(() => pi.infills.length === 2);
  at.vscode.window.activeTextEditor = undefined; // nothing is open
  at.fronted.fire(undefined);
  rest();
  assert.deepEqual(await places(at, pi, rest), [["a\n", "b", 0], ["c", "d", 0]]);
});

resting("a cursor that rests is read, and one on its way is not", async (at, pi, rest) => {
  const editor = front(at, python("|abc"));
  rest();
  move(at, editor, 1);
  rest();
  move(at, editor, 2);
  rest(299);
  move(at, editor, 3);
  rest(299);
  move(at, editor, 2); // selects, and no longer
  rest(299);
  move(at, editor, 0, 3);
  rest();
  move(at, editor, 3);
  rest();
  const read = await places(at, pi, rest);
  assert.deepEqual(read, [["", "abc", 0], ["a", "bc", 0], ["abc", "", 0]]);
});

resting("what is read is not read again", async (at, pi, rest) => {
  const document = python("x = |\n");
  const editor = front(at, document);
  const type = (text) => {
    document.text = `${text}\n`;
    move(at, editor, text.length);
  };
  rest();
  type("x = f");
  rest();
  const shown = ask(at, Object.assign(document, { text: "x = f|\n" }));
  rest(80);
  assert.deepEqual(texts(await shown), ["return 1"]);
  rest();
  type("x = fr");
  rest();
  move(at, editor, 1);
  rest(299);
  move(at, editor, 6); // back in time
  rest();
  type("x = "); // deletes
  rest();
  const read = await places(at, pi, rest);
  assert.deepEqual(read, [["x = ", "\n", 0], ["x = f", "\n", 128], ["x = ", "\n", 0]]);
});

resting("a completion takes the place of a reading that waits", async (at, pi, rest) => {
  const range = new Range(new Position(0, 4), new Position(0, 6));
  const context = { ...END, selectedCompletionInfo: { range, text: "print" } };
  const document = python("x = pr|");
  front(at, document);
  const shown = ask(at, Object.assign(document, { text: "x = pr|" }), context);
  rest(80);
  assert.deepEqual(texts(await shown), ["printreturn 1"]);
  rest();
  assert.deepEqual(await places(at, pi, rest), [["x = print", "", 128]]);
});

resting("other settings have it read again", async (at, pi, rest) => {
  const editor = front(at, python("x|"));
  rest();
  await at.vscode.workspace.getConfiguration().update("tokens", 9);
  move(at, editor, 1);
  rest();
  assert.deepEqual(await places(at, pi, rest), [["x", "", 0], ["x", "", 0]]);
});

resting("nothing is read of what is never sent, or off, or of a Pi that is away", async (at, pi, rest) => {
  const status = at.provider.status;
  for (const [uri, prepare, restore] of [
    ["file:///work/.env", () => {}, () => {}],
    ["output:log", () => {}, () => {}],
    ["file:///work/a.py", () => { at.activeTab = { input: new at.vscode.TabInputTextDiff() }; }, () => { at.activeTab = undefined; }],
    ["file:///work/a.py", () => { at.settings.off = ["python"]; }, () => { at.settings.off = []; }],
    ["file:///work/a.py", () => { at.workspace.set("off", true); }, () => { at.workspace.delete("off"); }],
    ["file:///work/a.py", () => { at.settings.suggest = "never"; }, () => { at.settings.suggest = "normal"; }],
    ["file:///work/a.py", () => { at.settings.readAhead = false; }, () => { delete at.settings.readAhead; }],
    ["file:///work/a.py", () => { status.awayUntil = Date.now() + 60_000; }, () => { status.awayUntil = 0; }],
    ["file:///work/a.py", () => { at.provider.connecting.add({ began: Date.now() - 1000 }); }, () => { at.provider.connecting.clear(); }],
  ]) {
    prepare();
    front(at, python("x|", uri));
    rest();
    restore();
  }
  assert.deepEqual(await places(at, pi, rest), []);
  assert.equal(SETTINGS["cerebrum.readAhead"].default, true);
});

resting("nobody is told that nothing could be read", async (at, pi, rest) => {
  pi.answers["/infill"] = [401, { error: { message: "x" } }];
  front(at, python("x|"));
  rest();
  assert.deepEqual(await places(at, pi, rest), [["x", "", 0]]);
  await pi.stop();
  front(at, python("y|"));
  rest();
  assert.match(at.item.tooltip, /ready/);
  await ask(at, python("z|"), ASKED); // is told
  const away = `no Pi answers at 127.0.0.1:${pi.port} (ECONNREFUSED)`;
  assert.deepEqual(at.shown, [`log: ${away}`, `warning: Cerebrum: ${away}`]);
});

resting("an extension that has ended reads nothing any more", async (at, pi, rest) => {
  const editor = front(at, python("x|"));
  for (const one of at.context.subscriptions) one.dispose?.();
  move(at, editor, 0);
  rest();
  await ask(at, python("y|"), ASKED);
  assert.deepEqual(pi.infills.map((body) => body.input_prefix), ["y"]);
});

// ------------------------------------------------------------------------- which texts, which names

for (const [uri, name] of [
  ["file:///work/Makefile", "Makefile"],
  ["untitled:Untitled-1", "Untitled-1.py"],
  ["vscode-remote://ssh/home/a.py", "a.py"],
  ["vscode-notebook-cell:/work/study.ipynb", "study.py"],
]) {
  desk(`${uri} is sent as ${name}`, async (at, pi) => {
    await ask(at, python("x = |", uri));
    assert.equal(pi.infills[0].filename, name);
  });
}

desk("the cells above of the same language precede a cell", async (at, pi) => {
  const cell = (language, text) => ({ document: new Document("vscode-notebook-cell:/a.ipynb", language, text) });
  const cells = [cell("python", "import os\n"), cell("markdown", "# A"), cell("python", "os.|"), cell("python", "last")];
  at.books = [{ getCells: () => cells }];
  await ask(at, cells[2].document);
  assert.deepEqual([pi.infills[0].input_prefix, pi.infills[0].input_suffix], ["import os\n\nos.", ""]);
});

const PACKAGE = require(`${FOLDER}/package.json`);
const SETTINGS = PACKAGE.contributes.configuration.properties;
for (const uri of [
  "vscode-scm:input", "git:/work/a.py", "output:log", "file:///work/.env", "file:///work/deep/.env.local",
  "file:///home/a/.git-credentials", "file:///home/a/.pypirc", "file:///home/a/.aws/credentials",
  "file:///c:/Users/a/.ssh/id_rsa", "file:///work/prod.ENV", "file:///home/a/server.pem", "file:///home/a/.netrc",
]) {
  desk(`${uri} is never sent`, async (at, pi) => {
    at.settings.exclude = SETTINGS["cerebrum.exclude"].default;
    assert.deepEqual(await ask(at, python("x = |", uri), ASKED), []);
    assert.deepEqual(pi.infills, []);
    assert.match(at.item.tooltip, /off/);
    await ask(at, python("x = |"));
    assert.match(at.item.tooltip, /ready/);
  });
}

desk("commit messages that are files are never sent", async (at, pi) => {
  const uri = "file:///work/.git/COMMIT_EDITMSG";
  await ask(at, new Document(uri, "git-commit", "x|"), ASKED);
  assert.deepEqual(pi.infills, []);
});

for (const [glob, excluded, sent] of require("./globs.json")) {
  test(`the glob ${glob}`, () => {
    const { matches } = require(`${FOLDER}/text.js`);
    assert.deepEqual(excluded.filter((path) => !matches(glob, path)), []);
    assert.deepEqual(sent.filter((path) => matches(glob, path)), []);
  });
}

desk("a setting that is one text instead of a list counts as well", async (at, pi) => {
  await ask(at, python("x = |"), ASKED);
  assert.deepEqual(pi.infills, []);
}, { exclude: "*.py" });

test("what a folder may set", () => {
  assert.equal(SETTINGS["cerebrum.url"].scope, "machine");
  const { untrustedWorkspaces } = PACKAGE.capabilities;
  assert.deepEqual(untrustedWorkspaces.restrictedConfigurations, ["cerebrum.exclude"]);
});

desk("a comparison, a language and a folder that are off are not sent", async (at, pi) => {
  at.activeTab = { input: new at.vscode.TabInputTextDiff() };
  await ask(at, python("x = |"));
  at.activeTab = undefined;
  at.settings.off = ["python"];
  await ask(at, python("x = |"));
  at.settings.off = [];
  at.workspace.set("off", true);
  await ask(at, python("x = |"));
  assert.deepEqual(pi.infills, []);
  assert.match(at.item.tooltip, /off/);
  at.workspace.set("off", false);
  await ask(at, python("x = |"));
  assert.equal(pi.infills.length, 1);
});

// ------------------------------------------------------------------------------------- the Pi, its key

desk("one error is one notice, and a Pi that returns is used", async (at, pi) => {
  await pi.stop();
  for (const text of ["a|", "ab|", "abc|"]) {
    assert.deepEqual(await ask(at, python(text)), []);
    assert.ok(at.provider.status.awayUntil > Date.now());
    if (text !== "ab|") at.provider.status.awayUntil = 0; // some seconds later
  }
  assert.equal(at.shown.filter((line) => line.startsWith("log")).length, 2);
  const notices = at.shown.filter((line) => line.startsWith("warning"));
  assert.deepEqual(notices, [`warning: Cerebrum: no Pi answers at 127.0.0.1:${pi.port} (ECONNREFUSED)`]);
  assert.match(at.item.tooltip, /no Pi/);
  const { port } = pi;
  Object.assign(pi, new Pi());
  await pi.start(port);
  assert.deepEqual(texts(await ask(at, python("abcd|"), ASKED)), ["return 1"]);
  assert.match(at.item.text, /check/);
});

desk("a Pi that is away says so in many ways, and is one trouble", async (at, pi) => {
  for (const percent of [84, 91]) {
    pi.answers["/infill"] = [503, { error: { message: `got ${percent} %, see [this](command:x)` } }];
    await ask(at, python(`${percent}|`));
    at.provider.status.awayUntil = 0;
  }
  const notices = at.shown.filter((line) => line.startsWith("warning"));
  assert.deepEqual(notices, ["warning: Cerebrum: the Pi answers 503: got 84 %, see  this (command:x)"]);
});

desk("a connection that never came about is news even if the user has typed on", async (at, pi) => {
  await pi.stop();
  const token = new Token();
  const items = ask(at, python("x = |"), ASKED, token);
  token.cancel();
  assert.deepEqual(await items, []);
  assert.match(at.item.tooltip, /no Pi answers/);
  assert.ok(at.provider.status.awayUntil > Date.now());
});

desk("an endless answer is another program's", async (at, pi) => {
  pi.answers["/infill"] = (_asked, response) => {
    const more = () => !response.destroyed && response.write("x".repeat(100_000), () => setImmediate(more));
    more();
  };
  assert.deepEqual(await ask(at, python("x = |")), []);
  assert.match(at.item.tooltip, /another program/);
  await until(() => pi.left === 1);
});

for (const url of ["pi.local:7000", "http://a@b", "http://a/?x", "http://a:0", "ftp://a", `http://${"a".repeat(201)}`]) {
  desk(`${url.slice(0, 20)} is no address`, async (at, pi) => {
    await until(() => at.shown.length);
    const expected = "expected an address such as http://pi.local:7000";
    assert.deepEqual(at.shown, [`log: ${expected} in the setting cerebrum.url`, `warning: Cerebrum: ${expected} in the setting cerebrum.url`]);
    at.answers = ["Yes"];
    await at.links.handleUri(Uri.parse(`vscode://cerebrum.cerebrum/connect?url=${encodeURIComponent(url)}`));
    assert.equal(at.shown.length, 2);
    assert.deepEqual(pi.asked, []);
  }, { url });
}

desk("a wrong key is said as such, and a busy Pi is no news", async (at, pi) => {
  pi.answers["/infill"] = [429, { error: { message: "all places are taken" } }];
  assert.deepEqual(await ask(at, python("x = |")), []);
  assert.deepEqual(at.shown, []);
  pi.answers["/infill"] = [401, { error: { message: "x" } }];
  await ask(at, python("x = |"));
  assert.equal(at.shown.at(-1), "warning: Cerebrum: the Pi asks for a key, or for another one");
  assert.match(at.item.text, /key/);
});

desk("a key is a secret of its address", async (at, pi) => {
  at.answers = [pi.url, " k1 "];
  await at.vscode.commands.executeCommand("cerebrum.connect");
  at.answers = [pi.url, ""]; // keeps it
  await at.vscode.commands.executeCommand("cerebrum.connect");
  assert.equal(at.shown.at(-1), `box: The key for ${pi.url}; leave it empty to keep the present one`);
  assert.deepEqual([...at.secrets], [[`key of ${pi.url}/`, "k1"]]);
  assert.equal(JSON.stringify(at.settings).includes("k1"), false);
  await ask(at, python("x = |"));
  assert.equal(pi.asked.at(-1).key, "Bearer k1");
  const other = await new Pi().start();
  at.settings.url = other.url;
  await ask(at, python("y = |"));
  assert.equal(other.asked.at(-1).key, "");
  await other.stop();
});

const CONNECTIONS = [
  ["a wrong key", { "/v1/stats": [401, {}] }, "the Pi asks for a key, or for another one"],
  ["another program", { "/health": [200, "<html>"] }, "the address is another program's: its answer is not JSON"],
  ["another API", { "/health": [200, { ok: true }] }, "the address is another program's, not a Pi's"],
  ["no backend", { "/health": [503, { vps_available: false, message: "x" }] }, "the Pi answers, but has no backend now"],
];
for (const [name, answers, problem] of CONNECTIONS) {
  desk(`connecting says what is wrong: ${name}`, async (at, pi) => {
    const other = await new Pi().start();
    Object.assign(other.answers, answers);
    at.answers = [other.url, "", undefined];
    await at.vscode.commands.executeCommand("cerebrum.connect");
    assert.equal(at.shown.at(-1), `warning: Cerebrum: ${problem}`);
    assert.equal(at.settings.url, pi.url); // as before
    at.answers = [other.url, "", "Use it anyway"];
    const before = at.shown.length;
    await at.vscode.commands.executeCommand("cerebrum.connect");
    assert.equal(at.settings.url, other.url);
    assert.equal(at.shown.slice(before).filter((line) => line.startsWith("warning")).length, 1);
    assert.ok(at.item.tooltip.includes(problem));
    await other.stop();
  });
}

desk("connecting says that no Pi is there, and can be given up", async (at, pi) => {
  const other = await new Pi().start();
  await other.stop();
  at.answers = [other.url, "", undefined];
  await at.vscode.commands.executeCommand("cerebrum.connect");
  assert.equal(at.shown.at(-1), `warning: Cerebrum: no Pi answers at 127.0.0.1:${other.port} (ECONNREFUSED)`);
  pi.answers["/health"] = () => {}; // accepts, and says nothing
  at.cancels = (token) => void until(() => pi.asked.at(-1).path === "/health").then(() => token.cancel());
  pi.asked = [{}];
  at.answers = [pi.url, "", undefined];
  await at.vscode.commands.executeCommand("cerebrum.connect");
  assert.equal(at.shown.at(-1), "warning: Cerebrum: the Pi was not waited for");
});

const [TRUSTED, TRUSTED_KEY, STRANGE, STRANGE_KEY] = (process.env.CERTIFICATES ?? "").split(" ").map((file) => file && fs.readFileSync(file));
for (const [what, tls, host, problem] of [
  ["of a CA that the system knows", { cert: TRUSTED, key: TRUSTED_KEY }, "127.0.0.2", ""],
  ["of another name", { cert: TRUSTED, key: TRUSTED_KEY }, "localhost",
    "has the certificate of another name (ERR_TLS_CERT_ALTNAME_INVALID)"],
  ["of a CA that the system does not know", { cert: STRANGE, key: STRANGE_KEY }, "127.0.0.1",
    "has a certificate of a CA that the system does not know (DEPTH_ZERO_SELF_SIGNED_CERT)"],
  ["that is not there", undefined, "127.0.0.1", "does not speak https (EPROTO)"],
]) {
  desk(`a certificate ${what}`, async (at) => {
    const other = await new Pi(tls).start(0, "0.0.0.0");
    const url = `https://${host}:${other.port}`;
    at.answers = [url, "", undefined];
    await at.vscode.commands.executeCommand("cerebrum.connect");
    if (problem) assert.equal(at.shown.at(-1), `warning: Cerebrum: the Pi at ${host}:${other.port} ${problem}`);
    else assert.equal(at.settings.url, url);
    await other.stop();
  });
}

desk("the authorities are read once, each one once", async (at) => {
  const made = [];
  const create = nodeTls.createSecureContext;
  nodeTls.createSecureContext = (options) => {
    if (options?.ca?.length > 1) made.push(options.ca);
    return create(options);
  };
  const other = await new Pi({ cert: TRUSTED, key: TRUSTED_KEY }).start(0, "0.0.0.0");
  at.settings.url = `https://127.0.0.2:${other.port}`;
  await ask(at, python("x = |"));
  await ask(at, python("y = |"));
  assert.equal(other.infills.length, 2);
  assert.equal(made.length, 1);
  assert.equal(new Set(made[0]).size, made[0].length);
  nodeTls.createSecureContext = create;
  await other.stop();
});

desk("settings that cannot be written leave the key as it was", async (at, pi) => {
  const other = await new Pi().start();
  at.isBroken = true;
  at.answers = [other.url, "k"];
  await at.vscode.commands.executeCommand("cerebrum.connect");
  assert.equal(at.shown.at(-1), "warning: Cerebrum: VS Code cannot change its settings: unable to write");
  assert.deepEqual([at.settings.url, [...at.secrets]], [pi.url, []]);
  await other.stop();
});

desk("keys of addresses that are not set any more can be forgotten", async (at, pi) => {
  for (const url of [pi.url, "http://old.local:7000"]) at.secrets.set(`key of ${url}/`, "k");
  const forget = async () => {
    at.answers = ["$(trash) Forget the keys of other addresses"];
    await at.vscode.commands.executeCommand(at.item.command);
  };
  await forget();
  assert.deepEqual([...at.secrets], [[`key of ${pi.url}/`, "k"]]);
  at.settings.url = "";
  await forget();
  assert.deepEqual([...at.secrets], []);
});

desk("a keyring that fails leaves the address as it was", async (at, pi) => {
  const other = await new Pi().start();
  at.secrets.set = () => { throw new Error("no keyring"); };
  at.answers = [other.url, "k"];
  await at.vscode.commands.executeCommand("cerebrum.connect");
  assert.equal(at.settings.url, pi.url);
  assert.equal(at.shown.at(-1), "warning: Cerebrum: internal error; see the log");
  const before = pi.asked.length;
  at.changed.fire({ affectsConfiguration: () => true });
  await until(() => pi.asked.length > before); // it still looks
  await other.stop();
});

desk("a link changes nothing before the user agrees", async (at, pi) => {
  const other = await new Pi().start();
  const link = Uri.parse(`vscode://cerebrum.cerebrum/connect?url=${other.url}`);
  at.answers = [undefined];
  await at.links.handleUri(link);
  assert.equal(at.shown.at(-1), `modal info: Cerebrum: Use ${other.url} instead of ${pi.url}?`);
  assert.equal(at.settings.url, pi.url);
  // VS Code proposes the first button.
  at.answers = [(items) => (assert.deepEqual(items, ["No", "Yes"]), items[1]), "k2"];
  await at.links.handleUri(link);
  assert.equal(at.settings.url, other.url);
  assert.equal(at.secrets.get(`key of ${other.url}/`), "k2");
  const shown = at.shown.length;
  for (const bad of ["/connect?url=file:///x", "/connect?url=javascript:1", "/connect", "/other?url=http://a"]) {
    await at.links.handleUri(Uri.parse(`vscode://cerebrum.cerebrum${bad}`));
  }
  assert.equal(at.shown.length, shown);
  await other.stop();
});

desk("an extension older than the Pi says so once", async (at, pi) => {
  at.provider.home.version = "1.9.0";
  for (const version of ["1.8.2", "1.9.0", "", "x", "1.10.0", "1.10.0"]) {
    pi.answers["/v1/stats"] = [200, { version }];
    at.answers = [pi.url, "", "How to update"];
    await at.vscode.commands.executeCommand("cerebrum.connect");
  }
  const said = at.shown.filter((line) => line.startsWith("info"));
  assert.deepEqual(said, ["info: Cerebrum: the Pi has version 1.10.0 of this extension, here is 1.9.0"]);
  assert.equal(at.opened.length, 1);
});

desk("the status bar's menu", async (at, pi) => {
  assert.ok(at.item.isShown);
  at.vscode.window.activeTextEditor = { document: python("") };
  const menu = (label) => {
    at.answers = [label];
    return at.vscode.commands.executeCommand(at.item.command);
  };
  await menu("$(globe) The Pi's page");
  assert.deepEqual(at.opened, [Uri.parse(pi.url).toString()]);
  await menu("$(output) Log");
  assert.equal(at.shown.at(-1), "the log");
  await menu("$(circle-slash) Off here");
  assert.equal(at.workspace.get("off"), true);
  await menu("$(check) On here");
  assert.equal(at.workspace.get("off"), false);
  at.own.off = ["ruby"]; // and the folder turns off others
  at.settings.off = ["sql"];
  await menu("$(circle-slash) Off for python");
  assert.deepEqual(at.settings.off, ["ruby", "python"]);
  at.own = {};
  await menu("$(check) On for python");
  assert.deepEqual(at.settings.off, ["ruby"]);
  at.settings.off = "python"; // one text instead of a list
  await menu("$(check) On for python");
  assert.deepEqual(at.settings.off, []);
  await menu("$(plug) Connect…");
  assert.equal(at.shown.at(-1), "box: The Pi's address");
});

// ------------------------------------------------------------------------------- change a selection

const DONE = { done: true, finish_reason: "stop", kept: { parts: ["all"] } };
const sse = (...events) => (_asked, response) => {
  response.writeHead(200, { "Content-Type": "text/event-stream" });
  for (const event of events) response.write(`data: ${JSON.stringify(event)}\n\n`);
  response.end();
};

/** Select the text between two `|` of a document. */
function select(at, text, uri) {
  const [before, selected, after] = text.split("|");
  const document = python(before + selected + after, uri);
  const place = (offset) => {
    const lines = document.text.slice(0, offset).split("\n");
    return new Position(lines.length - 1, lines.at(-1).length);
  };
  const selection = new Selection(place(before.length), place(before.length + selected.length));
  at.vscode.window.activeTextEditor = { document, selection };
  return document;
}

const change = (at) => at.vscode.commands.executeCommand("cerebrum.changeSelection");

desk("a selection is changed as a whole, after its difference was shown", async (at, pi) => {
  const document = select(at, "a\r\n|b = 1\r\n|c\r\n");
  pi.answers["/v1/complete/stream"] = sse({ token: "b = " }, { token: "2\n\n" }, DONE);
  at.answers = ["two", (items) => {
    assert.equal(at.tabs.length, 1);
    assert.equal(document.text, "a\r\nb = 1\r\nc\r\n");
    return items[0];
  }];
  await change(at);
  const { prompt, instruction, language, max_tokens, temperature } = pi.asked.at(-1).body;
  assert.deepEqual([prompt, instruction, language, max_tokens, temperature], ["b = 1\n", "two", "python", 2048, 0]);
  assert.deepEqual(at.previews.slice(0, 2), ["b = ", "b = 2\n\n"]);
  assert.equal(document.text.replace(/\r\n/g, "\n"), "a\nb = 2\nc\n");
  assert.deepEqual(at.tabs, []);
});

const LACKING = [ // the last event, and what is said
  [{ ...DONE, finish_reason: "length" }, "the answer is longer than 2048 tokens"],
  [{ ...DONE, finish_reason: "repeat" }, "the model began to repeat itself"],
  [{ ...DONE, finish_reason: "preempted" }, "the answer broke off"],
  [{ ...DONE, kept: { parts: ["window"] } }, "the text is too long for the model"],
  [{ token: " = 2" }, "the connection ended before the answer did"],
];
for (const [last, why] of LACKING) {
  desk(`an answer that is not whole changes nothing: ${why}`, async (at, pi) => {
    const document = select(at, "|b = 1|");
    pi.answers["/v1/complete/stream"] = sse({ token: "b" }, last);
    at.answers = ["two"];
    await change(at);
    assert.equal(document.text, "b = 1");
    assert.equal(at.shown.at(-1), `warning: Cerebrum: ${why}; nothing was changed`);
    assert.deepEqual(at.tabs, []);
  });
}

desk("a text that changed meanwhile, or a user who declines, changes nothing", async (at, pi) => {
  pi.answers["/v1/complete/stream"] = sse({ token: "x" }, DONE);
  for (const [answer, left] of [["Discard", "b = 1"], [(items) => { document.text += "0"; return items[0]; }, "b = 10"]]) {
    var document = select(at, "|b = 1|");
    at.answers = ["two", answer];
    await change(at);
    assert.equal(document.text, left);
  }
  assert.equal(at.shown.at(-1), "warning: Cerebrum: the text has changed meanwhile; nothing was changed");
  assert.match(at.item.tooltip, /ready/); // the Pi is not away
  at.refusesEdits = true;
  document = select(at, "|b = 1|");
  at.answers = ["two", "Apply"];
  await change(at);
  assert.equal(at.shown.at(-1), "warning: Cerebrum: VS Code did not apply the change");
});

desk("the buttons above the difference decide as well, and so does closing it", async (at, pi) => {
  pi.answers["/v1/complete/stream"] = sse({ token: "x" }, DONE);
  const cases = [
    [(uri) => at.vscode.commands.executeCommand("cerebrum.apply", uri), "x"],
    [(uri) => at.vscode.commands.executeCommand("cerebrum.discard", uri), "b = 1"],
    [() => at.vscode.window.tabGroups.close(at.tabs), "b = 1"],
  ];
  for (const [decide, text] of cases) {
    const document = select(at, "|b = 1|");
    const asked = "info: Cerebrum: apply this change?";
    at.shown = [];
    at.answers = ["two", undefined]; // the message is not answered
    const changed = change(at);
    await until(() => at.shown.includes(asked));
    await decide(at.tabs[0].input.modified);
    await changed;
    assert.equal(document.text, text);
    assert.deepEqual([at.tabs, at.preview.texts.size], [[], 0]);
  }
});

desk("two differences are decided each by itself", async (at, pi) => {
  pi.answers["/v1/complete/stream"] = sse({ token: "x" }, DONE);
  const run = (name, ...given) => at.vscode.commands.executeCommand(`cerebrum.${name}`, ...given);
  const documents = [];
  const changed = [];
  for (const uri of ["file:///a.py", "file:///b.py"]) {
    documents.push(select(at, "|b = 1|", uri));
    at.answers = ["two", undefined];
    changed.push(change(at));
    const asked = () => at.shown.filter((line) => line.endsWith("apply this change?")).length;
    await until(() => asked() === documents.length);
  }
  const [first, second] = at.tabs.map((tab) => tab.input.modified);
  at.vscode.window.activeTextEditor = { document: documents[0] };
  await run("apply", first);
  await changed[0];
  assert.deepEqual(documents.map(({ text }) => text), ["x", "b = 1"]);
  assert.deepEqual(at.tabs.map((tab) => tab.input.modified), [second]);
  await run("apply"); // from the palette, for the one in front
  assert.equal(documents[1].text, "b = 1");
  at.activeTab = at.tabs[0];
  at.vscode.window.activeTextEditor = { document: documents[1] };
  await run("apply");
  await changed[1];
  assert.equal(documents[1].text, "x");
});

desk("closing a difference while it is written ends its request", async (at, pi) => {
  const document = select(at, "|b = 1|");
  pi.answers["/v1/complete/stream"] = (_asked, response) => response.writeHead(200).write('data: {"token": "b"}\n\n');
  at.answers = ["two"];
  const changed = change(at);
  await until(() => at.previews.at(-1) === "b");
  await at.vscode.commands.executeCommand("cerebrum.apply", at.tabs[0].input.modified); // not yet
  await at.vscode.window.tabGroups.close(at.tabs);
  await changed;
  await until(() => pi.left === 1);
  assert.equal(document.text, "b = 1");
  assert.deepEqual(at.shown.filter((line) => line.startsWith("warning")), []);
});

desk("in comparisons, merges and what else has no type nothing is sent", async (at, pi) => {
  const asked = pi.asked.length;
  for (const input of [new at.vscode.TabInputTextDiff(), new at.vscode.TabInputNotebookDiff(), undefined]) {
    at.activeTab = { input };
    select(at, "|b = 1|");
    await change(at);
    assert.match(at.shown.at(-1), /^warning: Cerebrum: this text is never sent/);
    assert.deepEqual(await ask(at, python("x = |"), ASKED), []);
  }
  assert.equal(pi.asked.length, asked);
  for (const kind of [at.vscode.TabInputText, at.vscode.TabInputNotebook]) {
    at.activeTab = { input: new kind() };
    assert.deepEqual(texts(await ask(at, python("x = |"), ASKED)), ["return 1"]);
  }
});

desk("only code is changed", async (at, pi) => {
  const asked = pi.asked.length;
  select(at, "||b = 1");
  await change(at);
  assert.equal(at.shown.at(-1), "warning: Cerebrum: expected a selection: select the code to change");
  for (const uri of ["output:log", "file:///work/.env"]) {
    select(at, "|b = 1|", uri);
    await change(at);
    assert.match(at.shown.at(-1), /^warning: Cerebrum: this text is never sent/);
  }
  assert.equal(pi.asked.length, asked);
});

desk("a stream that is no JSON ends at once", async (at, pi) => {
  select(at, "|b = 1|");
  pi.answers["/v1/complete/stream"] = (_asked, response) => response.writeHead(200).write('data: {"token": \n\n');
  at.answers = ["two"];
  await change(at);
  assert.equal(at.shown.at(-1), "warning: Cerebrum: the address is another program's: its answer is not JSON");
  await until(() => pi.left === 1);
});

desk("a stream that is cancelled changes nothing", async (at, pi) => {
  const document = select(at, "|b = 1|");
  pi.answers["/v1/complete/stream"] = (_asked, response) => response.writeHead(200).write('data: {"token": "b"}\n\n');
  at.cancels = (token) => void until(() => at.previews.at(-1) === "b").then(() => token.cancel());
  at.answers = ["two"];
  await change(at);
  await until(() => pi.left === 1);
  assert.ok(at.shown.length > 0);
  assert.deepEqual(at.shown.filter((line) => line.startsWith("warning")), []);
  assert.deepEqual([document.text, at.tabs], ["b = 1", []]);
});
