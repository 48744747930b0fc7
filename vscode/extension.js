// @ts-check
"use strict";
// Completions as ghost text from the Pi at home.

const vscode = require("vscode");
const { ask, BUSY, check, NO_PI, PiError, read } = require("./pi");
const { clip, matches, Suggestions, typedSince, unix } = require("./text");
const { changeSelection, Preview, SCHEME, withProgress } = require("./change");

const AWAY_MS = 5_000; // between two automatic requests to a Pi that does not answer
const STUCK_MS = 500; // a connection that takes longer is waited for
const READ_DELAY_MS = 300; // the cursor has not moved for so long when the Pi reads there
const PROMPT_MS = 500; // limits what is read for an automatic request
const PREDICT_MS = 1500; // a completion that has a line ends after this time
// Of documents: not those of commit messages, comparisons, output and the like.
const SCHEMES = ["file", "untitled", "vscode-notebook-cell", "vscode-remote", "vscode-vfs"];
const NO_CODE = ["git-commit", "git-rebase"]; // git opens these as files
const STATES = {
  ready: ["$(check)", "ready"],
  writing: ["$(loading~spin)", "writing"],
  unsure: ["$(question)", "not sure of a completion here"],
  off: ["$(circle-slash)", "off here"],
  away: ["$(debug-disconnect)", "no Pi"],
  key: ["$(key)", "no key"],
};

/** @typedef {import("./text").Suggestion} Suggestion */

const settings = () => vscode.workspace.getConfiguration("cerebrum");

/** The Pi's address, which is the user's setting, and the key that came with it. */
class Home {
  /** @param {vscode.ExtensionContext} context */
  constructor(context) {
    this.secrets = context.secrets;
    this.version = String(context.extension.packageJSON.version);
  }

  get url() {
    return String(settings().get("url", "")).trim();
  }

  async pi() {
    const { url, version } = this;
    if (!url) throw new PiError(0, "no Pi is set: run “Cerebrum: Connect”");
    const problem = problemOf(url);
    if (problem) throw new PiError(0, `${problem} in the setting cerebrum.url`);
    return { url, version, key: await this.keyOf(url) };
  }

  /** @param {string} url */
  async keyOf(url) {
    return (await this.secrets.get(secretOf(url))) ?? "";
  }

  /** @param {string} url @param {string} key */
  async set(url, key) {
    const name = secretOf(url);
    const old = await this.secrets.get(name);
    if (key) await this.secrets.store(name, key);
    try {
      await settings().update("url", url, vscode.ConfigurationTarget.Global);
    } catch (error) {
      await (old ? this.secrets.store(name, old) : this.secrets.delete(name));
      throw new PiError(200, `VS Code cannot change its settings: ${/** @type {Error} */ (error).message}`);
    }
  }

  /** Forget the keys of all other addresses. */
  async forgetOthers() {
    const own = problemOf(this.url) ? "" : secretOf(this.url);
    for (const name of await this.secrets.keys()) {
      if (name !== own) await this.secrets.delete(name);
    }
  }
}

/** A key belongs to the address that it came with. @param {string} url */
const secretOf = (url) => `key of ${new URL(url).href}`;

/** What is wrong with an address. One with a name before an `@` would look like another. @param {string} text */
function problemOf(text) {
  if (/^https?:\/\/[!-~]{1,200}$/i.test(text) && URL.canParse(text)) {
    const { username, password, search, hash, port } = new URL(text);
    if (!(username || password || search || hash || port === "0")) return undefined;
  }
  return "expected an address such as http://pi.local:7000";
}

/** What is wrong with a key. @param {string} text */
const problemOfKey = (text) => (/^[!-~]*$/.test(text.trim()) ? undefined : "expected visible ASCII characters");

