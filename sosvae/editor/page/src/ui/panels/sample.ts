/** Sample: the mean, or one of many plausible images; two noises, two temperatures. */
import type { App } from "../app";
import { button, choice, el, note, section, slider, uniqueId } from "../dom";
import { Thumbs } from "./thumbs";

const SHOWN = 9;

export function samplePanel(app: App): HTMLElement {
  const mode = choice<"mean" | "sample">(
    "What is shown",
    [
      ["mean", "Mean"],
      ["sample", "Sample"],
    ],
    (value) => app.view(value === "mean" ? "Mean" : "Sample", { mode: value }),
  );
  const seed = seedRow(app, "Seed of the image", "New sample", "seed");
  const localSeed = seedRow(app, "Seed of the grain", "New grain", "localSeed");
  const t = (label: string, key: "globalTemperature" | "localTemperature"): ReturnType<typeof slider> =>
    slider({
      label,
      min: 0,
      max: 2,
      step: 0.05,
      value: 1,
      onInput: (value) => app.view(label, { mode: "sample", [key]: value }, key),
      onCommit: app.seal,
    });
  const global = t("Temperature of the whole", "globalTemperature");
  const local = t("Temperature of the grain", "localTemperature");
  const thumbs = new Thumbs(app, "Several plausible images", 3);
  let first = 1;

  const fill = (): void => {
    if (app.prefs.panel !== "sample" || !app.loaded) return;
    void thumbs.show(
      Array.from({ length: SHOWN }, (_, i) => {
        const view = { ...app.doc.view, mode: "sample" as const, seed: first + i };
        return {
          label: `Plausible image of seed ${view.seed}`,
          request: { type: "thumbnail" as const, slot: "main" as const, view, pinned: true, show: "image" as const },
          onPick: () => app.view(`Sample of seed ${view.seed}`, { mode: "sample", seed: view.seed }),
          pressed: app.doc.view.mode === "sample" && app.doc.view.seed === view.seed,
        };
      }),
    );
  };
  app.onRest(fill);
  app.listen(() => {
    const { view } = app.doc;
    mode.set(view.mode);
    seed.update();
    localSeed.update();
    global.set(view.globalTemperature);
    local.set(view.localTemperature);
  });
  return el(
    "div",
    {},
    section(
      "What is shown",
      mode.element,
      seed.element,
      localSeed.element,
      note(
        "The whole image turns with the first seed. The second is noise of single pixels, or of neighbours where the model ties them, and stays until you ask for another.",
      ),
    ),
    section("Temperature", global.element, local.element, note("1 is the model, 0 silences.")),
    section(
      "Several plausible images",
      thumbs.element,
      button("Others", () => {
        first += SHOWN;
        fill();
      }),
    ),
  );
}

function seedRow(
  app: App,
  label: string,
  action: string,
  key: "seed" | "localSeed",
): { element: HTMLElement; update: () => void } {
  const id = uniqueId();
  const input = el("input", { type: "number", id, min: 0, step: 1 });
  const set = (value: number): void => app.view(`${action} (${value})`, { mode: "sample", [key]: value });
  input.addEventListener("change", () => {
    const value = Number(input.value);
    if (Number.isInteger(value) && value >= 0) set(value);
  });
  return {
    element: el(
      "div",
      { class: "seed" },
      el("label", { for: id }, label),
      input,
      button(action, () => set(Math.floor(Math.random() * 1e6))),
    ),
    update: () => {
      if (document.activeElement !== input) input.value = String(app.doc.view[key]);
    },
  };
}
