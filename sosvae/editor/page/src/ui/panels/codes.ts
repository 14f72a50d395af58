/** Codes: from a seed, a held-out image or a photo; two codes and a slider between them; those seen before. */
import { readContainer } from "../../maths/container";
import { START_VIEW, type Code } from "../../types";
import type { App } from "../app";
import { button, el, note, section, slider, uniqueId } from "../dom";
import { drawInto, pictureOfBytes } from "./thumbs";

const HELDOUT = 24;

export function nameOf(code: Code): string {
  switch (code.kind) {
    case "seed":
      return `Seed ${code.seed}`;
    case "heldout":
      return `Held-out image ${code.index}`;
    case "vector":
      return code.label ?? "Your image";
    case "mix":
      return `${Math.round(100 * code.t)} % from A to B`;
    case "mean of":
      return `The image of ${code.run}`;
  }
}

export function codesPanel(app: App): HTMLElement {
  const { isFile, settings } = app.source;
  const current = el("p", { class: "current" });
  const seed = seedField(app);
  const lost = el("div", { class: "lost" });
  const heldout = el("div", { class: "thumbs", role: "group", "aria-label": "Held-out images" });
  const history = el("div", { class: "list", role: "group", "aria-label": "Codes seen before" });
  const between = betweenCodes(app);

  let shownRun = "";
  const update = (): void => {
    current.textContent = nameOf(app.doc.code) + (app.busy ? " …" : "");
    seed.update();
    between.update();
    showLost(app, lost);
    history.replaceChildren(
      ...app.seen
        .slice(0, 12)
        .map((seen) =>
          button(
            app.source.settings.runs.length > 1 ? `${nameOf(seen.code)} · ${seen.run}` : nameOf(seen.code),
            () => app.change(nameOf(seen.code), { run: seen.run, code: seen.code }),
            { "aria-pressed": String(JSON.stringify(seen.code) === JSON.stringify(app.doc.code)) },
          ),
        ),
    );
    if (!isFile && app.prefs.panel === "codes" && shownRun !== app.doc.run && app.loaded) {
      shownRun = app.doc.run;
      void fillHeldout(app, heldout);
    }
  };
  app.listen(update);

  const runs = runSelect(app);
  const fileCodes = embeddedCodes(app, settings.codes ?? []);
  return el(
    "div",
    {},
    section("Code", runs, current, isFile ? fileCodes : seed.element, lost),
    isFile
      ? note(
          "This page holds a few codes and works without a network. New codes need ",
          el("code", {}, "sosvae edit"),
          " and its server.",
        )
      : null,
    isFile ? null : section("Held-out images", heldout),
    isFile
      ? null
      : section(
          "Your own image",
          note("Encoded on this server; nothing else of the file is kept. Paste or drop works too."),
          uploadButton(app),
        ),
    isFile ? null : section("Between two codes", between.element),
    section("Seen before", history),
  );
}

/** The codes of a page that is one file, each as its image or, where it comes from none, its mean. */
function embeddedCodes(app: App, codes: Code[]): HTMLElement {
  const cells = codes.map((code) =>
    el(
      "button",
      {
        type: "button",
        class: "thumb",
        "aria-label": nameOf(code),
        title: nameOf(code),
        click: () => app.openCode(code, nameOf(code)),
      },
      el("canvas", { "aria-hidden": "true" }),
    ),
  );
  const element = el("div", { class: "thumbs", role: "group", "aria-label": "Codes in this file" }, ...cells);
  element.style.setProperty("--columns", "4");
  let filled = "";
  const fill = async (): Promise<void> => {
    const { run } = app.doc;
    if (filled === run || app.prefs.panel !== "codes") return;
    filled = run;
    for (let i = 0; i < codes.length && filled === run; i++) {
      const { header, arrays } = readContainer(await app.source.parameters(run, codes[i]!), ["original", "loc"]);
      const [channels, height, width] = header["shape"] as [number, number, number];
      const bytes = arrays.get("original") ?? Uint8ClampedArray.from(arrays.get("loc")!, (value) => 255 * value);
      drawInto(cells[i]!.querySelector("canvas")!, pictureOfBytes(bytes, channels, height, width));
      await new Promise((resolve) => setTimeout(resolve)); // one after the other: the page stays quick
    }
  };
  app.onRest(() => void fill());
  app.listen(() =>
    cells.forEach((cell, i) =>
      cell.setAttribute("aria-pressed", String(JSON.stringify(codes[i]) === JSON.stringify(app.doc.code))),
    ),
  );
  return element;
}

function runSelect(app: App): HTMLElement | null {
  const { runs } = app.source.settings;
  if (runs.length < 2) return null;
  const id = uniqueId();
  const select = el(
    "select",
    { id, change: () => app.change(`Run ${select.value}`, { run: select.value, compare: null }) },
    ...runs.map((run) => el("option", { value: run.name }, `${run.name} (${run.head}, ${run.shape.join("×")})`)),
  );
  app.listen(() => {
    select.value = app.doc.run;
  });
  return el("div", { class: "row" }, el("label", { for: id }, "Run"), select);
}

