/** Puts the page together. */
import { App } from "./ui/app";
import { button, el } from "./ui/dom";
import { HELP, listenToKeys } from "./ui/keys";
import { PointerInput } from "./ui/pointer";
import { fromLink } from "./ui/session";
import { sidePanel } from "./ui/side";
import { Source } from "./ui/source";
import { Stage } from "./ui/stage";
import { cornerIsland, optionsIsland, toolsIsland, viewIsland } from "./ui/toolbar";
import { core } from "./core";

const app = new App(new Source());
// The first code is asked for before the page is built; who opens a link may want another.
if (!app.source.isFile && !location.hash) app.source.parameters(app.doc.run, app.doc.code).catch(() => {});
const stage = new Stage(app);
const pointer = new PointerInput(app, stage);

const banner = el("div", { class: "banner", role: "status", hidden: true });
const message = el("div", { class: "message", role: "status", "aria-live": "polite" });
let timer = 0;
app.onMessage = (text) => {
  message.textContent = text;
  message.classList.add("shown");
  clearTimeout(timer);
  timer = window.setTimeout(() => message.classList.remove("shown"), 6000);
};
app.source.onState = (reachable, why) => {
  banner.hidden = reachable;
  banner.textContent = why;
  if (reachable) app.onMessage("The server is back.");
};
const byServer = el("div", { class: "banner calm", role: "status", hidden: true }, "");
/** Who works out what the page does not; empty where it does everything itself. */
function helper(): string {
  const { loaded, source } = app;
  if (loaded?.conditions !== "server") return "";
  const why =
    loaded.where === "server"
      ? "The page has no formulas for this model's distribution"
      : "Neighbouring pixels of this model go together, and at this size the page does not work out what a pin leaves";
  return source.isFile
    ? `${why}: the rest of the image does not follow an edit in a page without its server.`
    : `${why}: after each stroke the server does.`;
}

const dialog = el(
  "dialog",
  { "aria-labelledby": "keys" },
  el("h2", { id: "keys" }, "Keys"),
  el("dl", { class: "facts" }, ...HELP.flatMap(([keys, what]) => [el("dt", {}, keys), el("dd", {}, what)])),
  button("Close", () => dialog.close()),
);
const help = (): void => dialog.showModal();

stage.canvas.setAttribute(
  "aria-label",
  "The image. Arrow keys move the brush, Enter paints, or sets a corner of the lasso.",
);
stage.element.append(
  toolsIsland(app, pointer),
  optionsIsland(app),
  viewIsland(app, stage),
  cornerIsland(app, help),
  banner,
  byServer,
  message,
);
const main = el("main", {}, el("h1", { class: "unseen" }, "SOS-VAE editor"), stage.element);
document.body.append(main, sidePanel(app), dialog);
listenToKeys(app, stage, pointer, help);
app.listen(() => {
  byServer.textContent = helper();
  byServer.hidden = byServer.textContent === "";
  stage.canvas.classList.toggle("picking", pointer.picking);
  document.body.classList.toggle("busy", app.busy);
});

async function start(): Promise<void> {
  try {
    const doc = await fromLink(location.hash);
    if (doc) {
      app.restore(doc, "Opened a link");
      return;
    }
  } catch (error) {
    app.fail(new Error(`The link cannot be read: ${error instanceof Error ? error.message : error}`));
  }
  app.refresh();
}
window.addEventListener("hashchange", () => void start());
void start();

/** For tests, and for the curious in a console. */
Object.assign(globalThis, { sosvae: { app, stage, core } });
