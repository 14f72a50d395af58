/** Look: what else the model says of this code. */
import type { Show } from "../../types";
import type { App } from "../app";
import { choice, el, note, section } from "../dom";

export const SHOWS: [Show, string][] = [
  ["image", "Image"],
  ["mean", "Mean"],
  ["deviation", "Deviation"],
  ["covariance", "Covariance"],
  ["original", "Original"],
];
const EXPLAINED: Record<string, string> = {
  image: "What the settings under Sample and Edit make.",
  mean: "The conditional mean, whatever is sampled.",
  deviation: "The standard deviation of each pixel, given what is pinned.",
  covariance: "How every pixel goes with the one under the pointer: red the same way, blue the other way.",
  original: "The image that the code was made from.",
};

/** Why the page does not show what is asked for. */
function unknown({ loaded, prefs, frame }: App): string | null {
  if (prefs.show !== "deviation" && prefs.show !== "covariance") return null;
  if (loaded?.where === "server") return "The page has no formulas for this distribution: the mean is shown.";
  if (loaded?.conditions !== "server") return null;
  const how = prefs.show === "deviation" ? ", estimated from 64 samples" : "";
  const pinned = frame?.pinned ? " What is pinned is left out: at this size the page does not condition." : "";
  return `Of the model at this code${how}.${pinned}`;
}

export function lookPanel(app: App): HTMLElement {
  const show = choice<Show>("What the canvas shows", SHOWS, (value) => app.setPrefs({ show: value }));
  show.element.classList.add("wrap");
  const words = note("");
  const legend = el("div", { class: "legend" });
  const low = el("span", {}),
    high = el("span", {}),
    ramp = el("div", { class: "ramp", "aria-hidden": "true" });
  legend.append(low, ramp, high);
  let pinnedHere = false;
  const facts = el("dl", { class: "facts", "aria-live": "polite" });

  app.onFrame(() => {
    const top = app.frame?.main.top;
    legend.hidden = top === undefined;
    if (top === undefined) return;
    const diverging = app.prefs.show === "covariance";
    const still = diverging && top <= 1e-12;
    legend.hidden = still;
    if (still !== pinnedHere) {
      pinnedHere = still;
      words.textContent = still
        ? "The pixel under the pointer is pinned: nothing goes with it."
        : EXPLAINED["covariance"]!;
    }
    ramp.classList.toggle("diverging", diverging);
    low.textContent = diverging ? `−${top.toPrecision(2)}` : "0";
    high.textContent = diverging ? `+${top.toPrecision(2)}` : `±${(255 * top).toFixed(1)} of 255`;
  });
  app.onRest(() => {
    const { stats, loaded } = app;
    if (!loaded) return;
    const values = loaded.shape.reduce((product, size) => product * size, 1);
    const density = stats?.logDensity ?? app.remote.logDensity;
    const deviation = stats?.deviation ?? stats?.deviationBefore;
    const rows: [string, string][] = [];
    if (density !== null) {
      rows.push(["Log-density", `${Math.round(density).toLocaleString("en")} nats`]);
      rows.push(["of each value", `${(density / values).toFixed(3)} nats`]);
    }
    if (deviation !== undefined) {
      const how = loaded.estimated ? ", estimated" : "";
      rows.push(["Mean deviation", `±${(255 * deviation).toFixed(1)} of 255${how}`]);
    }
    facts.replaceChildren(...rows.flatMap(([name, value]) => [el("dt", {}, name), el("dd", {}, value)]));
  });
  app.listen(() => {
    show.set(app.prefs.show);
    const missing = app.prefs.show === "original" && app.loaded?.lost === undefined;
    words.textContent = missing ? "This code comes from no image." : (unknown(app) ?? EXPLAINED[app.prefs.show] ?? "");
  });
  return el(
    "div",
    {},
    section("What the canvas shows", show.element, words, legend),
    section(
      "What is shown now",
      facts,
      note("Under the model of this code, components scaled as they are; what is pinned counts as it is."),
    ),
  );
}