function seedField(app: App): { element: HTMLElement; update: () => void } {
  const id = uniqueId();
  const input = el("input", { type: "number", id, min: 0, max: 4294967295, step: 1, value: 0 });
  const open = (seed: number): void => app.openCode({ kind: "seed", seed }, `Seed ${seed}`);
  input.addEventListener("change", () => {
    const seed = Number(input.value);
    if (Number.isInteger(seed) && seed >= 0) open(seed);
  });
  return {
    element: el(
      "div",
      { class: "row" },
      el("label", { for: id }, "Seed"),
      input,
      button("New code", () => open(Math.floor(Math.random() * 1e6)), { class: "button primary" }),
    ),
    update: () => {
      if (app.doc.code.kind === "seed" && document.activeElement !== input) input.value = String(app.doc.code.seed);
    },
  };
}

/** The image behind the code, the mean, and how far apart they are. */
function showLost(app: App, into: HTMLElement): void {
  const { loaded } = app;
  if (loaded?.lost === undefined) {
    into.replaceChildren();
    into.dataset["key"] = "";
    return;
  }
  const key = JSON.stringify([app.doc.run, app.doc.code]);
  if (into.dataset["key"] === key || app.busy) return;
  into.dataset["key"] = key;
  const original = el("canvas", { "aria-hidden": "true" });
  const mean = el("canvas", { "aria-hidden": "true" });
  into.replaceChildren(
    el(
      "div",
      { class: "pair" },
      el("figure", {}, original, el("figcaption", {}, "image")),
      el("figure", {}, mean, el("figcaption", {}, "reconstruction")),
    ),
    note(
      `The reconstruction is off by ${(255 * loaded.lost).toFixed(1)} of 255 (root mean square): what the code does not keep is lost before any edit.`,
    ),
  );
  const unpinned = { type: "thumbnail", slot: "main", view: { ...START_VIEW }, pinned: false } as const;
  void app.engine
    .ask({ ...unpinned, show: "original" })
    .then((picture) => drawInto(original, picture as never), ignore);
  void app.engine.ask({ ...unpinned, show: "image" }).then((picture) => drawInto(mean, picture as never), ignore);
}

async function fillHeldout(app: App, into: HTMLElement): Promise<void> {
  into.style.setProperty("--columns", "6");
  try {
    const { indices, shape, bytes } = await app.source.heldout(app.doc.run, HELDOUT);
    const [, channels, height, width] = shape as [number, number, number, number];
    const size = channels * height * width;
    into.replaceChildren(
      ...indices.map((index, i) => {
        const canvas = el("canvas", { "aria-hidden": "true" });
        drawInto(canvas, pictureOfBytes(bytes.subarray(i * size, (i + 1) * size), channels, height, width));
        const label = `Held-out image ${index}`;
        return el(
          "button",
          {
            type: "button",
            class: "thumb",
            "aria-label": label,
            title: label,
            click: () => app.openCode({ kind: "heldout", index }, label),
          },
          canvas,
        );
      }),
    );
  } catch (error) {
    into.replaceChildren(note(error instanceof Error ? error.message : String(error)));
  }
}

function uploadButton(app: App): HTMLElement {
  const input = el("input", {
    type: "file",
    accept: "image/png,image/jpeg,image/webp,image/bmp",
    hidden: true,
    "aria-label": "Image to encode",
  });
  input.addEventListener("change", () => {
    if (input.files?.[0]) void openImage(app, input.files[0]);
    input.value = "";
  });
  return el(
    "div",
    {},
    input,
    button("Choose an image …", () => input.click()),
  );
}

/** Sends an image to the server and goes to its code. */
export async function openImage(app: App, file: Blob & { name?: string }): Promise<void> {
  try {
    const buffer = await app.source.encode(app.doc.run, file);
    const code = readContainer(buffer).header["code"] as Code & { kind: "vector" };
    code.label = file.name ? file.name.slice(0, 40) : "Pasted image";
    app.source.remember(app.doc.run, code, buffer);
    app.openCode(code, `Encoded ${code.label}`);
  } catch (error) {
    app.fail(error);
  }
}

function betweenCodes(app: App): { element: HTMLElement; update: () => void } {
  let from: Code | null = null;
  let to: Code | null = null;
  const a = button("Set A", () => {
    from = base(app.doc.code);
    app.notify();
  });
  const b = button("Set B", () => {
    to = base(app.doc.code);
    app.notify();
  });
  const t = slider({
    label: "From A to B",
    min: 0,
    max: 1,
    step: 0.01,
    value: 0,
    onInput: (value) => {
      if (from && to) app.openCode({ kind: "mix", from, to, t: value }, "Between two codes", "mix");
    },
    onCommit: app.seal,
  });
  const element = el("div", {}, el("div", { class: "row" }, a, b), t.element);
  return {
    element,
    update: () => {
      a.textContent = from ? `A: ${nameOf(from)}` : "Set A to this code";
      b.textContent = to ? `B: ${nameOf(to)}` : "Set B to this code";
      t.element.querySelectorAll("input").forEach((input) => {
        input.disabled = !from || !to;
      });
      if (app.doc.code.kind === "mix") t.set(app.doc.code.t);
    },
  };
}

/** A mixture of mixtures would grow without end: its nearer end stands for it. */
function base(code: Code): Code {
  return code.kind === "mix" ? base(code.t < 0.5 ? code.from : code.to) : code;
}

const ignore = (): void => {};