/** The item of the status bar, and what the user was told of the Pi. */
class Status {
  constructor() {
    this.item = vscode.window.createStatusBarItem(vscode.StatusBarAlignment.Right, 100);
    this.item.name = "Cerebrum";
    this.item.command = "cerebrum.menu";
    this.log = vscode.window.createOutputChannel("Cerebrum");
    this.isOff = false; // for the text where the cursor is
    this.writing = 0; // requests
    /** @type {keyof typeof STATES} */
    this.state = "ready"; // of the Pi
    this.detail = "";
    this.told = ""; // the trouble that the user knows of
    this.awayUntil = 0;
    this.draw();
    this.item.show();
  }

  /** The Pi has answered. @param {keyof typeof STATES} [state] @param {string} [detail] */
  works(state = "ready", detail = "") {
    this.told = "";
    this.awayUntil = 0;
    this.show(state, detail);
  }

  /** @param {keyof typeof STATES} state @param {string} detail */
  show(state, detail) {
    this.state = state;
    this.detail = detail;
    this.draw();
  }

  /** @param {boolean} isOff */
  cover(isOff) {
    this.isOff = isOff;
    this.draw();
  }

  /** @param {number} change in the number of requests */
  write(change) {
    this.writing += change;
    this.draw();
  }

  draw() {
    const above = this.isOff ? "off" : this.writing ? "writing" : undefined;
    const [icon, words] = STATES[above ?? this.state];
    this.item.text = `${icon} Cerebrum`;
    this.item.tooltip = `Cerebrum: ${above ? words : this.detail || words}`;
  }

  /** One trouble is one notice, unless the user asked. @param {unknown} error @param {boolean} isAsked */
  async fail(error, isAsked) {
    const message = error instanceof PiError ? plain(error.message) : "internal error; see the log";
    const detail = error instanceof PiError ? message : String(error);
    this.log.appendLine(`${new Date().toISOString()} ${detail}`);
    const state = error instanceof PiError ? stateOf(error.status) : undefined;
    if (state) {
      this.awayUntil = Date.now() + AWAY_MS;
      this.show(state, message);
    }
    const trouble = state ?? message; // a Pi that is away may say so in many ways
    if (trouble === this.told && !isAsked) return;
    this.told = trouble;
    const buttons = state ? ["Connect"] : [];
    const chosen = await vscode.window.showWarningMessage(`Cerebrum: ${message}`, ...buttons);
    if (chosen) await vscode.commands.executeCommand("cerebrum.connect");
  }
}

/** What a status says of the Pi. @param {number} status @returns {"key" | "away" | undefined} */
function stateOf(status) {
  if (status === 401) return "key";
  return status === 0 || status >= 500 ? "away" : undefined;
}

/** A text of another machine for a message, where VS Code would make links of brackets. @param {string} text */
const plain = (text) => text.replace(/[[\]]/g, " ").slice(0, 300);

/** Ghost text: what is left of a suggestion, or else the Pi's answer. */
class Completions {
  /** @param {Home} home @param {Status} status @param {vscode.Memento} here */
  constructor(home, status, here) {
    this.home = home;
    this.status = status;
    this.here = here; // what this workspace remembers
    this.suggestions = new Suggestions();
    /** @type {WeakMap<vscode.TextDocument, number>} */
    this.deleted = new WeakMap(); // the line of a document's latest edit, if that only removed text
    /** @type {Set<{began: number}>} */
    this.connecting = new Set();
    /** @type {NodeJS.Timeout | undefined} */
    this.reading = undefined; // waits until the cursor stays
  }

