// @ts-check
"use strict";
// "Change Selection": the model changes the selected code as it is told.

const vscode = require("vscode");
const { ask, PiError, read } = require("./pi");
const { lacks, MAX_TOKENS, unix } = require("./text");

const SCHEME = "cerebrum-change";

/** The texts of both sides of a difference, which are no files. */
class Preview {
  constructor() {
    /** @type {Map<string, string>} */
    this.texts = new Map();
    this.changed = new vscode.EventEmitter();
    this.onDidChange = this.changed.event;
    this.count = 0;
    /** @type {Map<string, (isWanted: boolean) => void>} by the right side of a finished difference */
    this.deciders = new Map();
  }

  /** @param {vscode.Uri} uri */
  provideTextDocumentContent(uri) {
    return this.texts.get(uri.path) ?? "";
  }

  /** @param {string} name @param {string} text */
  add(name, text) {
    this.count += 1;
    const uri = vscode.Uri.from({ scheme: SCHEME, path: `/${this.count}/${name}` });
    this.texts.set(uri.path, text);
    return uri;
  }

  /** @param {vscode.Uri} uri @param {string} text */
  show(uri, text) {
    this.texts.set(uri.path, text);
    this.changed.fire(uri);
  }

  /** The tabs with the difference whose right side this is. @param {vscode.Uri} uri */
  tabs(uri) {
    const tabs = vscode.window.tabGroups.all.flatMap((group) => group.tabs);
    return tabs.filter((/** @type {any} */ tab) => tab.input?.modified?.toString() === uri.toString());
  }

  /** Close a difference. @param {vscode.Uri} before @param {vscode.Uri} after its sides */
  async close(before, after) {
    this.deciders.delete(after.toString());
    await vscode.window.tabGroups.close(this.tabs(after));
    this.texts.delete(before.path);
    this.texts.delete(after.path);
  }

  /** Apply or discard a difference, or the one that is in front. @param {boolean} isWanted @param {vscode.Uri} [uri] its right side */
  decide(isWanted, uri) {
    const input = /** @type {any} */ (vscode.window.tabGroups.activeTabGroup.activeTab?.input);
    this.deciders.get(String(uri ?? input?.modified))?.(isWanted);
  }

  /**
   * Whether the user wants the change of a difference: its buttons, a message, or its closed tab.
   * @param {vscode.Uri} uri its right side @param {AbortSignal} closed
   */
  async decision(uri, closed) {
    const message = vscode.window.showInformationMessage("Cerebrum: apply this change?", "Apply", "Discard");
    return new Promise((/** @type {(isWanted: boolean) => void} */ resolve) => {
      this.deciders.set(uri.toString(), resolve);
      closed.addEventListener("abort", () => resolve(false));
      void message.then((chosen) => chosen && resolve(chosen === "Apply"));
    });
  }
}

/**
 * The whole answer to an instruction. `onText` gets what there is of its code so far.
 * @param {any} pi @param {any} body @param {AbortSignal} signal @param {(text: string) => void} onText
 * @returns {Promise<any>}
 */
async function instruct(pi, body, signal, onText) {
  let stream = "";
  let text = "";
  let last = {};
  const onEvent = (/** @type {any} */ event) => {
    if (event.error) throw new PiError(200, event.message);
    if (event.token) onText((text += event.token));
    if (event.done) last = event;
  };
  const onData = (/** @type {string} */ part) => {
    const events = (stream + part).split("\n\n");
    stream = events.pop() ?? "";
    for (const event of events) {
      const data = event.match(/^data: (\{.*)$/m);
      if (data) onEvent(read({ status: 200, text: data[1] }));
    }
  };
  const answer = await ask(pi, "/v1/complete/stream", { body, signal, onData });
  if (answer.status !== 200) read(answer);
  return { ...last, completion: text };
}

/**
 * Ask for an instruction, show what would change, and apply it if the user wants that.
 * @param {any} pi @param {Preview} preview @param {vscode.TextEditor} editor
 */
async function changeSelection(pi, preview, { document, selection }) {
  const whole = document.getText();
  const range = new vscode.Range(selection.start, selection.end);
  const selected = document.getText(range);
  const prompt = "What to do with the selected code, for instance: add type hints";
  const instruction = await vscode.window.showInputBox({ prompt, ignoreFocusOut: true });
  if (!instruction?.trim()) return;
  const name = document.uri.path.split("/").pop() ?? "";
  const before = preview.add(name, selected);
  const after = preview.add(name, "");
  const closed = new AbortController();
  // As no preview, whose place the next file that is opened would take.
  await vscode.commands.executeCommand("vscode.diff", before, after, `Cerebrum: ${instruction}`, { preview: false });
  const watch = vscode.window.tabGroups.onDidChangeTabs(() => {
    if (!preview.tabs(after).length) closed.abort();
  });
  try {
    const body = {
      prompt: unix(selected),
      instruction,
      language: document.languageId,
      max_tokens: MAX_TOKENS,
      temperature: 0,
    };
    const work = (/** @type {AbortSignal} */ signal) =>
      instruct(pi, body, signal, (text) => preview.show(after, text));
    const answer = await withProgress(instruction, work, closed);
    if (!answer) return;
    const lacking = lacks(answer);
    if (lacking) throw new PiError(200, `${lacking}; nothing was changed`);
    const [end] = selected.match(/[\r\n]*$/) ?? [""];
    const text = answer.completion.replace(/[\r\n]+$/, "") + end;
    preview.show(after, text);
    if (!(await preview.decision(after, closed.signal))) return;
    if (document.isClosed || document.getText() !== whole) {
      throw new PiError(200, "the text has changed meanwhile; nothing was changed");
    }
    await apply(document, range, text);
  } finally {
    watch.dispose();
    await preview.close(before, after);
  }
}

/** @param {vscode.TextDocument} document @param {vscode.Range} range @param {string} text */
async function apply(document, range, text) {
  const edit = new vscode.WorkspaceEdit();
  edit.replace(document.uri, range, text);
  if (!(await vscode.workspace.applyEdit(edit))) {
    throw new PiError(200, "VS Code did not apply the change");
  }
}

/**
 * The result of a work that the user may end; undefined if that happened.
 * @template T
 * @param {string} title @param {(signal: AbortSignal) => Promise<T>} work @param {AbortController} [abort]
 * @returns {Promise<T | undefined>}
 */
async function withProgress(title, work, abort = new AbortController()) {
  const location = vscode.ProgressLocation.Notification;
  const options = { location, title: `Cerebrum: ${title}`, cancellable: true };
  return vscode.window.withProgress(options, async (_progress, token) => {
    token.onCancellationRequested(() => abort.abort());
    try {
      return await work(abort.signal);
    } catch (error) {
      if (abort.signal.aborted) return undefined;
      throw error;
    }
  });
}

module.exports = { changeSelection, Preview, SCHEME, withProgress };
