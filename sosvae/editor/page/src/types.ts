/** The state of a session: plain data, from which the picture follows. */

export type Code =
  | { kind: "seed"; seed: number }
  | { kind: "heldout"; index: number }
  | { kind: "vector"; z: number[]; label?: string }
  | { kind: "mix"; from: Code; to: Code; t: number }
  | { kind: "mean of"; run: string; code: Code };

export type Tool = "paint" | "recolour" | "pin" | "erase";
export type Shape = "brush" | "lasso" | "all";

export interface Stroke {
  id: number;
  tool: Tool;
  shape: Shape;
  /** x, y and brush diameter of each point (pixels of the image); of a lasso, its corners. */
  points: number[];
  colour: number[];
  /** Standard deviation that the stroke is meant with (intensity; 0: exactly). */
  tau: number;
  /** Bit c is set where channel c is meant. */
  channels: number;
  /** Bit 0: also mirrored left to right; bit 1: top to bottom. */
  mirror: number;
  /** Values that were pinned as shown belong to what was shown then. */
  view?: View;
}

export interface View {
  mode: "mean" | "sample";
  seed: number;
  localSeed: number;
  globalTemperature: number;
  localTemperature: number;
  /** Scale of each component, 1 is the model; `null` where all are 1. */
  scales: number[] | null;
  locked: number[];
}

/** Between four samples: the seeds of the corners, row by row, and a place along an edge. */
export interface Walk {
  corners: number[];
  edge: number;
  t: number;
}

export interface Doc {
  run: string;
  code: Code;
  view: View;
  strokes: Stroke[];
  /** Another run, shown at the code of the same image. */
  compare: string | null;
  walk: Walk;
}

export type Show = "image" | "mean" | "deviation" | "covariance" | "original" | "before";

export interface RunInfo {
  name: string;
  head: string;
  shape: [number, number, number];
  latents: number;
  source: string;
  step: number | null;
}

export const START_WALK: Walk = { corners: [11, 22, 33, 44], edge: 0, t: 0 };

export const START_VIEW: View = {
  mode: "mean",
  seed: 0,
  localSeed: 0,
  globalTemperature: 1,
  localTemperature: 1,
  scales: null,
  locked: [],
};