  /**
   * @param {vscode.TextDocument} document @param {vscode.Position} position
   * @param {vscode.InlineCompletionContext} context @param {vscode.CancellationToken} token
   */
  async provideInlineCompletionItems(document, position, context, token) {
    const isAsked = context.triggerKind === vscode.InlineCompletionTriggerKind.Invoke;
    const isOff = this.isOff(document);
    this.status.cover(isOff);
    if (isOff) return [];
    // What VS Code's own menu would insert.
    const chosen = context.selectedCompletionInfo;
    const range = chosen?.range ?? new vscode.Range(position, position);
    const inserted = chosen?.text ?? "";
    const gap = gapOf(document, range, inserted);
    const editor = vscode.window.activeTextEditor;
    const isSelected = editor?.document === document && !editor.selection.isEmpty;
    const isDeletion = this.deleted.get(document) === position.line;
    if (!chosen) this.suggestions.show(gap, ""); // what a menu would insert is not typed
    // Unasked, nothing is shown with a selection or after a deletion, nor what was typed over twice.
    if (!isAsked && (isSelected || isDeletion)) return [];
    const found = await this.find(document, gap, isAsked, token);
    if (!found?.text || token.isCancellationRequested) return [];
    if (!chosen && this.suggestions.show(gap, found.text) > 1 && !isAsked) return [];
    const count = { characters: [...found.text].length };
    const command = { command: "cerebrum.accepted", title: "", arguments: [count] };
    return [new vscode.InlineCompletionItem(inserted + found.text, range, command)];
  }

  /** @param {vscode.TextDocumentChangeEvent} event */
  note({ document, contentChanges }) {
    for (const { text, range } of contentChanges) this.deleted.set(document, text ? -1 : range.start.line);
  }

  /** @param {vscode.TextDocument} document */
  isOff(document) {
    return (
      isPrivate(document) ||
      this.here.get("off", false) ||
      listOf("off").includes(document.languageId)
    );
  }

  /**
   * @param {vscode.TextDocument} document @param {import("./text").Gap} gap
   * @param {boolean} isAsked @param {vscode.CancellationToken} token
   * @returns {Promise<Suggestion | undefined>}
   */
  async find(document, gap, isAsked, token) {
    const rest = this.suggestions.rest(gap);
    // Who asks gets no empty or shortened one, but what the Pi has.
    if (rest && (!isAsked || (rest.text && !rest.unsure))) return rest;
    if (!isAsked) {
      if (this.isAway()) return undefined;
      await pause(this.suggestions.pause(gap), token);
      if (token.isCancellationRequested) return undefined;
    }
    return this.infill(document, gap, isAsked, token);
  }

  /** Have the Pi read where the cursor stays: the next key finds it read. */
  readSoon() {
    clearTimeout(this.reading);
    this.reading = setTimeout(() => void this.read().catch(() => {}), READ_DELAY_MS); // nobody waits for it
  }

  /** A limit of 0 tokens lets the Pi read a prompt when it has nothing else to do. */
  async read() {
    const editor = vscode.window.activeTextEditor;
    if (!editor?.selection.isEmpty || this.isOff(editor.document) || this.isAway()) return;
    const gap = gapOf(editor.document, editor.selection, "");
    const body = { ...bodyOf(editor.document, gap, false), n_predict: 0 };
    if (!settings().get("readAhead", true) || body.suggest === "never") return;
    if (typedSince(gap, this.suggestions.asked) !== undefined) return;
    this.suggestions.asked = gap;
    await ask(await this.home.pi(), "/infill", { body });
  }

  /** Whether the Pi is away, or a connection slow to come about: more of them would only wait as well. */
  isAway() {
    const now = Date.now();
    return now < this.status.awayUntil || [...this.connecting].some(({ began }) => now - began > STUCK_MS);
  }

  /** @type {Completions["find"]} */
  async infill(document, gap, isAsked, token) {
    const abort = new AbortController();
    token.onCancellationRequested(() => abort.abort()); // the Pi stops computing
    const began = Date.now();
    const connection = { began };
    const onConnect = () => void this.connecting.delete(connection);
    const body = bodyOf(document, gap, isAsked);
    const { suggestions } = this;
    suggestions.asked = gap;
    clearTimeout(this.reading); // the Pi reads this place now
    this.status.write(1);
    this.connecting.add(connection);
    try {
      const given = { body, signal: abort.signal, onConnect };
      const answer = read(await ask(await this.home.pi(), "/infill", given));
      if (typeof answer.content !== "string") throw new PiError(0, NO_PI);
      const { content: text, unsure = false } = answer;
      const found = { text, unsure };
      if (!answer.replaced && !answer.preempted) suggestions.add(gap, found, Date.now() - began);
      this.status.works(unsure && !text ? "unsure" : "ready");
      return found;
    } catch (error) {
      const isPis = error instanceof PiError;
      const passes = isPis ? BUSY.includes(error.status) : abort.signal.aborted;
      if (!passes) void this.status.fail(error, isAsked);
      return undefined;
    } finally {
      this.status.write(-1);
      onConnect();
    }
  }
}

