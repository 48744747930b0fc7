// Drives the real VS Code in Chromium: what a user does, and what she sees. Only for the tests.
//
//     node real.cjs < JSON      {"url", "chromium", "folder", "pi", "key", "picture", "steps"}
//
// Prints a line of JSON for each step: its name and what was seen.
"use strict";
const fs = require("node:fs");
const { chromium } = require("playwright-core");

const given = JSON.parse(fs.readFileSync(0, "utf8"));
const GHOST = ".ghost-text-decoration, .ghost-text-decoration-preview, .ghost-text";
const PATIENCE = 90_000;
let page;

const say = (step, seen) => console.log(JSON.stringify([step, seen]));
const keys = async (...pressed) => { for (const key of pressed) await page.keyboard.press(key); };
const type = (text) => page.keyboard.type(text, { delay: 30 });

/** Wait until a function in the page returns something true. */
const until = (seen, argument) =>
  page.waitForFunction(seen, argument, { timeout: PATIENCE, polling: 200 }).then((handle) => handle.jsonValue());

async function command(name) {
  await keys("F1");
  await page.waitForSelector(".quick-input-widget input", { timeout: PATIENCE });
  await type(name);
  await page.click(`.quick-input-list .monaco-list-row[aria-label^="${name}"]`, { timeout: PATIENCE });
}

/** Type into the box that VS Code shows next, whose prompt contains a text. */
async function box(prompt, text) {
  await until((wanted) => document.querySelector(".quick-input-widget")?.textContent.includes(wanted), prompt);
  await keys("Control+a");
  await type(text);
  await keys("Enter");
}

async function pick(name) {
  await keys("Control+p");
  await page.waitForSelector(".quick-input-widget input", { timeout: PATIENCE });
  await type(name);
  await page.waitForSelector(`.quick-input-list .monaco-list-row[aria-label*="${name}"]`, { timeout: PATIENCE });
  await keys("Enter");
  await until((wanted) => document.querySelector(".tab.active")?.textContent.includes(wanted), name);
}

async function open(name, text = ".editor-instance .view-lines") {
  await pick(name);
  await page.locator(text).last().click({ timeout: PATIENCE, position: { x: 5, y: 5 } });
}

/** The ghost text, as soon as there is one. */
const ghost = () => until((selector) => {
  const parts = [...document.querySelectorAll(selector)].map((part) => part.textContent);
  return parts.join("").replace(/\u00a0/g, " ").trim();
}, GHOST);

/** What VS Code tells its user. */
const notices = () => page.evaluate(() =>
  [...document.querySelectorAll(".notification-list-item-message")].map((item) => item.textContent));
const notice = (wanted) => until((text) =>
  [...document.querySelectorAll(".notification-list-item-message")].map((item) => item.textContent)
    .find((message) => message.includes(text)), wanted);
const status = (wanted) => until((text) =>
  [...document.querySelectorAll(".statusbar-item")].map((item) => item.getAttribute("aria-label") ?? "")
    .find((label) => label.includes("Cerebrum") && RegExp(text).test(label)), wanted);
const button = (text) => page.click(`.notification-list-item .monaco-button:has-text("${text}")`);

/** Wait for an extension's item in the status bar. */
const item = (name) => until((wanted) =>
  [...document.querySelectorAll(".statusbar-item")].some((one) => one.textContent.includes(wanted)), name);

const STEPS = {
  /** The address and a wrong key, then the right one. */
  async connect() {
    await item("Cerebrum");
    await command("Cerebrum: Connect");
    await box("The Pi's address", given.pi);
    await box("The key for", "wrong");
    say("a wrong key", await notice("asks for a key"));
    await button("Try again");
    await box("The Pi's address", given.pi);
    await box("The key for", given.key);
    say("connected", await status("ready"));
  },
  async python() {
    await open("sum.py");
    await keys("Control+End");
    await type("    return ");
    say("ghost text", await ghost());
    await page.screenshot({ path: given.picture });
    await keys("Tab", "Control+s");
  },
  async word() {
    await open("word.py");
    await keys("Control+End");
    await type("    return ");
    await ghost();
    await keys("Control+ArrowRight", "Escape", "Control+s");
  },
  async typescript() {
    await open("area.ts");
    await keys("Control+End", "ArrowUp", "ArrowUp", "End");
    await type(" ");
    say("typescript", await ghost());
    await keys("Tab", "Control+s");
  },
  /** CRLF, and an emoji before the cursor. */
  async crlf() {
    await open("crlf.py");
    await keys("Control+End");
    await type("    return ");
    say("crlf", await ghost());
    await keys("Tab", "Control+s");
  },
  async notebook() {
    await open("book.ipynb", ".notebookOverlay .view-lines");
    await keys("Control+End");
    await type("    return ");
    say("notebook", await ghost());
    await keys("Tab", "Escape", "Control+s");
  },
  async cursors() {
    await open("two.py");
    await keys("Control+Home");
    await command("Add Cursor Below");
    await type("#");
    await keys("Escape", "Escape", "Control+s");
    say("two cursors", await notices());
  },
  async change() {
    await open("change.py");
    await keys("Control+a");
    await command("Cerebrum: Change Selection");
    await box("What to do with the selected code", given.instruction);
    await notice("apply this change");
    say("difference", await page.evaluate(() => document.querySelector(".tab.active")?.textContent));
    await button("Apply");
    await until(() => !document.querySelector(".tab.active")?.textContent.includes("Cerebrum:"));
    await open("change.py");
    /** The text of the editor, once it is another one than before. */
    const text = (before) => until((other) => {
      const lines = [...document.querySelectorAll(".editor-instance .view-line")];
      const now = lines.map((line) => line.textContent.replace(/\u00a0/g, " ")).join("\n");
      return now !== other && now;
    }, before);
    const changed = await text("");
    await keys("Control+z");
    say("undone", [await text(changed), changed]);
    await keys("Control+Shift+z", "Control+s");
  },
  /** A text that is no file yet, in a language of its own. */
  async untitled() {
    await command("File: New Untitled Text File");
    await command("Change Language Mode");
    await page.waitForSelector('input[placeholder="Select Language Mode"]', { timeout: PATIENCE });
    await type("Python");
    await keys("Enter");
    await type("def subtract(a, b):\nreturn "); // VS Code indents
    say("untitled", await ghost());
    await keys("Escape");
  },
  /** The Pi goes away, and returns: the other side does it when it reads these lines. */
  async away() {
    await open("word.py");
    await keys("Control+End", "Enter");
    say("stop", "");
    await page.waitForTimeout(2_000);
    for (let count = 0; count < 3; count += 1) {
      await type("x");
      await page.waitForTimeout(700);
    }
    say("no Pi", await status("no Pi answers"));
    say("notices", await notices());
    say("start", "");
    await page.waitForTimeout(8_000);
    await type("y = ");
    say("returned", await status("ready|not sure"));
  },
};

(async () => {
  const browser = await chromium.launch({ executablePath: given.chromium, args: ["--no-sandbox"] });
  page = await browser.newPage({ viewport: { width: 1100, height: 700 } });
  await page.goto(`${given.url}/?folder=${given.folder}`);
  await page.waitForSelector(".monaco-workbench .statusbar-item", { timeout: PATIENCE });
  for (const [name, step] of Object.entries(STEPS)) {
    if (given.steps && !given.steps.includes(name)) continue;
    try {
      await step();
    } catch (error) {
      await page.screenshot({ path: `${given.picture}.${name}.png` });
      say("failed", `${name}: ${error}`);
      break;
    }
  }
  await browser.close();
})();
