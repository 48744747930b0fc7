// @ts-check
"use strict";
// Completions as ghost text from the Pi at home.

const vscode = require("vscode");
const { ask, BUSY, check, NO_PI, PiError, read } = require("./pi");
const { matches, sent, Suggestions, unix } = require("./text");
const { changeSelection, Preview, SCHEME } = require("./change");

const AWAY_MS = 5_000; // between two automatic requests to a Pi that does not answer
const READ_MS = 500; // limits what is read for an automatic request
const PREDICT_MS = 1500; // a completion that has a line ends after this time
// Of documents: not those of commit messages, comparisons, output and the like.
const SCHEMES = ["file", "untitled", "vscode-notebook-cell", "vscode-remote", "vscode-vfs"];
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
    return { url, version, key: (await this.secrets.get(secretOf(url))) ?? "" };
  }

  /** @param {string} url @param {string} key */
  async set(url, key) {
    await settings().update("url", url, vscode.ConfigurationTarget.Global);
    if (key) await this.secrets.store(secretOf(url), key);
    else await this.secrets.delete(secretOf(url));
  }
}

/** A key belongs to the address that it came with. @param {string} url */
const secretOf = (url) => `key of ${new URL(url).href}`;

/** @param {string} text */
function problemOf(text) {
  const isUrl = /^https?:\/\/[!-~]+$/i.test(text) && URL.canParse(text);
  return isUrl ? undefined : "expected an address such as http://pi.local:7000";
}

/** The item of the status bar, and what the user was told. */
class Status {
  constructor() {
    this.item = vscode.window.createStatusBarItem(vscode.StatusBarAlignment.Right, 100);
    this.item.name = "Cerebrum";
    this.item.command = "cerebrum.menu";
    this.log = vscode.window.createOutputChannel("Cerebrum");
    this.told = "";
    this.show("ready");
    this.item.show();
  }

  /** @param {keyof typeof STATES} state @param {string} [detail] */
  show(state, detail) {
    const [icon, words] = STATES[state];
    this.state = state;
    this.item.text = `${icon} Cerebrum`;
    this.item.tooltip = `Cerebrum: ${detail ?? words}`;
  }

  /** The Pi answers. */
  works() {
    this.told = "";
  }

  /** One error is one notice, unless the user asked. @param {unknown} error @param {boolean} isAsked */
  async fail(error, isAsked) {
    const message = error instanceof PiError ? error.message : "internal error; see the log";
    const detail = error instanceof PiError ? message : String(error);
    this.log.appendLine(`${new Date().toISOString()} ${detail}`);
    this.show(error instanceof PiError && error.status === 401 ? "key" : "away", message);
    if (message === this.told && !isAsked) return;
    this.told = message;
    const button = "Connect";
    const chosen = await vscode.window.showWarningMessage(`Cerebrum: ${message}`, button);
    if (chosen) await vscode.commands.executeCommand("cerebrum.connect");
  }
}

/** Ghost text: what is left of a suggestion, or else the Pi's answer. */
class Completions {
  /** @param {Home} home @param {Status} status @param {vscode.Memento} here */
  constructor(home, status, here) {
    this.home = home;
    this.status = status;
    this.here = here; // what this workspace remembers
    this.suggestions = new Suggestions();
    this.awayUntil = 0;
  }

  /**
   * @param {vscode.TextDocument} document @param {vscode.Position} position
   * @param {vscode.InlineCompletionContext} context @param {vscode.CancellationToken} token
   */
  async provideInlineCompletionItems(document, position, context, token) {
    const isAsked = context.triggerKind === vscode.InlineCompletionTriggerKind.Invoke;
    if (this.isOff(document)) {
      this.status.show("off");
      return [];
    }
    if (this.status.state === "off") this.status.show("ready");
    // What VS Code's own menu would insert.
    const chosen = context.selectedCompletionInfo;
    const range = chosen?.range ?? new vscode.Range(position, position);
    const inserted = chosen?.text ?? "";
    const gap = gapOf(document, range, inserted);
    const found = await this.find(document, gap, isAsked, token);
    if (!found?.text) return [];
    const count = { characters: found.text.length, confidence: found.confidence };
    const command = { command: "cerebrum.accepted", title: "", arguments: [count] };
    return [new vscode.InlineCompletionItem(inserted + found.text, range, command)];
  }

  /** @param {vscode.TextDocument} document */
  isOff(document) {
    const tab = vscode.window.tabGroups.activeTabGroup.activeTab;
    return (
      !SCHEMES.includes(document.uri.scheme) ||
      tab?.input instanceof vscode.TabInputTextDiff ||
      this.here.get("off", false) ||
      settings().get("off", /** @type {string[]} */ ([])).includes(document.languageId) ||
      isExcluded(document)
    );
  }

  /**
   * @param {vscode.TextDocument} document @param {import("./text").Gap} gap
   * @param {boolean} isAsked @param {vscode.CancellationToken} token
   * @returns {Promise<Suggestion | undefined>}
   */
  async find(document, gap, isAsked, token) {
    const known = this.rest(gap, isAsked);
    if (known) return known;
    if (!isAsked) {
      if (Date.now() < this.awayUntil) return undefined;
      await pause(this.suggestions.pause(), token);
      if (token.isCancellationRequested) return undefined;
      const typed = this.rest(gap, isAsked); // of an older request that was still running
      if (typed) return typed;
    }
    return this.infill(document, gap, isAsked, token);
  }

  /**
   * The rest of a suggestion. Who asks gets no empty or shortened one: the Pi is asked.
   * @param {import("./text").Gap} gap @param {boolean} isAsked
   */
  rest(gap, isAsked) {
    const rest = this.suggestions.rest(gap);
    return !isAsked || (rest?.text && !rest.unsure) ? rest : undefined;
  }

