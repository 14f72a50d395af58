/** How a person likes to work: kept by the browser, never part of undo. */
import type { Shape, Show, Tool } from "../types";

export interface Prefs {
  tool: Tool;
  shape: Shape;
  diameter: number;
  colour: number[];
  tau: number;
  channels: number;
  mirror: number;
  live: boolean;
  mask: boolean;
  panel: string;
  show: Show;
  theme: "light" | "dark" | "system";
  sheet: boolean;
}

const KEY = "sosvae-edit";
const START: Prefs = {
  tool: "paint",
  shape: "brush",
  diameter: 3,
  colour: [1, 1, 1],
  tau: 0,
  channels: 7,
  mirror: 0,
  live: true,
  mask: true,
  panel: "codes",
  show: "image",
  theme: "system",
  sheet: true,
};

export function loadPrefs(): Prefs {
  try {
    return { ...START, ...(JSON.parse(localStorage.getItem(KEY) ?? "{}") as Partial<Prefs>), show: "image" };
  } catch {
    return { ...START }; // no storage in this window, or another version's
  }
}

export function savePrefs(prefs: Prefs): void {
  try {
    localStorage.setItem(KEY, JSON.stringify(prefs));
  } catch {
    // Private windows: it works all the same.
  }
}
