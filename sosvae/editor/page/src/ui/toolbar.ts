/** Tools, what they are set to, and the view: small islands over the canvas. */
import type { Shape, Tool } from "../types";
import type { App } from "./app";
import { checkbox, choice, el, iconButton, slider, uniqueId } from "./dom";
import type { PointerInput } from "./pointer";
import type { Stage } from "./stage";

const TOOLS: [Tool, string, string][] = [
  ["paint", "Paint", "B"],
  ["recolour", "Recolour: shift what is shown", "C"],
  ["pin", "Pin what is shown", "P"],
  ["erase", "Unpin", "E"],
];
const SHAPES: [Shape, string, string][] = [
  ["brush", "Brush", "D"],
  ["lasso", "Lasso", "L"],
];
const GREYS = [0, 0.25, 0.5, 0.75, 1].map((v) => [v, v, v]);
const COLOURS = [
  ...GREYS.filter((_, i) => i % 2 === 0),
  [0.85, 0.2, 0.2],
  [0.95, 0.75, 0.3],
  [0.25, 0.55, 0.3],
  [0.2, 0.4, 0.8],
];

export function toolsIsland(app: App, pointer: PointerInput): HTMLElement {
  const tools = TOOLS.map(([tool, name, key]) =>
    iconButton(tool, `${name} (${key})`, () => app.setPrefs({ tool }), { "aria-pressed": "false" }),
  );
  const shapes = SHAPES.map(([shape, name, key]) =>
    iconButton(shape, `${name} (${key})`, () => app.setPrefs({ shape }), { "aria-pressed": "false" }),
  );
  const picker = iconButton(
    "picker",
    "Take a colour from the image (I, or Alt and a click)",
    () => {
      pointer.picking = !pointer.picking;
      app.notify();
    },
    { "aria-pressed": "false" },
  );
  app.listen(() => {
    TOOLS.forEach(([tool], i) => tools[i]!.setAttribute("aria-pressed", String(app.prefs.tool === tool)));
    SHAPES.forEach(([shape], i) => shapes[i]!.setAttribute("aria-pressed", String(app.prefs.shape === shape)));
    picker.setAttribute("aria-pressed", String(pointer.picking));
  });
  return el(
    "div",
    { class: "island tools", role: "toolbar", "aria-label": "Tools" },
    ...tools,
    el("hr"),
    ...shapes,
    el("hr"),
    picker,
  );
}

export function optionsIsland(app: App): HTMLElement {
  const size = slider({
    label: "Brush",
    min: 1,
    max: 64,
    step: 1,
    value: 3,
    format: () => "px",
    onInput: (diameter) => app.setPrefs({ diameter }),
  });
  const grey = slider({
    label: "Grey",
    min: 0,
    max: 255,
    step: 1,
    value: 255,
    onInput: (v) => app.setPrefs({ colour: [v / 255, v / 255, v / 255] }),
  });
  const id = uniqueId();
  const picker = el("input", { type: "color", id, value: "#ffffff" });
  picker.addEventListener("input", () =>
    app.setPrefs({ colour: [1, 3, 5].map((i) => parseInt(picker.value.slice(i, i + 2), 16) / 255) }),
  );
  const colour = el("div", { class: "row" }, el("label", { for: id }, "Colour"), picker);
  const swatches = el("div", { class: "swatches", role: "group", "aria-label": "Colours" });
  let made = 0;
  app.listen(() => {
    const { prefs } = app;
    const colours = app.channels === 3 ? COLOURS : GREYS;
    if (made !== app.channels) {
      made = app.channels;
      swatches.replaceChildren(
        ...colours.map((value) => {
          const css = `rgb(${value.map((v) => Math.round(255 * v)).join(" ")})`;
          const swatch = el("button", {
            type: "button",
            class: "swatch",
            "aria-label": `Colour ${css.slice(4, -1)}`,
            click: () => app.setPrefs({ colour: value }),
          });
          swatch.style.background = css;
          return swatch;
        }),
      );
    }
    [...swatches.children].forEach((swatch, i) =>
      swatch.setAttribute("aria-pressed", String(colours[i]!.every((v, c) => Math.abs(v - prefs.colour[c]!) < 0.002))),
    );
    grey.element.hidden = app.channels !== 1;
    colour.hidden = app.channels !== 3;
    grey.set(Math.round(255 * prefs.colour[0]!));
    picker.value =
      "#" +
      prefs.colour
        .map((v) =>
          Math.round(255 * v)
            .toString(16)
            .padStart(2, "0"),
        )
        .join("");
    size.set(Math.round(prefs.diameter));
  });
  return el(
    "div",
    { class: "island options", role: "group", "aria-label": "Brush" },
    swatches,
    grey.element,
    colour,
    size.element,
    ...strokeOptions(app),
  );
}

