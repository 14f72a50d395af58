/**
 * The picture on its canvas: zoom, pan, outlines.
 *
 * `zoom` is device pixels for a pixel of the image: a whole number from 1 on, so that pixels of tiny images are sharp
 * squares. Two pictures stand side by side where runs are compared, a gap of `GAP` apart.
 */
import type { Picture } from "../engine/engine";
import type { App } from "./app";
import { el } from "./dom";
import { outlineOf } from "./outline";

const GAP = 0.08; // of the width

export class Stage {
  readonly canvas: HTMLCanvasElement;
  readonly element: HTMLElement;
  zoom = 1;
  /** Where the image's corner is, in device pixels. */
  left = 0;
  top = 0;
  cursor: { x: number; y: number } | null = null;
  private readonly context: CanvasRenderingContext2D;
  private readonly buffers = { main: document.createElement("canvas"), other: document.createElement("canvas") };
  private outline: Path2D | null = null;
  private fitted = "";
  private drawing = 0;
  private readonly caption = el("div", { class: "captions", "aria-hidden": "true" });

  constructor(private readonly app: App) {
    this.canvas = el("canvas", { id: "canvas", tabindex: 0, role: "application" });
    this.canvas.setAttribute("aria-roledescription", "drawing area");
    this.element = el("div", { class: "stage" }, this.canvas, this.caption);
    this.context = this.canvas.getContext("2d")!;
    new ResizeObserver(() => this.resize()).observe(this.element);
    app.onFrame(() => this.take());
    app.listen(() => this.draw());
  }

  get size(): { width: number; height: number } {
    const { loaded, frame } = this.app;
    const [, height, width] = loaded?.shape ?? [1, frame?.main.height ?? 1, frame?.main.width ?? 1];
    return { width, height };
  }

  /** Where the second picture begins, in pixels of the image. */
  get offset(): number {
    const { width } = this.size;
    return width + Math.max(1, Math.round(GAP * width));
  }

  private resize(): void {
    const ratio = window.devicePixelRatio || 1;
    const { clientWidth, clientHeight } = this.element;
    const width = Math.max(1, Math.round(clientWidth * ratio));
    const height = Math.max(1, Math.round(clientHeight * ratio));
    if (this.canvas.width === width && this.canvas.height === height) return;
    this.canvas.width = width;
    this.canvas.height = height;
    this.fit();
  }

  /** Everything in view, as large as whole pixels allow. */
  fit(): void {
    const { width, height } = this.size;
    const ratio = window.devicePixelRatio || 1;
    const across = this.app.loadedOther ? this.offset + width : width;
    const free = this.free();
    const exact = Math.min((free.width * ratio) / across, (free.height * ratio) / height);
    this.zoom = exact >= 1 ? Math.floor(exact) : Math.max(exact, 0.05);
    this.left = Math.round(free.left * ratio + (free.width * ratio - across * this.zoom) / 2);
    this.top = Math.round(free.top * ratio + (free.height * ratio - height * this.zoom) / 2);
    this.draw();
  }

  /** What the islands leave of the stage (CSS pixels). */
  private free(): { left: number; top: number; width: number; height: number } {
    const { clientWidth, clientHeight } = this.element;
    const box = (name: string): { width: number; height: number } =>
      this.element.querySelector(`.${name}`)?.getBoundingClientRect() ?? { width: 0, height: 0 };
    const wide = window.innerWidth > 820;
    const left = wide ? box("options").width + 32 : 12;
    const top = box("tools").height + (wide ? 32 : 20);
    const right = wide ? 20 : 12;
    const bottom = box("view").height + (wide ? 32 : box("options").height + 26);
    const caption = this.app.loadedOther ? 20 : 0;
    return {
      left,
      top,
      width: Math.max(40, clientWidth - left - right),
      height: Math.max(40, clientHeight - top - bottom - caption),
    };
  }

  /** Zooms by whole steps about a place of the canvas (device pixels). */
  zoomBy(factor: number, x = this.canvas.width / 2, y = this.canvas.height / 2): void {
    let zoom = this.zoom * factor;
    if (zoom >= 1) zoom = factor > 1 ? Math.max(Math.ceil(zoom - 1e-9), Math.floor(this.zoom) + 1) : Math.floor(zoom);
    zoom = Math.max(0.1, Math.min(128, zoom));
    this.left = Math.round(x - ((x - this.left) * zoom) / this.zoom);
    this.top = Math.round(y - ((y - this.top) * zoom) / this.zoom);
    this.zoom = zoom;
    this.draw();
  }

  /** Moves the view where the cursor has left it. */
  reveal(): void {
    if (!this.cursor) return;
    const margin = 2 * this.zoom;
    const [x, y] = [this.left + this.cursor.x * this.zoom, this.top + this.cursor.y * this.zoom];
    const by = (place: number, size: number): number =>
      Math.max(0, margin - place) - Math.max(0, place - (size - margin));
    this.pan(by(x, this.canvas.width), by(y, this.canvas.height));
  }

  pan(dx: number, dy: number): void {
    this.left += Math.round(dx);
    this.top += Math.round(dy);
    this.draw();
  }

  /** A place of the window as one of the image; `second` where it is in, or nearer to, the second picture. */
  place(clientX: number, clientY: number): { x: number; y: number; second: boolean } {
    const box = this.canvas.getBoundingClientRect();
    const ratio = this.canvas.width / box.width;
    const x = ((clientX - box.left) * ratio - this.left) / this.zoom;
    const y = ((clientY - box.top) * ratio - this.top) / this.zoom;
    return { x, y, second: !!this.app.loadedOther && x > (this.size.width + this.offset) / 2 };
  }

