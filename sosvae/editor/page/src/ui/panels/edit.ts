/** Edit: how the next stroke is meant, the strokes so far, what they leave open, other ways to go on. */
import type { Stroke } from "../../types";
import type { App } from "../app";
import { button, checkbox, choice, el, iconButton, section, slider, type Slider } from "../dom";
import { strokeOptions } from "../toolbar";
import { Thumbs } from "./thumbs";

/** The slider's 0 to 100 as τ: exactly, then from 1/1000 to 1/2 by equal ratios. */
export const tauOf = (firmness: number): number => (firmness >= 100 ? 0 : 10 ** (-3 + 2.7 * (1 - firmness / 100)));
export const firmnessOf = (tau: number): number =>
  tau === 0 ? 100 : Math.round(100 * (1 - (Math.log10(tau) + 3) / 2.7));
const words = (firmness: number): string => {
  const tau = tauOf(firmness);
  return tau === 0 ? "exactly" : `±${(255 * tau).toFixed(255 * tau < 10 ? 1 : 0)} of 255`;
};

export function editPanel(app: App): HTMLElement {
  const next = slider({
    label: "How firmly the next stroke is meant",
    min: 0,
    max: 100,
    step: 1,
    value: 100,
    format: words,
    onInput: (value) => app.setPrefs({ tau: tauOf(value) }),
  });
  const mode = choice<"mean" | "sample">(
    "The rest follows as",
    [
      ["mean", "Conditional mean"],
      ["sample", "Sample"],
    ],
    (value) => app.view(value === "mean" ? "Mean" : "Sample", { mode: value }),
  );
  const live = checkbox("Follow while the pointer moves", (on) => app.setPrefs({ live: on }));
  const strokes = strokeList(app);
  const facts = el("dl", { class: "facts", "aria-live": "polite" });
  const thumbs = new Thumbs(app, "Other continuations of this edit", 4);
  let first = 100;
  const fill = (): void => {
    showFacts(app, facts);
    if (app.prefs.panel !== "edit" || !app.loaded) return;
    void thumbs.show(
      [0, 1, 2, 3].map((i) => {
        const view = { ...app.doc.view, mode: "sample" as const, seed: first + i };
        return {
          label: `Continuation of seed ${view.seed}`,
          request: { type: "thumbnail" as const, slot: "main" as const, view, pinned: true, show: "image" as const },
          onPick: () => app.view(`Continuation of seed ${view.seed}`, { mode: "sample", seed: view.seed }),
          pressed: app.doc.view.mode === "sample" && app.doc.view.seed === view.seed,
        };
      }),
    );
  };
  app.onRest(fill);
  app.listen(() => {
    next.set(firmnessOf(app.prefs.tau));
    mode.set(app.doc.view.mode);
    live.set(app.prefs.live);
    strokes.update();
  });
  return el(
    "div",
    {},
    section(
      "The next stroke",
      next.element,
      el(
        "div",
        { class: "row" },
        button("Pin all that is shown", () => app.addStroke(app.newStroke([0, 0, 1], { tool: "pin", shape: "all" }))),
        button("Unpin all", () =>
          app.addStroke(app.newStroke([0, 0, 1], { tool: "erase", shape: "all", channels: 7 })),
        ),
      ),
    ),
    el("div", { class: "narrow" }, section("The brush", ...strokeOptions(app))),
    section("The rest", mode.element, live.element),
    section("What the edit says", facts),
    section(
      "Other continuations",
      thumbs.element,
      button("Others", () => {
        first += 4;
        fill();
      }),
    ),
    section("Strokes", strokes.element),
  );
}

function showFacts(app: App, into: HTMLElement): void {
  const { stats } = app;
  const rows: [string, string][] = [];
  if (!stats || stats.deviation === null || stats.surprise === null) {
    if (!app.loaded) return;
    rows.push(["Pinned values", String(app.frame?.pinned ?? 0)]);
    rows.push(["Surprise, uncertainty", "not worked out where the server conditions"]);
  } else if (stats.count > 0) {
    const ratio = stats.surprise / stats.count;
    const level =
      ratio < 2 ? "as the model expects" : ratio < 10 ? "unusual" : ratio < 100 ? "surprising" : "very surprising";
    rows.push(["Pinned values", String(stats.count)]);
    rows.push(["Surprise of each", `${ratio < 100 ? ratio.toFixed(2) : ratio.toExponential(1)}: ${level}`]);
    const left = stats.deviationBefore > 0 ? (100 * stats.deviation) / stats.deviationBefore : 0;
    rows.push(["Uncertainty left", `${left.toFixed(0)} % (±${(255 * stats.deviation).toFixed(1)} of 255)`]);
  } else {
    rows.push(["Pinned values", "none yet: paint, or pin what is shown"]);
    rows.push(["Uncertainty", `±${(255 * stats.deviation).toFixed(1)} of 255`]);
  }
  into.replaceChildren(...rows.flatMap(([name, value]) => [el("dt", {}, name), el("dd", {}, value)]));
}

function strokeList(app: App): { element: HTMLElement; update: () => void } {
  const list = el("ol", { class: "strokes" });
  const sliders = new Map<number, { item: HTMLElement; tau: Slider | null }>();
  const make = (stroke: Stroke, index: number): { item: HTMLElement; tau: Slider | null } => {
    const swatch = el("span", { class: "swatch", "aria-hidden": "true" });
    const [r, g, b] =
      stroke.colour.length === 3 ? stroke.colour : [stroke.colour[0], stroke.colour[0], stroke.colour[0]];
    if (stroke.tool === "paint")
      swatch.style.background = `rgb(${[r, g, b].map((v) => Math.round(255 * v!)).join(" ")})`;
    const name = `${{ paint: "Paint", recolour: "Recolour", pin: "Pin", erase: "Unpin" }[stroke.tool]} ${index + 1}`;
    const tau =
      stroke.tool === "erase"
        ? null
        : slider({
            label: `How firmly stroke ${index + 1} is meant`,
            quiet: true,
            min: 0,
            max: 100,
            step: 1,
            value: firmnessOf(stroke.tau),
            format: words,
            onInput: (value) => app.setTau(stroke.id, tauOf(value)),
            onCommit: app.seal,
          });
    const item = el(
      "li",
      {},
      el(
        "div",
        { class: "head" },
        swatch,
        el("span", {}, name),
        iconButton("bin", `Remove stroke ${index + 1}`, () => app.removeStroke(stroke.id)),
      ),
      tau?.element,
    );
    return { item, tau };
  };
  return {
    element: list,
    update: () => {
      const { strokes } = app.doc;
      const ids = new Set(strokes.map((stroke) => stroke.id));
      for (const id of sliders.keys()) if (!ids.has(id)) sliders.delete(id);
      const items = strokes
        .map((stroke, index) => {
          let row = sliders.get(stroke.id);
          if (!row) sliders.set(stroke.id, (row = make(stroke, index)));
          row.tau?.set(firmnessOf(stroke.tau));
          return row.item;
        })
        .reverse();
      const same = items.length === list.children.length && items.every((item, i) => list.children[i] === item);
      if (!same) list.replaceChildren(...(items.length ? items : [el("li", { class: "note" }, "None yet.")]));
    },
  };
}