/** Symmetry, channels and the outline: beside the brush, and on a narrow screen in the panel. */
export function strokeOptions(app: App): HTMLElement[] {
  const symmetry = choice<string>(
    "Symmetry",
    [
      ["0", "Off"],
      ["1", "⇔"],
      ["2", "⇕"],
      ["3", "Both"],
    ],
    (v) => app.setPrefs({ mirror: Number(v) }),
  );
  const names = ["Red", "Green", "Blue"];
  const channels = names.map((name, c) =>
    checkbox(name, () => {
      const next = app.prefs.channels ^ (1 << c);
      app.setPrefs({ channels: next || 7 });
    }),
  );
  const channelRow = el(
    "fieldset",
    { class: "channels" },
    el("legend", {}, "Channels"),
    ...channels.map((box) => box.element),
  );
  const mask = checkbox("Outline pins", (on) => {
    app.setPrefs({ mask: on });
    app.requestFrame();
  });
  app.listen(() => {
    symmetry.set(String(app.prefs.mirror));
    channels.forEach((box, c) => box.set(!!((app.prefs.channels >> c) & 1)));
    channelRow.hidden = app.channels !== 3;
    mask.set(app.prefs.mask);
  });
  return [el("div", { class: "labelled" }, el("span", {}, "Symmetry"), symmetry.element), channelRow, mask.element];
}

export function viewIsland(app: App, stage: Stage): HTMLElement {
  const percent = el("output", { class: "zoom", "aria-label": "Zoom" });
  const undo = iconButton("undo", "Undo (Ctrl+Z)", () => app.undo());
  const redo = iconButton("redo", "Redo (Ctrl+Shift+Z)", () => app.redo());
  const before = iconButton("before", "Before the edit: hold (H)", () => {}, { "aria-pressed": "false" });
  const hold = (on: boolean) => (): void => {
    if (app.holdingBefore === on) return;
    app.holdingBefore = on;
    app.requestFrame();
    app.notify();
  };
  before.addEventListener("pointerdown", hold(true));
  for (const end of ["pointerup", "pointerleave", "pointercancel", "blur"]) before.addEventListener(end, hold(false));
  before.addEventListener("keydown", (event) => {
    if (event.key === "Enter" || event.key === " ") hold(!app.holdingBefore)();
  });
  const update = (): void => {
    percent.textContent = `${stage.zoom >= 1 ? stage.zoom : stage.zoom.toFixed(2)}×`;
    undo.disabled = app.history.index === 0;
    redo.disabled = app.history.index === app.history.entries.length - 1;
    before.setAttribute("aria-pressed", String(app.holdingBefore));
  };
  app.listen(update);
  app.onFrame(update);
  const zoomed = (act: () => void) => (): void => {
    act();
    update();
  };
  return el(
    "div",
    { class: "island view", role: "toolbar", "aria-label": "View" },
    undo,
    redo,
    el("hr"),
    before,
    el("hr"),
    iconButton(
      "minus",
      "Zoom out (−)",
      zoomed(() => stage.zoomBy(1 / 1.25)),
    ),
    percent,
    iconButton(
      "plus",
      "Zoom in (+)",
      zoomed(() => stage.zoomBy(1.25)),
    ),
    iconButton(
      "fit",
      "Fit into the window (0)",
      zoomed(() => stage.fit()),
    ),
  );
}

export function cornerIsland(app: App, help: () => void): HTMLElement {
  const theme = iconButton("theme", "Light, dark or as the system", () => {
    const next = { system: "light", light: "dark", dark: "system" } as const;
    app.setPrefs({ theme: next[app.prefs.theme] });
  });
  const question = el(
    "button",
    { type: "button", class: "icon", "aria-label": "Keys (?)", title: "Keys (?)", click: help },
    "?",
  );
  const root = document.documentElement;
  app.listen(() => {
    if (app.prefs.theme === "system") delete root.dataset["theme"];
    else root.dataset["theme"] = app.prefs.theme;
    theme.title = `Theme: ${app.prefs.theme}`;
  });
  return el("div", { class: "island corner" }, theme, question);
}