  /** @type {Completions["find"]} */
  async infill(document, gap, isAsked, token) {
    const abort = new AbortController();
    token.onCancellationRequested(() => abort.abort()); // the Pi stops computing
    const began = Date.now();
    const body = {
      ...sent(gap),
      filename: nameOf(document),
      n_predict: settings().get("tokens", 128),
      t_max_prompt_ms: isAsked ? 0 : READ_MS,
      t_max_predict_ms: PREDICT_MS,
      cache_prompt: true,
      suggest: isAsked ? "always" : settings().get("suggest", "normal"),
    };
    try {
      this.status.show("writing");
      const answer = read(await ask(await this.home.pi(), "/infill", { body, signal: abort.signal }));
      if (typeof answer.content !== "string") {
        throw new PiError(200, NO_PI);
      }
      const { content: text, confidence = null, unsure = false } = answer;
      const found = { text, confidence, unsure };
      if (!answer.replaced) this.suggestions.add(gap, found, Date.now() - began);
      this.awayUntil = 0;
      this.status.works();
      this.status.show(unsure && !text ? "unsure" : "ready");
      return found;
    } catch (error) {
      const isBusy = error instanceof PiError && BUSY.includes(error.status);
      if (abort.signal.aborted || isBusy) {
        this.status.show("ready");
      } else {
        this.awayUntil = Date.now() + AWAY_MS;
        void this.status.fail(error, isAsked);
      }
      return undefined;
    }
  }
}

/** Whether a file is never sent. @param {vscode.TextDocument} document */
function isExcluded(document) {
  const globs = settings().get("exclude", /** @type {string[]} */ ([]));
  const path = vscode.workspace.asRelativePath(document.uri);
  return globs.some((glob) => matches(glob, path));
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
    const prompt = `The key for ${url}; leave it empty if the Pi asks for none`;
    const key = await vscode.window.showInputBox({ prompt, password: true, ignoreFocusOut: true });
    if (key === undefined) return;
    const pi = { url, key: key.trim(), version: this.home.version };
    const problem = await problemWith(pi);
    if (problem) {
      const buttons = ["Try again", "Use it anyway"];
      const chosen = await vscode.window.showWarningMessage(`Cerebrum: ${problem}`, ...buttons);
      if (chosen === buttons[0]) return this.connect(given);
      if (!chosen) return;
    }
    this.isConnecting = true;
    await this.home.set(url, pi.key);
    this.isConnecting = false;
    await this.look();
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
    /** @type {vscode.MessageItem[]} */
    const items = [{ title: "No", isCloseAffordance: true }, { title: "Yes" }];
    const options = { modal: true };
    const chosen = await vscode.window.showInformationMessage(
      `Cerebrum: ${question}`, options, ...items);
    if (chosen?.title === "Yes") await this.connect(url);
  }

  /** Ask the Pi how it is, so that the user sees it before the first completion. */
  async look() {
    if (this.isConnecting) return;
    try {
      const { problem, version } = await check(await this.home.pi());
      this.status.works();
      this.status.show(problem ? "away" : "ready", problem || undefined);
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
    await vscode.env.openExternal(vscode.Uri.parse(this.home.url));
  }

  async change() {
    try {
      const document = vscode.window.activeTextEditor?.document;
      if (document && isExcluded(document)) {
        throw new PiError(200, "this file is never sent: it matches the setting cerebrum.exclude");
      }
      await changeSelection(await this.home.pi(), this.preview);
      this.status.works();
    } catch (error) {
      await this.status.fail(error, true);
    }
  }

  /** @param {{characters: number, confidence: number | null}} count */
  async accepted(count) {
    const body = Object.fromEntries(Object.entries(count).filter(([, value]) => value !== null));
    await ask(await this.home.pi(), "/v1/accepted", { body }).catch(() => {}); // only a count
  }

  async menu() {
    const language = vscode.window.activeTextEditor?.document.languageId;
    const here = this.context.workspaceState;
    const off = settings().get("off", /** @type {string[]} */ ([]));
    const isOff = language !== undefined && off.includes(language);
    const others = off.filter((one) => one !== language);
    const update = (/** @type {string[]} */ value) =>
      settings().update("off", value, vscode.ConfigurationTarget.Global);
    const items = [
      { label: "$(globe) The Pi's page", run: () => this.openPage() },
      { label: "$(plug) Connect…", run: () => this.connect() },
      { label: "$(output) Log", run: async () => this.status.log.show() },
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
  const location = vscode.ProgressLocation.Notification;
  return vscode.window.withProgress({ location, title: `Cerebrum: asking ${pi.url}` }, async () => {
    try {
      return (await check(pi)).problem;
    } catch (error) {
      return error instanceof PiError ? error.message : String(error);
    }
  });
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
  ];
  context.subscriptions.push(
    status.item,
    status.log,
    ...known.map(([name, run]) => vscode.commands.registerCommand(`cerebrum.${name}`, run)),
    vscode.languages.registerInlineCompletionItemProvider({ pattern: "**" }, completions),
    vscode.workspace.registerTextDocumentContentProvider(SCHEME, preview),
    vscode.window.registerUriHandler({ handleUri: (link) => commands.follow(link) }),
    vscode.workspace.onDidChangeConfiguration((event) => {
      if (event.affectsConfiguration("cerebrum.url")) void commands.look();
    }),
    context.secrets.onDidChange(() => void commands.look()),
  );
  void commands.look();
}

module.exports = { activate };
