/** Interpolate: four samples at the corners and what lies between (paper, fig. 4), as a grid and as a film. */
import type { Picture } from "../../engine/engine";
import { normals } from "../../maths/random";
import { grid, slerp } from "../../maths/slerp";
import type { Walk } from "../../types";
import type { App } from "../app";
import { button, choice, el, note, section, slider } from "../dom";
import { download, enlarged, gifOf, pngOf, sheetOf, webmOf } from "../pictures";
import { drawInto, Thumbs, type ThumbWanted } from "./thumbs";

const SIDE = 5;
const PER_EDGE = 12;
const DELAY = 80; // ms between two pictures of a film
const EDGES: [string, [number, number]][] = [
  ["Top", [0, 1]],
  ["Right", [1, 3]],
  ["Bottom", [3, 2]],
  ["Left", [2, 0]],
];

export function interpolatePanel(app: App): HTMLElement {
  const thumbs = new Thumbs(app, "The grid between four samples", SIDE);
  const moving = el("canvas", { class: "film", role: "img", "aria-label": "Image on the way along an edge" });
  let playing = 0;
  /** Where the film is, while it plays. */
  let film: { edge: number; t: number } | null = null;
  const place = (): { edge: number; t: number } => film ?? app.doc.walk;
  const change = (label: string, patch: Partial<Walk>, key: string | null = null): void =>
    app.change(label, { walk: { ...app.doc.walk, ...patch } }, key);

  const words = note("");
  app.listen(() => {
    const pinned = app.remote.conditions
      ? "What is pinned is left out: here the server conditions, one image at a time."
      : "What is pinned stays pinned.";
    words.textContent = `The corners are samples; in between, ω turns from one to the other at constant speed (eq. 4), and the grain is held. ${pinned}`;
  });

  const corners = (): Float32Array[] => app.doc.walk.corners.map((seed) => normals(seed, app.loaded?.R ?? 0));
  const fields = [0, 1, 2, 3].map((i) => {
    const label = `Seed of the ${["top left", "top right", "bottom left", "bottom right"][i]} corner`;
    const input = el("input", { type: "number", min: 0, step: 1, "aria-label": label, title: label });
    input.addEventListener("change", () => {
      const value = Number(input.value);
      if (!Number.isInteger(value) || value < 0) return;
      change(`${label}: ${value}`, { corners: app.doc.walk.corners.map((seed, j) => (j === i ? value : seed)) });
    });
    return input;
  });
  const request = (epsilon: Float32Array): ThumbWanted["request"] => ({
    type: "thumbnail",
    slot: "main",
    view: { ...app.doc.view, mode: "sample" },
    epsilon: Array.from(epsilon),
    pinned: !app.remote.conditions,
    show: "image",
  });
  const fill = (): void => {
    if (app.prefs.panel !== "interpolate" || !app.loaded) return;
    void thumbs.show(
      grid(corners(), SIDE, SIDE).map((epsilon, i) => ({
        label: `Row ${Math.floor(i / SIDE) + 1}, column ${(i % SIDE) + 1}`,
        request: request(epsilon),
      })),
    );
    void step();
  };
  const step = async (): Promise<void> => {
    const { edge, t } = place();
    const all = corners();
    const [from, to] = EDGES[edge]![1];
    along.set(t);
    which.set(String(edge));
    try {
      drawInto(moving, await app.engine.ask<Picture>(request(slerp(all[from]!, all[to]!, t)), true));
    } catch {
      // overtaken by a newer state
    }
  };
  const along = slider({
    label: "Along the edge",
    min: 0,
    max: 1,
    step: 0.01,
    value: 0,
    onInput: (t) => {
      change("Along an edge", { t, edge: place().edge }, "along");
      void step();
    },
    onCommit: app.seal,
  });
  const which = choice(
    "Edge",
    EDGES.map(([name], i) => [String(i), name]),
    (value) => change(`${EDGES[Number(value)]![0]} edge`, { edge: Number(value) }),
  );
  const play = button(
    "Play",
    () => {
      if (film) {
        clearInterval(playing);
        const { edge, t } = film;
        film = null;
        change("Along an edge", { edge, t });
      } else {
        film = { ...app.doc.walk };
        playing = window.setInterval(() => {
          const { edge, t } = film!;
          film = t + 0.04 > 1 ? { edge: (edge + 1) % EDGES.length, t: 0 } : { edge, t: t + 0.04 };
          if (app.prefs.panel === "interpolate") void step();
        }, DELAY);
      }
      play.textContent = film ? "Stop" : "Play";
      play.setAttribute("aria-pressed", String(film !== null));
    },
    { "aria-pressed": "false" },
  );

  /** All four edges, once around. */
  const wholeWay = async (): Promise<Picture[]> => {
    const pictures: Picture[] = [];
    const all = corners();
    for (const [, [from, to]] of EDGES) {
      for (let i = 0; i < PER_EDGE; i++) {
        pictures.push(await app.engine.ask<Picture>(request(slerp(all[from]!, all[to]!, i / PER_EDGE))));
      }
    }
    return pictures;
  };
  const save = (name: string, make: () => Promise<Blob>): HTMLElement =>
    button(name, () => {
      make().then(
        (blob) => download(blob, `interpolation.${name.toLowerCase()}`),
        (error) => app.fail(error),
      );
    });
  app.onRest(fill);
  app.listen(() =>
    fields.forEach((input, i) => {
      if (document.activeElement !== input) input.value = String(app.doc.walk.corners[i]);
    }),
  );
  return el(
    "div",
    {},
    section(
      "Between four samples",
      thumbs.element,
      el("div", { class: "corners", role: "group", "aria-label": "Seeds of the corners" }, ...fields),
      button("Other corners", () =>
        change("Other corners", { corners: fields.map(() => Math.floor(Math.random() * 1e6)) }),
      ),
      words,
    ),
    section("Along an edge", moving, which.element, along.element, play),
    section(
      "Save",
      el(
        "div",
        { class: "row" },
        save("PNG", async () =>
          pngOf(sheetOf(thumbs.pictures, SIDE, Math.max(1, Math.round(enlarged(thumbs.pictures[0]!) / 4)))),
        ),
        save("GIF", async () => {
          const pictures = await wholeWay();
          return gifOf(pictures, enlarged(pictures[0]!), DELAY);
        }),
        save("WebM", async () => {
          const pictures = await wholeWay();
          return webmOf(pictures, enlarged(pictures[0]!), DELAY);
        }),
      ),
    ),
  );
}