/** The fields of a request for a gap. @param {vscode.TextDocument} document @param {import("./text").Gap} gap @param {boolean} isAsked */
function bodyOf(document, gap, isAsked) {
  return {
    ...clip(gap),
    filename: nameOf(document),
    n_predict: settings().get("tokens") || 128, // 0 would ask for no text
    t_max_prompt_ms: isAsked ? 0 : PROMPT_MS,
    t_max_predict_ms: PREDICT_MS,
    cache_prompt: true,
    suggest: isAsked ? "always" : settings().get("suggest", "normal"),
  };
}

/** A setting that is a list of texts, or one of them. @param {string} name @returns {string[]} */
const listOf = (name) => [settings().get(name, [])].flat().map(String);

/** Whether a text is never sent. @param {vscode.TextDocument} document */
function isPrivate({ uri, languageId }) {
  if (!SCHEMES.includes(uri.scheme) || NO_CODE.includes(languageId)) return true;
  // Whatever else is in front compares or merges texts; not all such editors have a type here.
  const tab = vscode.window.tabGroups.activeTabGroup.activeTab;
  const isPlain = tab?.input instanceof vscode.TabInputText || tab?.input instanceof vscode.TabInputNotebook;
  return (tab && !isPlain) || listOf("exclude").some((glob) => matches(glob, uri.path));
}

/** @param {number} ms @param {vscode.CancellationToken} token */
const pause = (ms, token) =>
  new Promise((resolve) => {
    setTimeout(resolve, ms);
    token.onCancellationRequested(resolve);
  });

/**
 * The gap behind `inserted`, which stands for the text of a range. In a notebook, the cells above of
 * the same language precede it.
 * @param {vscode.TextDocument} document @param {vscode.Range} range @param {string} inserted
 */
function gapOf(document, range, inserted) {
  const start = new vscode.Range(new vscode.Position(0, 0), range.start);
  const end = new vscode.Range(range.end, document.lineAt(document.lineCount - 1).range.end);
  const above = cellsAbove(document).map((cell) => `${cell.getText().trimEnd()}\n\n`);
  const before = above.join("") + document.getText(start) + inserted;
  return { uri: document.uri.toString(), before: unix(before), after: unix(document.getText(end)) };
}

/** @param {vscode.TextDocument} document */
function cellsAbove(document) {
  const cells = notebookOf(document)?.getCells() ?? [];
  const documents = cells.map((cell) => cell.document);
  const above = documents.slice(0, Math.max(0, documents.indexOf(document)));
  return above.filter((cell) => cell.languageId === document.languageId);
}

/** @param {vscode.TextDocument} document */
function notebookOf(document) {
  const books = vscode.workspace.notebookDocuments;
  return books.find((book) => book.getCells().some((cell) => cell.document === document));
}

/** The name of a file; of a text without one, a name with its language's ending. @param {vscode.TextDocument} document */
function nameOf(document) {
  const name = document.uri.path.split("/").pop() ?? "";
  if (!document.isUntitled && document.uri.scheme !== "vscode-notebook-cell") return name;
  const languages = vscode.extensions.all.flatMap(
    (extension) => extension.packageJSON.contributes?.languages ?? [],
  );
  const ending = languages.find((one) => one.id === document.languageId && one.extensions?.length);
  return name.replace(/\.[^.]*$/, "") + (ending?.extensions[0] ?? "");
}

