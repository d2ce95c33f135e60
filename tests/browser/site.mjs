// Reads pages of the built site and prints what it saw as JSON.
// node site.mjs '{"folder": "file://...", "chromium": ..., "pages": ["index.html", ...], "shots": "folder or empty"}'
import { chromium } from "playwright-core";

const { folder, chromium: executablePath, pages, shots } = JSON.parse(process.argv[2]);
const browser = await chromium.launch({ executablePath, args: ["--no-sandbox"] });
process.on("uncaughtException", async error => { console.error(error.stack); await browser.close(); process.exit(1); });
const seen = { requests: [], errors: [], pages: {} };
const looks = { "wide-light": { viewport: { width: 1280, height: 900 } }, "wide-dark": { viewport: { width: 1280, height: 900 }, colorScheme: "dark" },
  "narrow-light": { viewport: { width: 390, height: 844 } }, "narrow-dark": { viewport: { width: 390, height: 844 }, colorScheme: "dark" } };

for (const [look, options] of Object.entries(looks)) {
  const page = await (await browser.newContext(options)).newPage();
  page.setDefaultTimeout(60_000);
  page.on("request", request => { if (!/^(file|blob|data):/.test(request.url())) seen.requests.push(request.url()); });
  page.on("pageerror", error => seen.errors.push(`${page.url()}: ${error.message}`));
  for (const name of pages) {
    await page.goto(`${folder}/${name}`);
    await page.evaluate(() => window.MathJax?.startup?.promise);
    await page.waitForTimeout(300);
    (seen.pages[name] ??= {})[look] = await page.evaluate(() => ({
      overflow: document.documentElement.scrollWidth - window.innerWidth,
      maths: document.querySelectorAll("mjx-container").length,
      raw: [...document.querySelectorAll(".math")].filter(node => !node.querySelector("mjx-container")).length,
      cut: [...document.querySelectorAll("div.math")].filter(node => node.scrollWidth > node.clientWidth + 1 && getComputedStyle(node).overflowX === "hidden").length,
      wrong: [...document.querySelectorAll("[data-mjx-error]")].map(node => node.getAttribute("data-mjx-error")),
      numbers: [...document.querySelectorAll("mjx-container [id^='mjx-eqn']")].map(node => node.id.slice(8)),
      ground: getComputedStyle(document.body).backgroundColor,
      ink: getComputedStyle(document.querySelector("article p, main p")).color,
      images: [...document.images].map(image => [image.alt, image.naturalWidth]),
    }));
    if (shots) await page.screenshot({ path: `${shots}/site-${name.replaceAll("/", "-")}-${look}.png` });
  }
  if (look === "wide-light") {
    await page.goto(`${folder}/search.html?q=semigroup`);
    await page.waitForFunction(() => /finished/.test(document.querySelector("#search-results .search-summary")?.textContent));
    seen.found = await page.locator("#search-results li a").evaluateAll(nodes => nodes.map(node => node.getAttribute("href")));
  }
}
await browser.close();
console.log(JSON.stringify(seen));
