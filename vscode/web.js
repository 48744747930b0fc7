// @ts-check
"use strict";
// Stands in for extension.js in a browser.

const vscode = require("vscode");

const REASON =
  "Cerebrum needs VS Code as a program: a page in a browser cannot ask a Pi on the home network.";

function activate() {
  void vscode.window.showWarningMessage(REASON);
}

module.exports = { activate };
