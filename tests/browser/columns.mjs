// Looks for code and printed output that is wider than its column at 1,400 pixels.
// node columns.mjs '{"folder": "file://...", "chromium": ..., "pages": ["a.html", ...]}'
import { chromium } from "playwright-core";

const { folder, chromium: executablePath, pages } = JSON.parse(process.argv[2]);
const browser = await chromium.launch({ executablePath, args: ["--no-sandbox"] });
process.on("uncaughtException", async error => {
  console.error(error.stack);
  await browser.close();
  process.exit(1);
});
const options = { viewport: { width: 1400, height: 900 } };
const page = await (await browser.newContext(options)).newPage();
page.setDefaultTimeout(60_000);

// Inside the page: each block in view, folded solutions opened, and how wide it is.
function measure() {
  for (const folded of document.querySelectorAll("details")) folded.open = true;
  const blocks = [...document.querySelectorAll("div.highlight pre, .cell_output pre")];
  const sizes = blocks.map(block => parseFloat(getComputedStyle(block).fontSize));
  const wide = [];
  for (const block of blocks) {
    if (block.scrollWidth <= block.clientWidth + 1) continue;
    const lines = block.textContent.split("\n");
    const longest = lines.reduce((a, b) => (b.length > a.length ? b : a));
    const widths = `${block.scrollWidth} in ${block.clientWidth} pixels`;
    wide.push(`${widths}, ${longest.length} columns: ${longest.trim().slice(0, 60)}`);
  }
  return { blocks: blocks.length, smallest: Math.min(...sizes), wide };
}

const seen = {};
for (const name of pages) {
  await page.goto(`${folder}/${name}`, { waitUntil: "domcontentloaded" });
  seen[name] = await page.evaluate(measure);
}
await browser.close();
console.log(JSON.stringify(seen));
