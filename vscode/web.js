// @ts-check
"use strict";
// Stands in for extension.js in a browser.

const vscode = require("vscode");

const REASON =
  "Cerebrum needs VS Code as a program: a page in a browser cannot ask a Pi on the home network.";

/** @param {vscode.ExtensionContext} context */
function activate(context) {
  const tell = () => void vscode.window.showWarningMessage(REASON);
  for (const name of ["connect", "suggest", "changeSelection", "menu"]) {
    context.subscriptions.push(vscode.commands.registerCommand(`cerebrum.${name}`, tell));
  }
  if (!context.globalState.get("told", false)) tell();
  void context.globalState.update("told", true);
}

module.exports = { activate };