/** What the user does: connect, change, switch off. */
class Commands {
  /**
   * @param {vscode.ExtensionContext} context @param {Home} home @param {Status} status
   * @param {Preview} preview
   */
  constructor(context, home, status, preview) {
    this.context = context;
    this.home = home;
    this.status = status;
    this.preview = preview;
    this.isConnecting = false;
  }

  /**
   * Ask for an address and its key, and say what is wrong with them.
   * @param {string} [given] @returns {Promise<void>}
   */
  async connect(given) {
    const url = given ?? (await this.askForUrl());
    if (!url) return;
    const known = await this.home.keyOf(url);
    const empty = known ? "to keep the present one" : "if the Pi asks for none";
    const key = await vscode.window.showInputBox({
      prompt: `The key for ${url}; leave it empty ${empty}`,
      password: true,
      validateInput: problemOfKey,
      ignoreFocusOut: true,
    });
    if (key === undefined) return;
    const pi = { url, key: key.trim() || known, version: this.home.version };
    const problem = await problemWith(pi);
    if (problem) {
      const buttons = ["Try again", "Use it anyway"];
      const chosen = await vscode.window.showWarningMessage(`Cerebrum: ${problem}`, ...buttons);
      if (chosen === buttons[0]) return this.connect(given);
      if (!chosen) return;
    }
    this.isConnecting = true;
    try {
      await this.home.set(url, pi.key);
    } finally {
      this.isConnecting = false;
    }
    if (problem) this.status.show("away", problem);
    else await this.look();
  }

  async askForUrl() {
    return vscode.window.showInputBox({
      prompt: "The Pi's address",
      value: this.home.url || "http://pi.local:7000",
      validateInput: problemOf,
      ignoreFocusOut: true,
    });
  }

  /** A link of the Pi's page. It has an address, and changes nothing before the user agrees. @param {vscode.Uri} link */
  async follow(link) {
    const url = new URLSearchParams(link.query).get("url") ?? "";
    if (link.path !== "/connect" || problemOf(url)) return;
    const old = this.home.url;
    const question = old ? `Use ${url} instead of ${old}?` : `Use ${url}?`;
    const options = { modal: true };
    const chosen = await vscode.window.showInformationMessage(`Cerebrum: ${question}`, options, "No", "Yes");
    if (chosen === "Yes") await this.connect(url);
  }

  /** Ask the Pi how it is, so that the user sees it before the first completion. */
  async look() {
    if (this.isConnecting) return;
    try {
      const { problem, version } = await check(await this.home.pi());
      this.status.works(problem ? "away" : "ready", problem);
      await this.compare(version);
    } catch (error) {
      await this.status.fail(error, false);
    }
  }

  /** Say once that the Pi has a newer extension. @param {string} version of the Pi */
  async compare(version) {
    const told = this.context.globalState.get("told", "");
    if (!isOlder(this.home.version, version) || told === version) return;
    await this.context.globalState.update("told", version);
    const words = `the Pi has version ${version} of this extension, here is ${this.home.version}`;
    const button = "How to update";
    const chosen = await vscode.window.showInformationMessage(`Cerebrum: ${words}`, button);
    if (chosen) await this.openPage();
  }

  async openPage() {
    if (problemOf(this.home.url)) return this.connect();
    await vscode.env.openExternal(vscode.Uri.parse(this.home.url));
  }

  async change() {
    const editor = vscode.window.activeTextEditor;
    if (!editor || editor.selection.isEmpty) {
      throw new PiError(200, "expected a selection: select the code to change");
    }
    if (isPrivate(editor.document)) {
      throw new PiError(200, "this text is never sent; the setting cerebrum.exclude has the names of files");
    }
    await changeSelection(await this.home.pi(), this.preview, editor);
    this.status.works();
  }

  /** @param {{characters: number}} body */
  async accepted(body) {
    await ask(await this.home.pi(), "/v1/accepted", { body }).catch(() => {}); // only a count
  }

