// Plays the module `vscode` for the tests of the extension, as far as it needs it.
"use strict";
const Module = require("node:module");

class Position {
  constructor(line, character) { Object.assign(this, { line, character }); }
}
class Range {
  constructor(start, end) { Object.assign(this, { start, end }); }
}
class Selection extends Range {
  get isEmpty() { return this.start.line === this.end.line && this.start.character === this.end.character; }
}
class Uri {
  constructor(scheme, path, query = "") { Object.assign(this, { scheme, path, query }); }
  static parse(text) { return new Uri(...text.match(/^([\w.-]+):(?:\/\/[^/?]*)?([^?]*)\??(.*)$/).slice(1)); }
  static from({ scheme, path }) { return new Uri(scheme, path); }
  toString() { return `${this.scheme}:${this.path}`; }
}
class EventEmitter {
  constructor() {
    this.listeners = new Set();
    this.event = (listener) => {
      this.listeners.add(listener);
      return { dispose: () => this.listeners.delete(listener) };
    };
  }
  fire(value) { for (const listener of this.listeners) listener(value); }
}
class InlineCompletionItem {
  constructor(insertText, range, command) { Object.assign(this, { insertText, range, command }); }
}
class TabInputTextDiff {
  constructor(original, modified) { Object.assign(this, { original, modified }); }
}
class TabInputNotebookDiff {}
class TabInputText {}
class TabInputNotebook {}
class WorkspaceEdit {
  constructor() { this.edits = []; }
  replace(uri, range, text) { this.edits.push({ uri, range, text }); }
}
class Document {
  constructor(uri, languageId, text) {
    Object.assign(this, { uri: Uri.parse(uri), languageId, text, version: 1, isClosed: false });
  }
  get isUntitled() { return this.uri.scheme === "untitled"; }
  get lines() { return this.text.split(/\r\n|\n/); }
  get lineCount() { return this.lines.length; }
  lineAt(line) {
    const end = new Position(line, this.lines[line].length);
    return { text: this.lines[line], range: new Range(new Position(line, 0), end) };
  }
  offsetAt({ line, character }) {
    const starts = [0, ...[...this.text.matchAll(/\n/g)].map((found) => found.index + 1)];
    return starts[line] + character;
  }
  getText(range) {
    return range ? this.text.slice(this.offsetAt(range.start), this.offsetAt(range.end)) : this.text;
  }
}
class Token extends EventEmitter {
  constructor() {
    super();
    this.isCancellationRequested = false;
    this.onCancellationRequested = this.event;
  }
  cancel() {
    this.isCancellationRequested = true;
    this.fire();
  }
}

/** What the user has and does: settings, secrets, answers; and what was shown. */
class Desk {
  constructor() {
    this.settings = { url: "", suggest: "normal", tokens: 128, off: [], exclude: [".env*"] };
    this.own = {}; // where a workspace has others
    this.secrets = new Map();
    this.answers = []; // to boxes and messages, the first is next
    this.shown = []; // messages, and what boxes asked
    this.opened = []; // in a browser
    this.commands = new Map();
    this.books = [];
    this.tabs = [];
    this.previews = [];
    this.workspace = new Map();
    this.global = new Map();
    this.changed = new EventEmitter(); // settings
    this.edited = new EventEmitter(); // texts
    this.fronted = new EventEmitter(); // the editor in front
    this.moved = new EventEmitter(); // cursors
    this.tabsChanged = new EventEmitter();
    this.cancels = null; // called with the token of a progress
  }

  answer(kind, text, items) {
    this.shown.push(`${kind}: ${text}`);
    const wanted = this.answers.shift();
    if (typeof wanted === "function") return wanted(items);
    if (!items) return wanted;
    return items.find((item) => (item.title ?? item.label ?? item) === wanted);
  }
}