  private take(): void {
    const { frame } = this.app;
    if (!frame) return;
    fill(this.buffers.main, frame.main);
    if (frame.other) fill(this.buffers.other, frame.other);
    this.outline =
      this.app.prefs.mask && frame.pinned > 0 ? outlineOf(frame.mask, frame.main.width, frame.main.height) : null;
    const shape = `${frame.main.width}x${frame.main.height}${frame.other ? "+" : ""}`;
    if (shape !== this.fitted) {
      this.fitted = shape;
      this.fit();
    }
    this.paint(); // at once: it was waited for
  }

  draw(): void {
    if (!this.drawing) this.drawing = requestAnimationFrame(() => this.paint());
  }

  private paint(): void {
    cancelAnimationFrame(this.drawing);
    this.drawing = 0;
    const { context, canvas, app } = this;
    context.setTransform(1, 0, 0, 1, 0, 0);
    context.clearRect(0, 0, canvas.width, canvas.height);
    const { frame } = app;
    if (!frame) return;
    const { width, height } = frame.main;
    const places = frame.other ? [0, this.offset] : [0];
    context.imageSmoothingEnabled = this.zoom < 1;
    places.forEach((at, i) => {
      const buffer = i ? this.buffers.other : this.buffers.main;
      const left = this.left + at * this.zoom;
      context.drawImage(buffer, left, this.top, width * this.zoom, height * this.zoom);
      context.strokeStyle = "rgb(128 128 140 / 45%)"; // where the image ends, on either theme
      context.lineWidth = 1;
      context.strokeRect(left - 0.5, this.top - 0.5, width * this.zoom + 1, height * this.zoom + 1);
    });
    for (const at of places) {
      context.setTransform(this.zoom, 0, 0, this.zoom, this.left + at * this.zoom, this.top);
      if (app.prefs.mask && !app.holdingBefore && this.outline) this.trace(this.outline, true);
      this.overlay();
    }
    context.setTransform(1, 0, 0, 1, 0, 0);
    this.captions(places);
  }

  /** A line that shows on dark and on light: black under dashes of white. */
  private trace(path: Path2D, dashed: boolean): void {
    const { context } = this;
    const line = Math.max(1, Math.round(window.devicePixelRatio || 1)) / this.zoom;
    context.lineWidth = line * 1.5;
    context.setLineDash([]);
    context.strokeStyle = "rgba(0,0,0,.85)";
    context.stroke(path);
    context.strokeStyle = "#fff";
    if (dashed) context.setLineDash([4 * line, 4 * line]);
    else context.lineWidth = line * 0.75;
    context.stroke(path);
    context.setLineDash([]);
  }

  private overlay(): void {
    const { app, cursor } = this;
    const { live, prefs } = app;
    if (live && (live.shape === "lasso" || !prefs.live)) {
      const path = new Path2D();
      for (let i = 0; i < live.points.length; i += 3) path.lineTo(live.points[i]!, live.points[i + 1]!);
      if (live.shape === "lasso" && cursor) path.lineTo(cursor.x, cursor.y);
      this.trace(path, live.shape === "lasso");
    }
    if (!cursor) return;
    const path = new Path2D();
    if (prefs.show === "covariance") {
      path.rect(Math.floor(cursor.x), Math.floor(cursor.y), 1, 1);
    } else if (prefs.shape === "brush" ? prefs.diameter < 1.5 : this.canvas.dataset["by"] !== "pointer") {
      path.rect(Math.floor(cursor.x), Math.floor(cursor.y), 1, 1);
    } else if (prefs.shape === "brush") {
      path.arc(cursor.x, cursor.y, prefs.diameter / 2, 0, 2 * Math.PI);
    } else return;
    this.trace(path, false);
  }

  private captions(places: number[]): void {
    const { app } = this;
    const ratio = window.devicePixelRatio || 1;
    const names = places.length > 1 ? [app.doc.run, app.doc.compare ?? ""] : [];
    while (this.caption.children.length < names.length) this.caption.append(el("span"));
    while (this.caption.children.length > names.length) this.caption.lastChild!.remove();
    names.forEach((name, i) => {
      const span = this.caption.children[i] as HTMLElement;
      span.textContent = name;
      const left = (this.left + (places[i]! + this.size.width / 2) * this.zoom) / ratio;
      span.style.left = `${left}px`;
      span.style.top = `${(this.top + this.size.height * this.zoom) / ratio + 8}px`;
    });
  }

  /** What is shown at a pixel, each channel from 0 to 1. */
  colourAt(x: number, y: number): number[] | null {
    const picture: Picture | undefined = this.app.frame?.main;
    if (!picture || x < 0 || y < 0 || x >= picture.width || y >= picture.height) return null;
    const o = 4 * (Math.floor(y) * picture.width + Math.floor(x));
    return [0, 1, 2].map((c) => picture.rgba[o + c]! / 255);
  }
}

function fill(canvas: HTMLCanvasElement, picture: Picture): void {
  if (canvas.width !== picture.width) canvas.width = picture.width;
  if (canvas.height !== picture.height) canvas.height = picture.height;
  canvas.getContext("2d")!.putImageData(new ImageData(picture.rgba, picture.width, picture.height), 0, 0);
}
