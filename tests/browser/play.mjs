// Plays with the page of chapter play and prints what it saw as JSON.
// node play.mjs '{"url": ..., "chromium": ..., "questions": [{"x": [0, 1], "t": 1, "s": 0, "n": 4, "y": null, "w": 1}, ...], "shots": "folder or empty"}'
import { chromium } from "playwright-core";

const { url, chromium: executablePath, questions, shots } = JSON.parse(process.argv[2]);
const browser = await chromium.launch({ executablePath, args: ["--no-sandbox"] });
process.on("uncaughtException", async error => { console.error(error.stack); await browser.close(); process.exit(1); });
const seen = { requests: [], errors: [], overflow: {} };

async function open(name, options) {
  const page = await (await browser.newContext(options)).newPage();
  page.setDefaultTimeout(60_000);
  page.on("request", request => { if (!/^(file|blob|data):/.test(request.url())) seen.requests.push(request.url()); });
  page.on("pageerror", error => seen.errors.push(error.message));
  await page.goto(url);
  await page.waitForFunction(() => window.play);
  seen.overflow[name] = await page.evaluate(() => document.documentElement.scrollWidth - window.innerWidth);
  return page;
}
const settled = page => page.evaluate(() => new Promise(done => requestAnimationFrame(() => requestAnimationFrame(() => setTimeout(done, 150)))));
const look = page => page.evaluate(() => ({ state: structuredClone(play.state), ends: play.ends(), words: document.getElementById("words").textContent }));
const shoot = async (page, name) => { if (shots) await page.screenshot({ path: `${shots}/play-${name}.png`, fullPage: true }); };
const spot = async (page, a, b) => { const box = await page.locator("#plane").boundingBox(); return [box.x + a * box.width, box.y + b * box.height]; };

const wide = await open("wide", { viewport: { width: 1200, height: 900 } });
seen.answers = await wide.evaluate(async questions => {
  const found = [];
  for (const question of questions) {
    Object.assign(play.state, question);
    await play.refresh();
    found.push({ map: play.ends().map, exact: play.ends().exact.at(-1), euler: play.ends().euler.at(-1) });
  }
  Object.assign(play.state, { x: [1.1, -0.6], t: 1, s: 0, n: 4, y: null, w: 1 });
  await play.refresh();
  return found;
}, questions);
await shoot(wide, "wide");

// The mouse: three rounds of a drag, and the median work of a frame in each.
seen.medians = [];
for (let round = 0; round < 3; round++) {
  await wide.evaluate(() => { play.frames.length = 0; });
  await wide.mouse.move(...await spot(wide, 0.7, 0.6));
  await wide.mouse.down();
  for (let i = 0; i <= 60; i++) { await wide.mouse.move(...await spot(wide, 0.7 - 0.005 * i, 0.6 - 0.004 * i)); await wide.waitForTimeout(16); }
  await wide.mouse.up();
  await settled(wide);
  seen.medians.push(await wide.evaluate(() => play.frames.length < 20 ? Infinity : [...play.frames].sort((a, b) => a - b)[play.frames.length >> 1]));
}
seen.dragged = await look(wide);

await wide.keyboard.press("ArrowRight");
await wide.keyboard.press("ArrowRight");
await wide.keyboard.press("Shift+ArrowDown");
await settled(wide);
seen.keyed = await look(wide);

await wide.locator("#t").focus();
for (let i = 0; i < 30; i++) await wide.keyboard.press("ArrowLeft");
await settled(wide);
seen.slid = await look(wide);
await wide.selectOption("#y", "2");
await wide.fill("#w", "2.5");
await settled(wide);
seen.guided = await look(wide);
await shoot(wide, "guided");

await wide.click("#draw");
for (const [a, b] of [[0.3, 0.3], [0.6, 0.2], [0.2, 0.7], [0.7, 0.7], [0.21, 0.7]]) await wide.mouse.click(...await spot(wide, a, b));      // the last click removes the third point
await wide.locator("#plane").press("Enter");
await wide.click("#draw");
await wide.fill("#t", "1");
await settled(wide);
seen.own = await look(wide);
await shoot(wide, "own");
await wide.click("#clear");
await settled(wide);
seen.cleared = await look(wide);
await wide.click("#back");
await settled(wide);
seen.back = await look(wide);

const narrow = await open("narrow", { viewport: { width: 390, height: 844 }, hasTouch: true, isMobile: true, colorScheme: "dark" });
await narrow.touchscreen.tap(...await spot(narrow, 0.25, 0.25));
await settled(narrow);
seen.touched = await look(narrow);
seen.ground = await narrow.evaluate(() => getComputedStyle(document.body).backgroundColor);
await shoot(narrow, "narrow");
for (const [name, options] of Object.entries({ "wide-dark": { viewport: { width: 1200, height: 900 }, colorScheme: "dark" }, "narrow-light": { viewport: { width: 390, height: 844 } } })) await shoot(await open(name, options), name);

await browser.close();
console.log(JSON.stringify(seen));
