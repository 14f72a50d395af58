/** Save: pictures with the session inside, sessions, links; and how the image came about. */
import type { App } from "../app";
import { button, el, note, section } from "../dom";
import { canvasOf, download, enlarged, pngOf } from "../pictures";
import { fromSession, sessionOf, toLink, toSession, withSession } from "../session";
import { openImage } from "./codes";

export function savePanel(app: App): HTMLElement {
  const log = el("ol", { class: "log", "aria-label": "What was done" });
  const open = el("input", { type: "file", accept: ".json,.png", hidden: true, "aria-label": "Session to open" });
  open.addEventListener("change", () => {
    if (open.files?.[0]) void openFile(app, open.files[0]);
    open.value = "";
  });
  app.listen(() => {
    if (app.prefs.panel !== "save") return;
    const { entries, index } = app.history;
    const start = Math.max(0, entries.length - 200);
    log.replaceChildren(
      ...entries.slice(start).map((entry, i) =>
        el(
          "li",
          {},
          button(entry.label, () => app.goTo(start + i), {
            class: "entry",
            "aria-current": start + i === index ? "step" : undefined,
          }),
          el("time", {}, new Date(entry.time).toLocaleTimeString()),
        ),
      ),
    );
    log.scrollTop = log.scrollHeight;
  });
  const act =
    (work: () => Promise<unknown>): (() => void) =>
    () => {
      work().catch((error) => app.fail(error));
    };
  return el(
    "div",
    {},
    section(
      "Picture",
      el(
        "div",
        { class: "row" },
        button(
          "PNG, 1:1",
          act(async () => download(await png(app, 1), "image.png")),
        ),
        button(
          "PNG, enlarged",
          act(async () => download(await png(app), "image-large.png")),
        ),
        button(
          "Copy",
          act(() => copyPicture(app)),
        ),
      ),
      note("The session is inside the PNG: drop it here again to go on."),
      app.source.isFile
        ? null
        : button(
            "Save into the run's folder",
            act(async () => {
              const name = await app.source.save(app.doc.run, "png", await png(app));
              await app.source.save(app.doc.run, "json", sessionFile(app));
              app.onMessage(`Saved as ${name}`);
            }),
          ),
    ),
    section(
      "Session",
      el(
        "div",
        { class: "row" },
        button(
          "Copy link",
          act(() => copyLink(app)),
        ),
        button(
          "JSON",
          act(async () => download(sessionFile(app), "session.json")),
        ),
        button("Open …", () => open.click()),
        open,
      ),
    ),
    section("How it came about", log),
  );
}

function sessionFile(app: App): Blob {
  return new Blob([JSON.stringify(toSession(app.doc), null, 1)], { type: "application/json" });
}

async function png(app: App, scale?: number): Promise<Blob> {
  const picture = app.frame?.main;
  if (!picture) throw new Error("there is no picture yet");
  return withSession(await pngOf(canvasOf(picture, scale ?? enlarged(picture))), app.doc);
}

export async function copyPicture(app: App): Promise<void> {
  const picture = app.frame?.main;
  if (!picture) return;
  if (!navigator.clipboard?.write)
    throw new Error("Browsers let pages copy pictures only over TLS or from this machine.");
  // Browsers drop the metadata of a PNG that is copied.
  await navigator.clipboard.write([new ClipboardItem({ "image/png": pngOf(canvasOf(picture, enlarged(picture))) })]);
  app.onMessage("The picture is in the clipboard.");
}

async function copyLink(app: App): Promise<void> {
  const link = await toLink(app.doc);
  history.replaceState(null, "", link);
  try {
    await navigator.clipboard.writeText(link);
    app.onMessage(
      app.source.isFile
        ? "The link is in the clipboard, and in the address bar."
        : "The link is in the clipboard. It holds this server's token: who has it can use this server.",
    );
  } catch {
    app.onMessage("The link is in the address bar.");
  }
}

/** A session, a picture with one inside, or an image to encode. */
export async function openFile(app: App, file: File): Promise<void> {
  try {
    if (file.name.endsWith(".json") || file.type === "application/json") {
      app.restore(fromSession(JSON.parse(await file.text())), `Opened ${file.name}`);
      return;
    }
    const doc = await sessionOf(file);
    if (doc) app.restore(doc, `Opened ${file.name}`);
    else await openImage(app, file);
  } catch (error) {
    app.fail(error instanceof SyntaxError ? new Error("this is no session of sosvae edit") : error);
  }
}
