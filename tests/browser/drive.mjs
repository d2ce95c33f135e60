// Drives two widgets, and opens the page of chapter play, in a real JupyterLab or Notebook and prints what it saw as JSON.
// node drive.mjs '{"url": ..., "chromium": ..., "lab": true, "shots": "folder or empty"}'
import { chromium } from "playwright-core";

const { url, chromium: executablePath, lab, shots } = JSON.parse(process.argv[2]);
const LIMIT = 60_000;
const browser = await chromium.launch({ executablePath, args: ["--no-sandbox"] });
const page = await (await browser.newContext({ viewport: { width: 1280, height: 2400 }, hasTouch: true })).newPage();
page.setDefaultTimeout(LIMIT);
page.on("pageerror", error => console.error(`page: ${error.message}`));
process.on("uncaughtException", async error => {
  console.error(error.stack);
  if (shots) await page.screenshot({ path: `${shots}/failed.png` });
  await browser.close();
  process.exit(1);
});

async function until(what, check) {
  for (const start = Date.now(); Date.now() - start < LIMIT; await page.waitForTimeout(100)) if (await check()) return;
  throw new Error(`waited in vain for: ${what}`);
}

const cell = i => page.locator(".jp-Notebook .jp-CodeCell").nth(i);

// A run that is asked for before the kernel is connected is dropped, so it is asked for again until the prompt changes.
async function run(i) {
  const prompt = () => cell(i).locator(".jp-InputPrompt").innerText();
  for (let tries = 0; (await prompt()).includes("[ ]") && tries < 10; tries++) {
    await cell(i).locator(".cm-content").click();
    await page.keyboard.press("Control+Enter");
    await page.waitForTimeout(3000);
  }
  await until(`cell ${i} to finish`, async () => /\[\d+\]/.test(await prompt()));
}

function widget(i) {
  const root = cell(i).locator(".soflow"), canvas = root.locator("canvas.soflow-picture");
  return {
    canvas,
    sliders: root.locator("input"),
    words: () => root.locator(".soflow-text").innerText(),
    busy: () => root.locator(".soflow-busy").innerText(),
    picture: () => canvas.evaluate(node => node.toDataURL()),
    values: () => root.locator("input").evaluateAll(nodes => nodes.map(node => Number(node.value))),
    // The kernel has answered when the words name the values of the sliders and stay as they are.
    async settle(previous) {
      await until(`the words to leave "${previous}"`, async () => await this.words() !== previous);
      for (let last = ""; last !== await this.words(); await page.waitForTimeout(700)) last = await this.words();
    },
  };
}

const seen = {};
async function open() {
  await page.goto(url);
  await cell(0).waitFor();
  if (lab) await until("an idle kernel", async () => (await page.locator("#jp-main-statusbar").innerText()).includes("| Idle"));
  for (const i of [0, 1]) await run(i);
  for (const i of [0, 1]) await cell(i).locator(".soflow canvas.soflow-picture").waitFor();
}

// On a busy machine the application itself may fail to start; a reader would load the page again.
for (let attempt = 1; ; attempt++) {
  try { await open(); break; }
  catch (error) { if (attempt === 3) throw error; console.error(`page loaded again: ${error.message}`); }
}
if (shots) await page.screenshot({ path: `${shots}/light.png` });

// The first widget: mouse, keyboard, touch.
const noise = widget(0);
await until("words", async () => await noise.words() !== "");
seen.start = { words: await noise.words(), picture: await noise.picture(), values: await noise.values() };
const box = await noise.canvas.boundingBox(), at = (u, v) => [box.x + u * box.width, box.y + v * box.height];
await page.mouse.move(...at(0.3, 0.3));
await page.mouse.down();
await page.mouse.move(...at(0.7, 0.6), { steps: 15 });
await page.mouse.up();
await noise.settle(seen.start.words);
seen.dragged = { words: await noise.words(), picture: await noise.picture(), values: await noise.values() };

const active = () => page.locator(".jp-Notebook .jp-Cell").evaluateAll(cells => cells.findIndex(one => one.classList.contains("jp-mod-active")));
await noise.sliders.nth(0).focus();
seen.activeBefore = await active();
for (const key of ["ArrowRight", "ArrowUp", "ArrowRight"]) await page.keyboard.press(key);
await noise.settle(seen.dragged.words);
seen.keyed = { words: await noise.words(), picture: await noise.picture(), values: await noise.values() };
for (const key of ["ArrowLeft", "ArrowDown", "ArrowLeft"]) await page.keyboard.press(key);
await noise.settle(seen.keyed.words);
seen.back = { words: await noise.words(), picture: await noise.picture(), values: await noise.values() };
seen.activeAfter = await active();
await page.keyboard.press("Tab");
seen.tabbed = await page.evaluate(() => document.activeElement.labels?.[0]?.textContent ?? "");

await page.touchscreen.tap(...at(0.4, 0.4));
await noise.settle(seen.back.words);
seen.touched = { words: await noise.words(), values: await noise.values() };

// The second: keyboard only.
const film = widget(1);
await film.sliders.nth(0).focus();
for (const key of ["End", "Home"]) {
  const before = await film.words();
  await page.keyboard.press(key);
  await film.settle(before);
  seen[key] = { words: await film.words(), picture: await film.picture() };
}

// The kernel's own values, printed by the third cell.
await run(2);
seen.printed = await cell(2).locator(".jp-OutputArea-output").innerText();

// The kernel counts in the fifth cell: the second widget says that it waits, until it is answered.
seen.quiet = await film.busy();
await cell(4).locator(".cm-content").click();
await page.keyboard.press("Control+Enter");
await until("a busy kernel", async () => (await cell(4).locator(".jp-InputPrompt").innerText()).includes("[*]"));
const beforeCount = await film.words();
await film.sliders.nth(0).focus();
await page.keyboard.press("End");
await until("the widget to say that the kernel is busy", async () => await film.busy() !== "");
seen.busy = { said: await film.busy(), words: await film.words(), before: beforeCount };
if (shots) await page.locator(".soflow").nth(1).screenshot({ path: `${shots}/busy-${lab ? "lab" : "notebook"}.png` });
await until("the widget to be answered", async () => await film.busy() === "");
seen.awake = await film.words();

// The page of chapter play, in a frame below the fourth cell.
await run(3);
const frame = await (await cell(3).locator("iframe").elementHandle()).contentFrame();
await frame.waitForFunction(() => window.play);
seen.inside = await frame.evaluate(() => document.getElementById("words").textContent);
if (shots) await cell(3).screenshot({ path: `${shots}/inside-${lab ? "lab" : "notebook"}.png` });

if (lab) {
  const before = await noise.picture();
  await page.evaluate(() => window.jupyterapp.commands.execute("apputils:change-theme", { theme: "JupyterLab Dark" }));
  await until("the dark theme", async () => await page.evaluate(() => document.body.dataset.jpThemeLight === "false"));
  await page.waitForTimeout(1500);
  seen.darkChanged = await noise.picture() !== before;
  seen.darkInk = await page.locator(".soflow").first().evaluate(node => getComputedStyle(node).color);
}
if (shots) await page.screenshot({ path: `${shots}/${lab ? "dark" : "notebook"}.png` });
await browser.close();
console.log(JSON.stringify(seen));