  async menu() {
    const language = vscode.window.activeTextEditor?.document.languageId;
    const here = this.context.workspaceState;
    const off = [settings().inspect("off")?.globalValue ?? []].flat();
    const isOff = language !== undefined && listOf("off").includes(language);
    const others = off.filter((/** @type {string} */ one) => one !== language);
    const update = (/** @type {string[]} */ value) =>
      settings().update("off", value, vscode.ConfigurationTarget.Global);
    const items = [
      { label: "$(globe) The Pi's page", run: () => this.openPage() },
      { label: "$(plug) Connect…", run: () => this.connect() },
      { label: "$(output) Log", run: async () => this.status.log.show() },
      { label: "$(trash) Forget the keys of other addresses", run: () => this.home.forgetOthers() },
      {
        label: here.get("off", false) ? "$(check) On here" : "$(circle-slash) Off here",
        run: async () => here.update("off", !here.get("off", false)),
      },
    ];
    if (language !== undefined) {
      const label = isOff ? `$(check) On for ${language}` : `$(circle-slash) Off for ${language}`;
      items.push({ label, run: async () => update(isOff ? others : [...others, language]) });
    }
    const title = String(this.status.item.tooltip);
    const chosen = await vscode.window.showQuickPick(items, { title });
    await chosen?.run();
  }
}

/** What is wrong with a Pi, "" for nothing. @param {{url: string, key: string, version: string}} pi */
async function problemWith(pi) {
  try {
    const checked = await withProgress(`asking ${pi.url}`, (signal) => check(pi, signal));
    return checked ? checked.problem : "the Pi was not waited for";
  } catch (error) {
    return error instanceof PiError ? plain(error.message) : String(error);
  }
}

/** Whether one version is older than another, as numbers with dots. @param {string} ours @param {string} other */
function isOlder(ours, other) {
  return /^\d+(\.\d+)*$/.test(other) && ours.localeCompare(other, "en", { numeric: true }) < 0;
}

/** @param {vscode.ExtensionContext} context */
function activate(context) {
  const home = new Home(context);
  const status = new Status();
  const preview = new Preview();
  const commands = new Commands(context, home, status, preview);
  const completions = new Completions(home, status, context.workspaceState);
  const asked = "editor.action.inlineSuggest.trigger";
  /** @type {[string, (...given: any[]) => any][]} */
  const known = [
    ["connect", () => commands.connect()],
    ["suggest", () => vscode.commands.executeCommand(asked)],
    ["changeSelection", () => commands.change()],
    ["menu", () => commands.menu()],
    ["accepted", (count) => commands.accepted(count)],
    ["apply", (uri) => preview.decide(true, uri)],
    ["discard", (uri) => preview.decide(false, uri)],
  ];
  const register = (/** @type {[string, (...given: any[]) => any]} */ [name, run]) =>
    vscode.commands.registerCommand(`cerebrum.${name}`, async (...given) => {
      try {
        await run(...given);
      } catch (error) {
        await status.fail(error, true);
      }
    });
  context.subscriptions.push(
    status.item,
    status.log,
    preview.changed,
    ...known.map(register),
    vscode.languages.registerInlineCompletionItemProvider({ pattern: "**" }, completions),
    vscode.workspace.registerTextDocumentContentProvider(SCHEME, preview),
    vscode.window.registerUriHandler({ handleUri: (link) => commands.follow(link) }),
    vscode.workspace.onDidChangeTextDocument((event) => completions.note(event)),
    vscode.window.onDidChangeActiveTextEditor(() => completions.readSoon()),
    vscode.window.onDidChangeTextEditorSelection(() => completions.readSoon()),
    { dispose: () => clearTimeout(completions.reading) },
    vscode.workspace.onDidChangeConfiguration((event) => {
      if (event.affectsConfiguration("cerebrum")) completions.suggestions = new Suggestions();
      if (event.affectsConfiguration("cerebrum.url")) void commands.look();
    }),
    context.secrets.onDidChange(() => void commands.look()),
  );
  void commands.look();
  completions.readSoon();
}

module.exports = { activate };
