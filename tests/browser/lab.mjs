// Opens a notebook in JupyterLab and prints, as JSON, what its menus, its toolbar and its notifications say.
// node lab.mjs '{"url": ..., "chromium": ...}'
import { chromium } from "playwright-core";

const { url, chromium: executablePath, shot } = JSON.parse(process.argv[2]);
const browser = await chromium.launch({ executablePath, args: ["--no-sandbox"] });
const page = await (await browser.newContext({ viewport: { width: 1280, height: 900 } })).newPage();
page.setDefaultTimeout(60_000);
// On a busy machine the application itself may fail to start; a reader would load the page again.
for (let attempt = 1; ; attempt++) {
  try {
    await page.goto(url);
    await page.locator(".jp-Notebook .jp-Cell").first().waitFor();
    break;
  } catch (error) {
    if (attempt === 3) throw error;
  }
}
await page.waitForTimeout(4000);
const texts = async place => (await page.locator(place).allInnerTexts()).map(text => text.trim());
const seen = {
  menus: await texts("#jp-menu-panel .lm-MenuBar-itemLabel"),
  toolbar: (await texts(".jp-NotebookPanel-toolbar")).join(" "),
  notifications: await texts(".Toastify__toast"),
};
if (shot) await page.screenshot({ path: shot });
await browser.close();
console.log(JSON.stringify(seen));
