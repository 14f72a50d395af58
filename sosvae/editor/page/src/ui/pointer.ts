/** Mouse, pen and fingers on the canvas. */
import type { App } from "./app";
import type { Stage } from "./stage";

interface Finger {
  x: number;
  y: number;
}

export class PointerInput {
  spaceHeld = false;
  picking = false;
  private drawing: { id: number; second: boolean } | null = null;
  private panning: { id: number; x: number; y: number } | null = null;
  private readonly fingers = new Map<number, Finger>();
  private pinch: { distance: number; x: number; y: number } | null = null;
  private wheel = 0;

  constructor(
    private readonly app: App,
    private readonly stage: Stage,
  ) {
    const { canvas } = stage;
    canvas.addEventListener("pointerdown", (event) => this.down(event));
    canvas.addEventListener("pointermove", (event) => this.move(event));
    canvas.addEventListener("pointerup", (event) => this.up(event, true));
    canvas.addEventListener("pointercancel", (event) => this.up(event, false));
    canvas.addEventListener("blur", () => {
      if (!this.busy) app.end(false);
    });
    canvas.addEventListener("pointerleave", () => {
      stage.cursor = null;
      stage.draw();
    });
    canvas.addEventListener("wheel", (event) => this.onWheel(event), { passive: false });
    canvas.addEventListener("contextmenu", (event) => event.preventDefault());
  }

  private down(event: PointerEvent): void {
    const { app, stage } = this;
    if (!app.loaded) return;
    stage.canvas.dataset["by"] = "pointer"; // whoever points sees the cursor and needs no ring
    stage.canvas.setPointerCapture(event.pointerId);
    stage.canvas.focus({ preventScroll: true });
    if (event.pointerType === "touch") {
      this.fingers.set(event.pointerId, { x: event.clientX, y: event.clientY });
      if (this.fingers.size === 2) {
        // The first finger's stroke was the beginning of a pinch.
        if (this.drawing) app.end(app.live!.points.length > 60);
        this.drawing = null;
        this.pinch = this.pinched();
        return;
      }
    }
    if (event.button === 1 || this.spaceHeld) {
      event.preventDefault();
      this.panning = { id: event.pointerId, x: event.clientX, y: event.clientY };
      return;
    }
    if (event.button !== 0 || this.drawing || this.pinch) return;
    const place = stage.place(event.clientX, event.clientY);
    const shift = place.second ? stage.offset : 0;
    if (event.altKey || this.picking) {
      this.pick(place.x - shift, place.y);
      return;
    }
    if (app.prefs.show === "covariance") {
      this.hover(event);
      return;
    }
    app.end(false); // a lasso that was begun by keyboard
    this.drawing = { id: event.pointerId, second: place.second };
    app.begin(app.newStroke([place.x - shift, place.y, this.diameter(event)]));
  }

  /** Whether a stroke is under way by mouse, pen or finger. */
  get busy(): boolean {
    return this.drawing !== null;
  }

  /** Takes the colour that is shown at a pixel. */
  pick(x: number, y: number): void {
    const colour = this.stage.colourAt(x, y);
    if (colour) this.app.setPrefs({ colour });
    this.picking = false;
    this.app.notify();
  }

  private move(event: PointerEvent): void {
    const { app, stage } = this;
    if (this.fingers.has(event.pointerId)) this.fingers.set(event.pointerId, { x: event.clientX, y: event.clientY });
    if (this.pinch) {
      this.movePinch();
      return;
    }
    if (this.panning?.id === event.pointerId) {
      const ratio = window.devicePixelRatio || 1;
      stage.pan((event.clientX - this.panning.x) * ratio, (event.clientY - this.panning.y) * ratio);
      this.panning.x = event.clientX;
      this.panning.y = event.clientY;
      return;
    }
    this.hover(event);
    if (this.drawing?.id !== event.pointerId) return;
    const points: number[] = [];
    const steps = event.getCoalescedEvents?.() ?? [];
    for (const step of steps.length ? steps : [event]) {
      const place = stage.place(step.clientX, step.clientY);
      points.push(place.x - (this.drawing.second ? stage.offset : 0), place.y, this.diameter(step));
    }
    app.grow(points);
    if (!app.prefs.live || app.live?.shape === "lasso") stage.draw();
  }

  private hover(event: PointerEvent): void {
    const { app, stage } = this;
    const place = stage.place(event.clientX, event.clientY);
    const x = place.x - (place.second ? stage.offset : 0);
    stage.cursor = { x, y: place.y };
    app.pointer = { x: Math.floor(x), y: Math.floor(place.y) };
    if (app.prefs.show === "covariance") app.requestFrame();
    if (!this.drawing || !app.prefs.live) stage.draw(); // else the frame that is on its way brings the cursor along
  }

  private up(event: PointerEvent, keep: boolean): void {
    this.fingers.delete(event.pointerId);
    if (this.fingers.size < 2) this.pinch = null;
    if (this.panning?.id === event.pointerId) this.panning = null;
    if (this.drawing?.id !== event.pointerId) return;
    this.drawing = null;
    this.app.end(keep);
  }

  /** A pen presses from a fifth of the brush to all of it. */
  private diameter(event: PointerEvent): number {
    const { diameter } = this.app.prefs;
    const pressed = event.pointerType === "pen" && event.pressure > 0 ? 0.2 + 0.8 * event.pressure : 1;
    return Math.max(1, diameter * pressed);
  }

  private pinched(): { distance: number; x: number; y: number } {
    const [a, b] = [...this.fingers.values()] as [Finger, Finger];
    return { distance: Math.hypot(a.x - b.x, a.y - b.y), x: (a.x + b.x) / 2, y: (a.y + b.y) / 2 };
  }

  private movePinch(): void {
    const before = this.pinch!;
    const now = this.pinched();
    const ratio = window.devicePixelRatio || 1;
    const box = this.stage.canvas.getBoundingClientRect();
    this.stage.pan((now.x - before.x) * ratio, (now.y - before.y) * ratio);
    before.x = now.x;
    before.y = now.y;
    const factor = now.distance / before.distance;
    const wanted = this.stage.zoom * factor;
    if (Math.abs(wanted - this.stage.zoom) < (this.stage.zoom >= 1 ? 1 : 0.02)) return; // whole steps
    this.stage.zoomBy(factor, (now.x - box.left) * ratio, (now.y - box.top) * ratio);
    before.distance = now.distance;
  }

  private onWheel(event: WheelEvent): void {
    event.preventDefault();
    const ratio = window.devicePixelRatio || 1;
    const box = this.stage.canvas.getBoundingClientRect();
    // A mouse's notch is a step; a touchpad's many small ones add up to one.
    this.wheel += event.deltaMode === 0 ? event.deltaY : 40 * event.deltaY;
    if (Math.abs(this.wheel) < 30) return;
    const factor = this.wheel < 0 ? 1.2 : 1 / 1.2;
    this.wheel = 0;
    this.stage.zoomBy(factor, (event.clientX - box.left) * ratio, (event.clientY - box.top) * ratio);
  }
}
