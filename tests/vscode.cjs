// Runs VS Code's own client of language servers, without VS Code: `vscode` is played by objects of this file, as far as
// ghost text needs them; whatever else the client registers is taken and forgotten. Only for the tests.
//
//     node vscode.cjs PYTHON cerebrum_lsp.py FILE LINE CHARACTER
//
// Types "a" at that place, asks for ghost text, types the first character of it, asks again, accepts, and prints what it
// got as JSON: both texts, and the text of the file after all that.
const Module = require("node:module");
const fs = require("node:fs");

class Disposable {
  constructor(dispose = () => {}) { this.dispose = dispose; }
}
class EventEmitter {
  constructor() {
    this.listeners = new Set();
    this.event = (listener, self) => {
      const bound = listener.bind(self);
      this.listeners.add(bound);
      return new Disposable(() => this.listeners.delete(bound));
    };
  }
  async fire(value) { for (const listener of this.listeners) await listener(value); }
  dispose() { this.listeners.clear(); }
}
class Position { constructor(line, character) { Object.assign(this, { line, character }); } }
class Range { constructor(start, end) { Object.assign(this, { start, end }); } }
class Uri {
  constructor(path) { Object.assign(this, { scheme: "file", path, fsPath: path }); }
  static parse(text) { return new Uri(text.replace("file://", "")); }
  static file(path) { return new Uri(path); }
  toString() { return `file://${this.path}`; }
}
class InlineCompletionItem { constructor(insertText, range, command) { Object.assign(this, { insertText, range, command }); } }
class InlineCompletionList { constructor(items) { this.items = items; } }

class TabInputText { constructor(uri) { this.uri = uri; } }

const changed = new EventEmitter();
const tabs = [];
let provider;
const commands = new Map();
const anything = () => new Proxy(function () {}, {
  get: (_, name) => (name === "then" ? undefined : name === Symbol.toPrimitive ? () => 0 : anything()),
  apply: () => new Disposable(),
  construct: () => ({}),
});
const or = (known) => new Proxy(known, { get: (_, name) => (name in known ? known[name] : anything()) });
const event = () => new Disposable();
const vscode = or({
  Disposable, EventEmitter, Position, Range, Uri, InlineCompletionItem, InlineCompletionList, TabInputText,
  version: "1.106.0",
  env: or({ appName: "test", language: "en" }),
  CodeAction: class {}, CodeLens: class {}, CompletionItem: class {}, Diagnostic: class {}, DocumentLink: class {},
  InlayHint: class {}, TypeHierarchyItem: class {}, CallHierarchyItem: class {}, SymbolInformation: class {},
  CodeActionKind: new Proxy({}, { get: () => ({ value: "", append: (one) => ({ value: one }) }) }),
  CancellationError: class extends Error {},
  LogLevel: { Off: 0, Trace: 1, Debug: 2, Info: 3, Warning: 4, Error: 5 },
  commands: or({
    registerCommand: (name, call) => { commands.set(name, call); return new Disposable(); },
    executeCommand: (name, ...rest) => commands.get(name)(...rest),
  }),
  languages: or({
    match: () => 10,
    createDiagnosticCollection: () => ({ clear() {}, dispose() {}, set() {}, delete() {} }),
    registerInlineCompletionItemProvider: (_, one) => { provider = one; return new Disposable(); },
  }),
  window: or({
    createOutputChannel: () => or({ append() {}, appendLine() {}, show() {}, dispose() {} }),
    visibleTextEditors: [], tabGroups: or({ all: [{ tabs }], onDidChangeTabs: event }), onDidChangeActiveTextEditor: event,
    onDidChangeVisibleTextEditors: event, activeTextEditor: undefined,
  }),
  workspace: or({
    textDocuments: [], workspaceFolders: undefined, notebookDocuments: [], onDidChangeTextDocument: changed.event,
    getConfiguration: () => ({ get: (_, otherwise) => otherwise, inspect: () => undefined }),
    onDidOpenTextDocument: event, onDidCloseTextDocument: event, onDidSaveTextDocument: event,
    onWillSaveTextDocument: event, onDidChangeConfiguration: event, onDidChangeWorkspaceFolders: event,
  }),
});
const load = Module._load;
Module._load = (name, ...rest) => (name === "vscode" ? vscode : load(name, ...rest));

const [python, server, file, line, character] = process.argv.slice(2);
const { LanguageClient } = require(require.resolve("vscode-languageclient/node", { paths: [process.cwd()] }));

async function main() {
  let text = fs.readFileSync(file, "utf8");
  const place = { line: Number(line), character: Number(character) };
  const document = {
    uri: Uri.file(file), languageId: "python", version: 1, isDirty: false, isClosed: false, fileName: file,
    getText: () => text,
  };
  vscode.workspace.textDocuments.push(document);
  tabs.push({ input: new TabInputText(document.uri) }); // the client opens what has a tab
  const client = new LanguageClient("cerebrum", { command: python, args: [server] }, { documentSelector: [{ language: "python" }] });
  await client.start();
  const insert = async (added) => {
    const lines = text.split("\n");
    lines[place.line] = lines[place.line].slice(0, place.character) + added + lines[place.line].slice(place.character);
    text = lines.join("\n");
    document.version += 1;
    const at = new Position(place.line, place.character);
    const contentChanges = [{ range: new Range(at, at), rangeOffset: 0, rangeLength: 0, text: added }];
    place.character += added.length;
    await changed.fire({ document, contentChanges, reason: undefined });
  };
  const ghost = async () => {
    const token = { isCancellationRequested: false, onCancellationRequested: event };
    const at = new Position(place.line, place.character);
    const found = await provider.provideInlineCompletionItems(document, at, { triggerKind: 1 }, token);
    return (found.items ?? found)[0];
  };
  await insert("a");
  const first = await ghost();
  await insert(first.insertText[0]);
  const second = await ghost();
  await insert(second.insertText);
  await vscode.commands.executeCommand(second.command.command, ...second.command.arguments);
  console.log(JSON.stringify({ first: first.insertText, second: second.insertText, text }));
  await client.stop();
}

main().then(() => process.exit(0), (error) => { console.error(error); process.exit(1); });