function make(desk) {
  const message = (kind) => async (text, ...items) => {
    const options = items[0]?.modal ? items.shift() : undefined;
    return desk.answer(options ? `modal ${kind}` : kind, text, items);
  };
  const memento = (map) => ({
    get: (name, usual) => (map.has(name) ? map.get(name) : usual),
    update: async (name, value) => void map.set(name, value),
  });
  const item = { isShown: false, show() { this.isShown = true; }, dispose() {} };
  desk.item = item;
  const secretChanged = new EventEmitter();
  const vscode = {
    Position, Range, Selection, Uri, EventEmitter, InlineCompletionItem, TabInputTextDiff,
    TabInputNotebookDiff, TabInputText, TabInputNotebook, WorkspaceEdit,
    InlineCompletionTriggerKind: { Invoke: 0, Automatic: 1 },
    StatusBarAlignment: { Left: 1, Right: 2 },
    ConfigurationTarget: { Global: 1, Workspace: 2 },
    ProgressLocation: { Notification: 15 },
    commands: {
      registerCommand: (name, run) => (desk.commands.set(name, run), { dispose() {} }),
      executeCommand: async (name, ...given) => {
        desk.shown.push(`command: ${name}`);
        if (name === "vscode.diff") {
          const [replaced] = desk.tabs.filter((tab) => tab.isPreview);
          if (replaced) await vscode.window.tabGroups.close([replaced]);
          desk.tabs.push({ isPreview: given[3]?.preview !== false, input: new TabInputTextDiff(given[0], given[1]), title: given[2] });
        }
        return desk.commands.get(name)?.(...given);
      },
    },
    env: { openExternal: async (uri) => desk.opened.push(uri.toString()) },
    extensions: { all: [{ packageJSON: {} }, { packageJSON: { contributes: { languages: [
      { id: "python" }, { id: "python", extensions: [".py", ".pyw"] }, { id: "typescript", extensions: [".ts"] },
    ] } } }] },
    languages: {
      registerInlineCompletionItemProvider: (_selector, provider) => {
        desk.provider = provider;
        return { dispose() {} };
      },
    },
    window: {
      createStatusBarItem: () => item,
      createOutputChannel: () => ({
        appendLine: (line) => desk.shown.push(`log: ${line.slice(25)}`),
        show: () => desk.shown.push("the log"),
        dispose() {},
      }),
      onDidChangeActiveTextEditor: desk.fronted.event,
      onDidChangeTextEditorSelection: desk.moved.event,
      registerUriHandler: (handler) => ((desk.links = handler), { dispose() {} }),
      showInformationMessage: message("info"),
      showWarningMessage: message("warning"),
      showInputBox: async (options) => desk.answer("box", options.prompt),
      showQuickPick: async (items, options) => desk.answer("pick", options.title, items),
      tabGroups: {
        get activeTabGroup() { return { activeTab: desk.activeTab }; },
        get all() { return [{ tabs: desk.tabs }]; },
        close: async (tabs) => {
          desk.tabs = desk.tabs.filter((tab) => !tabs.includes(tab));
          desk.tabsChanged.fire();
        },
        onDidChangeTabs: desk.tabsChanged.event,
      },
      withProgress: async (options, work) => {
        const token = new Token();
        desk.cancels?.(token);
        return work({ report() {} }, token);
      },
    },
    workspace: {
      getConfiguration: () => ({
        ...desk.settings,
        get: (name, usual) => desk.settings[name] ?? usual,
        inspect: (name) => ({ globalValue: desk.own[name] ?? desk.settings[name] }),
        update: async (name, value) => {
          if (desk.isBroken) throw new Error("unable to write");
          desk.settings[name] = value;
          desk.changed.fire({ affectsConfiguration: (wanted) => `cerebrum.${name}`.startsWith(wanted) });
        },
      }),
      get notebookDocuments() { return desk.books; },
      onDidChangeConfiguration: desk.changed.event,
      onDidChangeTextDocument: desk.edited.event,
      registerTextDocumentContentProvider: (_scheme, provider) => {
        desk.preview = provider;
        provider.onDidChange((uri) => desk.previews.push(provider.provideTextDocumentContent(uri)));
        return { dispose() {} };
      },
      applyEdit: async (edit) => {
        if (desk.refusesEdits) return false;
        for (const { range, text } of edit.edits) {
          const { document } = vscode.window.activeTextEditor;
          const [start, end] = [document.offsetAt(range.start), document.offsetAt(range.end)];
          document.text = document.text.slice(0, start) + text + document.text.slice(end);
          document.version += 1;
        }
        return true;
      },
    },
  };
  const context = {
    subscriptions: [],
    extension: { packageJSON: { version: "1.1.0" } },
    secrets: {
      keys: async () => [...desk.secrets.keys()],
      get: async (name) => desk.secrets.get(name),
      store: async (name, value) => (desk.secrets.set(name, value), secretChanged.fire({ key: name })),
      delete: async (name) => (desk.secrets.delete(name), secretChanged.fire({ key: name })),
      onDidChange: secretChanged.event,
    },
    workspaceState: memento(desk.workspace),
    globalState: memento(desk.global),
  };
  return { vscode, context };
}

/** The extension, activated at this desk. */
function activate(desk, folder) {
  const { vscode, context } = make(desk);
  const load = Module._load;
  Module._load = (name, ...more) => (name === "vscode" ? vscode : load(name, ...more));
  for (const file of Object.keys(require.cache)) if (file.startsWith(folder)) delete require.cache[file];
  const extension = require(`${folder}/extension.js`);
  Module._load = load;
  desk.context = context;
  extension.activate(context);
  return vscode;
}

module.exports = { activate, Desk, Document, Position, Range, Selection, Token, Uri };
