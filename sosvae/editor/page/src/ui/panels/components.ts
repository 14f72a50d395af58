/** Components: how much each counts, in units of its standard deviation; 1 is the model, 0 silences (paper, eq. 5). */
import type { Picture } from "../../engine/engine";
import { START_VIEW } from "../../types";
import type { App } from "../app";
import { button, el, iconButton, note, section, slider, type Slider } from "../dom";
import { drawInto } from "./thumbs";

const MOST = 3;

interface Row {
  slider: Slider;
  lock: HTMLButtonElement;
  reset: HTMLButtonElement;
  canvas: HTMLCanvasElement;
  share: HTMLElement;
}

export function componentsPanel(app: App): HTMLElement {
  const list = el("ol", { class: "components" });
  const hint = note("You look at the mean, where components only show around an edit. ");
  hint.append(button("Show a sample", () => app.view("Sample", { mode: "sample" })));
  const none = note("This model has no low-rank part, and so no components.");
  const rows: Row[] = [];
  let shown = "";

  const scales = (): number[] => app.doc.view.scales ?? new Array<number>(app.loaded?.R ?? 0).fill(1);
  const set = (k: number, value: number): void => {
    const next = [...scales()];
    next[k] = value;
    app.view(`Component ${k + 1} at ${value}`, { scales: next.every((a) => a === 1) ? null : next }, `scale ${k}`);
  };
  const all = (value: number, label: string): void => {
    const { locked } = app.doc.view;
    const next = scales().map((a, k) => (locked.includes(k) ? a : value));
    app.view(label, { scales: next.every((a) => a === 1) ? null : next });
  };
  const build = (R: number): void => {
    rows.length = 0;
    list.replaceChildren();
    for (let k = 0; k < R; k++) {
      const name = `Component ${k + 1}`;
      const canvas = el("canvas", { role: "img", "aria-label": `Effect of component ${k + 1}` });
      const made = slider({
        label: name,
        quiet: true,
        min: 0,
        max: MOST,
        step: 0.05,
        value: 1,
        onInput: (value) => set(k, value),
        onCommit: app.seal,
      });
      const lock = iconButton(
        "lock",
        `Lock component ${k + 1}`,
        () => {
          const { locked } = app.doc.view;
          const on = locked.includes(k);
          app.view(`${on ? "Unlocked" : "Locked"} component ${k + 1}`, {
            locked: on ? locked.filter((i) => i !== k) : [...locked, k],
          });
        },
        { "aria-pressed": "false" },
      );
      const reset = iconButton("reset", `Reset component ${k + 1}`, () => {
        set(k, 1);
        app.seal();
      });
      const share = el("span", { class: "share" });
      rows.push({ slider: made, lock, reset, canvas, share });
      list.append(
        el(
          "li",
          {},
          canvas,
          el(
            "div",
            { class: "body" },
            el("div", { class: "head" }, el("span", {}, String(k + 1)), share, reset, lock),
            made.element,
          ),
        ),
      );
    }
  };
  const thumbnails = async (): Promise<void> => {
    if (app.prefs.panel !== "components" || !app.loaded) return;
    const key = JSON.stringify([app.doc.run, app.doc.code]);
    if (key === shown) return;
    shown = key;
    for (let k = 0; k < rows.length; k++) {
      try {
        const picture = await app.engine.ask<Picture>({
          type: "thumbnail",
          slot: "main",
          view: START_VIEW,
          component: k,
          pinned: false,
          show: "image",
        });
        if (shown !== key) return;
        drawInto(rows[k]!.canvas, picture);
      } catch {
        return;
      }
    }
  };
  app.onRest(() => void thumbnails());
  app.listen(() => {
    if (!app.loaded) return;
    const { R, variances } = app.loaded;
    if (rows.length !== R) build(R);
    const total = variances.reduce((sum, value) => sum + value, 0) || 1;
    const { view } = app.doc;
    const values = scales();
    rows.forEach((row, k) => {
      const locked = view.locked.includes(k);
      row.slider.set(values[k] ?? 1);
      row.share.textContent = `${((100 * variances[k]!) / total).toFixed(1)} % of variance`;
      row.lock.setAttribute("aria-pressed", String(locked));
      row.reset.disabled = locked || (values[k] ?? 1) === 1;
      row.slider.element.querySelectorAll("input").forEach((input) => {
        input.disabled = locked;
      });
    });
    hint.hidden = view.mode === "sample" || app.doc.strokes.length > 0 || R === 0;
    none.hidden = R > 0;
  });
  return el(
    "div",
    {},
    section(
      "Components",
      note(
        "1 is the model, 0 silences. Each picture is the mean and two standard deviations of its component. The first varies most.",
      ),
      hint,
      none,
      el(
        "div",
        { class: "row" },
        button("Reset all", () => all(1, "All components reset")),
        button("Silence all", () => all(0, "All components silenced")),
      ),
      list,
    ),
  );
}
