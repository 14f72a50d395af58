/** The keyboard, on any layout. */
import type { App } from "./app";
import type { PointerInput } from "./pointer";
import type { Stage } from "./stage";
import { copyPicture, openFile } from "./panels/save";

export const HELP: [string, string][] = [
  ["B, C, P, E", "paint, recolour, pin, unpin"],
  ["D, L", "brush, lasso"],
  ["I, or Alt and a click", "take a colour from the image"],
  ["[ and ]", "brush smaller, larger"],
  ["X", "symmetry"],
  ["M", "outline of what is pinned"],
  ["H, held", "before the edit"],
  ["S, N", "mean or sample, a new sample"],
  ["Ctrl+Z, Ctrl+Shift+Z", "undo, redo"],
  ["Ctrl+C, Ctrl+V", "copy the picture, paste an image"],
  ["+, −, 0, wheel", "zoom, fit"],
  ["Space or middle button", "pan"],
  ["Arrows, Enter", "on the canvas: move the brush, paint; with Shift by 8"],
  ["Enter with the lasso", "a corner; once more at the same place closes it"],
  ["Esc", "give the stroke up"],
];

/** The letter that a key stands for: its own, or on layouts of other scripts the one at its place. */
export function keyOf(event: KeyboardEvent): string {
  if (event.key.length > 1 || /^[\x20-\x7e]$/.test(event.key))
    return event.key.length > 1 ? event.key : event.key.toLowerCase();
  if (/^Key[A-Z]$/.test(event.code)) return event.code.slice(3).toLowerCase();
  return { BracketLeft: "[", BracketRight: "]" }[event.code] ?? event.key;
}

export function listenToKeys(app: App, stage: Stage, pointer: PointerInput, help: () => void): void {
  const typing = (target: EventTarget | null): boolean =>
    (target instanceof HTMLInputElement && !["range", "checkbox", "color", "file"].includes(target.type)) ||
    target instanceof HTMLSelectElement ||
    target instanceof HTMLTextAreaElement;

  window.addEventListener("keydown", (event) => {
    if (typing(event.target) || document.querySelector("dialog[open]")) return;
    const key = keyOf(event);
    if (key === "Tab" || key.startsWith("Arrow")) delete stage.canvas.dataset["by"];
    const command = event.ctrlKey || event.metaKey;
    if (command) {
      if (key === "z" && !event.altKey) event.shiftKey ? app.redo() : app.undo();
      else if (key === "y") app.redo();
      else if (key === "c" && !getSelection()?.toString()) void copyPicture(app).catch((error) => app.fail(error));
      else return;
      event.preventDefault();
      return;
    }
    if (event.altKey) return;
    if (event.target === stage.canvas && moveByKey(app, stage, pointer, key, event.shiftKey)) {
      event.preventDefault();
      return;
    }
    if (key === " ") {
      if (event.target !== stage.canvas && event.target !== document.body) return;
      pointer.spaceHeld = true;
      event.preventDefault();
      return;
    }
    const { prefs } = app;
    const step = prefs.diameter < 8 ? 1 : prefs.diameter < 24 ? 2 : 4;
    const actions: Record<string, () => void> = {
      b: () => app.setPrefs({ tool: "paint" }),
      c: () => app.setPrefs({ tool: "recolour" }),
      p: () => app.setPrefs({ tool: "pin" }),
      e: () => app.setPrefs({ tool: "erase" }),
      d: () => app.setPrefs({ shape: "brush" }),
      l: () => app.setPrefs({ shape: "lasso" }),
      i: () => {
        pointer.picking = !pointer.picking;
        app.notify();
      },
      x: () => app.setPrefs({ mirror: (prefs.mirror + 1) % 4 }),
      m: () => {
        app.setPrefs({ mask: !prefs.mask });
        app.requestFrame();
      },
      s: () =>
        app.view(app.doc.view.mode === "mean" ? "Sample" : "Mean", {
          mode: app.doc.view.mode === "mean" ? "sample" : "mean",
        }),
      n: () => app.view("New sample", { mode: "sample", seed: app.doc.view.seed + 1 }),
      h: () => holdBefore(app, true),
      "[": () => app.setPrefs({ diameter: Math.max(1, prefs.diameter - step) }),
      "]": () => app.setPrefs({ diameter: Math.min(64, prefs.diameter + step) }),
      "+": () => stage.zoomBy(1.25),
      "=": () => stage.zoomBy(1.25),
      "-": () => stage.zoomBy(1 / 1.25),
      "0": () => stage.fit(),
      "?": help,
      Escape: () => app.end(false),
    };
    const action = actions[key];
    if (!action) return;
    event.preventDefault();
    action();
    stage.draw();
  });
  window.addEventListener("keyup", (event) => {
    if (event.key === " ") pointer.spaceHeld = false;
    if (keyOf(event) === "h") holdBefore(app, false);
  });
  window.addEventListener("blur", () => {
    pointer.spaceHeld = false;
    holdBefore(app, false);
  });
  window.addEventListener("paste", (event) => {
    const file = [...(event.clipboardData?.files ?? [])].find((f) => f.type.startsWith("image/"));
    if (file) void openFile(app, file);
  });
  window.addEventListener("dragover", (event) => event.preventDefault());
  window.addEventListener("drop", (event) => {
    event.preventDefault();
    const file = event.dataTransfer?.files[0];
    if (file) void openFile(app, file);
  });
}

function holdBefore(app: App, on: boolean): void {
  if (app.holdingBefore === on) return;
  app.holdingBefore = on;
  app.requestFrame();
  app.notify();
}

/** Drawing without a pointer: arrows move the brush over the canvas, Enter touches or sets the corner of a lasso. */
function moveByKey(app: App, stage: Stage, pointer: PointerInput, key: string, fast: boolean): boolean {
  const { width, height } = stage.size;
  const by = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[key];
  const at = stage.cursor ?? { x: Math.floor(width / 2) + 0.5, y: Math.floor(height / 2) + 0.5 };
  if (by) {
    const step = fast ? 8 : 1;
    const inside = (value: number, size: number): number =>
      Math.max(0.5, Math.min(size - 0.5, Math.floor(value) + 0.5));
    stage.cursor = { x: inside(at.x + step * by[0]!, width), y: inside(at.y + step * by[1]!, height) };
    app.pointer = { x: Math.floor(stage.cursor.x), y: Math.floor(stage.cursor.y) };
    if (app.prefs.show === "covariance") app.requestFrame();
    stage.reveal();
    return true;
  }
  if (key !== "Enter" || pointer.busy) return false;
  const point = [at.x, at.y, app.prefs.diameter];
  if (pointer.picking) pointer.pick(at.x, at.y);
  else if (app.live) {
    const [x, y] = app.live.points.slice(-3);
    if (x === at.x && y === at.y) app.end(app.live.points.length >= 9);
    else app.grow(point);
  } else if (app.prefs.shape === "lasso") app.begin(app.newStroke(point));
  else app.addStroke(app.newStroke(point));
  stage.draw();
  return true;
}
