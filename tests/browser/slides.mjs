// Goes through a deck of slides without a network and prints, as JSON, what it loaded, what failed, and how much room each slide takes.
// node slides.mjs '{"url": "file://...", "chromium": ..., "shots": "folder or empty"}'
import { chromium } from "playwright-core";

const { url, chromium: executablePath, shots } = JSON.parse(process.argv[2]);
const browser = await chromium.launch({ executablePath, args: ["--no-sandbox", "--allow-file-access-from-files"] });
const page = await (await browser.newContext({ viewport: { width: 1280, height: 720 }, offline: true })).newPage();
page.setDefaultTimeout(60_000);
const loaded = [];
const errors = [];
page.on("request", request => loaded.push(request.url()));
page.on("requestfailed", request => errors.push(request.url()));
page.on("pageerror", error => errors.push(error.message));
await page.goto(url);
await page.waitForFunction(() => window.Reveal?.isReady() && window.MathJax?.startup?.promise);
await page.evaluate(() => MathJax.startup.promise);
await page.evaluate(() => Reveal.layout());
const total = await page.evaluate(() => Reveal.getTotalSlides());
const slides = [];
for (let i = 0; i < total; i++) {
  await page.evaluate(i => Reveal.slide(i, 0), i);
  await page.waitForTimeout(150);
  slides.push(await page.evaluate(() => {
    const slide = Reveal.getCurrentSlide();
    const parts = [...slide.querySelectorAll("h1, h2, p, li, td, img, pre, mjx-container svg")].filter(node => !node.closest("aside"));
    const scale = Reveal.getScale();
    const place = slide.getBoundingClientRect();
    const low = Math.max(...parts.map(node => (node.getBoundingClientRect().bottom - place.top) / scale));
    const right = Math.max(...parts.map(node => (node.getBoundingClientRect().right - place.left) / scale));
    return {
      title: slide.querySelector("h1, h2").innerText,
      low: low / Reveal.getConfig().height,
      right: right / Reveal.getConfig().width,
      raw: parts.some(node => /\$|\\[a-z]+/.test(node.innerText)),
      notes: slide.querySelector("aside.notes")?.textContent.trim().length ?? 0,
    };
  }));
  if (shots) await page.screenshot({ path: `${shots}/${url.match(/(\w+)\.slides/)[1]}-${String(i).padStart(2, "0")}.png` });
}
await browser.close();
console.log(JSON.stringify({ loaded, errors, slides }));
