/** Everything that takes arithmetic, behind messages: in a worker, or in the page where there is none. */
import { logDensity } from "../maths/density";
import { Parameters } from "../maths/parameters";
import type { Show, Stroke, View } from "../types";
import { heatOf, pictureOf } from "./colours";
import { Slot } from "./slot";

export type SlotName = "main" | "other";

export type Request =
  | { type: "load"; slot: SlotName; buffer: ArrayBuffer; limit: number }
  | { type: "drop"; slot: SlotName }
  | {
      type: "frame";
      view: View;
      order: { id: number; tau: number }[];
      fresh: Stroke[];
      grown: Grown[];
      show: Show;
      at: number;
    }
  | {
      type: "thumbnail";
      slot: SlotName;
      view: View;
      epsilon?: number[];
      component?: number;
      pinned: boolean;
      show: Show;
    }
  | { type: "stats"; view: View }
  | { type: "pinned"; slot: SlotName }
  | { type: "override"; slot: SlotName; buffer: ArrayBuffer | null };

export interface Grown {
  id: number;
  points: number[];
}

export interface Picture {
  width: number;
  height: number;
  rgba: Uint8ClampedArray<ArrayBuffer>;
  /** What the brightest colour stands for, where colours stand for numbers. */
  top?: number;
}

export interface Frame {
  main: Picture;
  other?: Picture;
  /** For each pixel, bit c is set where channel c is pinned. */
  mask: Uint8Array<ArrayBuffer>;
  pinned: number;
  milliseconds: number;
}

export interface Loaded {
  header: Record<string, unknown>;
  shape: [number, number, number];
  R: number;
  variances: number[];
  /** Who has formulas for this distribution, and who works out what pinned values leave of the rest. */
  where: "page" | "server";
  conditions: "page" | "server";
  /** Deviations are estimated from samples, of the model without the pins. */
  estimated: boolean;
  /** Root mean square between the image behind the code and the mean, in intensity. */
  lost?: number;
}

/** What is pinned to which value, and how firmly (τ²). */
export interface Pinned {
  indices: number[];
  values: number[];
  variances: number[];
}

export interface Stats {
  logDensity: number;
  perValue: number;
  /** δᵀΣ⁻¹δ of what is pinned; null where the page does not work it out. */
  surprise: number | null;
  count: number;
  /** Root mean square over the image; given the pins, and null where the page does not work it out. */
  deviation: number | null;
  deviationBefore: number;
}

export class Engine {
  private readonly slots = new Map<SlotName, Slot>();
  private readonly strokes = new Map<number, Stroke>();
  private order: Stroke[] = [];
  private scratch = new Float32Array(0);

  handle(request: Request): unknown {
    switch (request.type) {
      case "load":
        return this.load(request.slot, request.buffer, request.limit);
      case "drop":
        this.slots.delete(request.slot);
        return null;
      case "frame":
        return this.frame(request);
      case "thumbnail":
        return this.thumbnail(request);
      case "stats":
        return this.stats(request.view);
      case "pinned":
        return this.pinned(request.slot);
      case "override":
        this.slot(request.slot).override = request.buffer && Parameters.read(request.buffer).loc;
        return null;
    }
  }

  private slot(name: SlotName): Slot {
    const slot = this.slots.get(name);
    if (!slot) throw new Error("no code has been loaded");
    return slot;
  }

  private load(name: SlotName, buffer: ArrayBuffer, limit: number): Loaded {
    const p = Parameters.read(buffer);
    const slot = this.slots.get(name);
    if (slot) slot.replace(p, limit);
    else this.slots.set(name, new Slot(p, limit));
    this.slot(name).sync(this.order);
    let lost: number | undefined;
    if (p.original) {
      let sum = 0;
      for (let n = 0; n < p.N; n++) sum += (p.original[n]! / 255 - p.loc[n]!) ** 2;
      lost = Math.sqrt(sum / p.N);
    }
    return {
      header: p.header,
      shape: [p.channels, p.height, p.width],
      R: p.R,
      variances: Array.from(p.componentVariances()),
      where: p.where,
      conditions: this.slot(name).conditions,
      estimated: p.stencil !== null && this.slot(name).conditions === "server",
      ...(lost === undefined ? {} : { lost }),
    };
  }

  private frame(request: Extract<Request, { type: "frame" }>): Frame {
    const start = performance.now();
    for (const stroke of request.fresh) this.strokes.set(stroke.id, stroke);
    for (const { id, points } of request.grown) for (const value of points) this.strokes.get(id)!.points.push(value);
    this.order = request.order.map(({ id, tau }) => {
      const stroke = this.strokes.get(id)!;
      stroke.tau = tau;
      return stroke;
    });
    for (const slot of this.slots.values()) slot.sync(this.order);
    const main = this.slot("main");
    const other = this.slots.get("other");
    const frame: Frame = {
      main: this.picture(main, request.view, request.show, request.at),
      mask: maskOf(main),
      pinned: main.pins.count(),
      milliseconds: 0,
    };
    if (other) frame.other = this.picture(other, request.view, request.show, request.at);
    frame.milliseconds = performance.now() - start;
    return frame;
  }

  private picture(slot: Slot, view: View, show: Show, at: number): Picture {
    const { p } = slot;
    const rgba = new Uint8ClampedArray(4 * p.width * p.height);
    if (this.scratch.length !== p.N) this.scratch = new Float32Array(p.N);
    const picture: Picture = { width: p.width, height: p.height, rgba };
    if (p.where === "page" && show === "deviation") {
      picture.top = heatOf(slot.posterior(view).standardDeviation(this.scratch), p.channels, rgba, false);
    } else if (p.where === "page" && show === "covariance") {
      const index = Math.max(0, Math.min(p.N - 1, at));
      picture.top = heatOf(slot.posterior(view).covarianceRow(index, this.scratch), p.channels, rgba, true);
    } else if (show === "original" && p.original) {
      pictureOf(
        Float32Array.from(p.original, (byte) => byte / 255),
        p.channels,
        rgba,
      );
    } else {
      const shown: View = show === "mean" ? { ...view, mode: "mean" } : view;
      const pins = show === "before" ? slot.unpinned : slot.pins;
      pictureOf(slot.image(shown, this.scratch, undefined, pins), p.channels, rgba);
    }
    return picture;
  }

  private thumbnail(request: Extract<Request, { type: "thumbnail" }>): Picture {
    const slot = this.slot(request.slot);
    const { p } = slot;
    const rgba = new Uint8ClampedArray(4 * p.width * p.height);
    const picture: Picture = { width: p.width, height: p.height, rgba };
    if (request.component !== undefined) {
      // What the component does: the mean and two standard deviations along it.
      const c = new Float64Array(p.R);
      c[request.component] = 2;
      pictureOf(p.apply(c, new Float32Array(p.N)), p.channels, rgba);
      return picture;
    }
    if (request.show !== "image") return this.picture(slot, request.view, request.show, 0);
    const pins = request.pinned ? slot.pins : slot.unpinned;
    pictureOf(slot.image(request.view, new Float32Array(p.N), request.epsilon, pins), p.channels, rgba);
    return picture;
  }

  private stats(view: View): Stats | null {
    const slot = this.slot("main");
    const { p } = slot;
    if (p.where === "server") return null;
    const x = slot.image(view, new Float32Array(p.N));
    const posterior = slot.posterior(view);
    const mean = (values: Float32Array): number => Math.sqrt(values.reduce((sum, s) => sum + s * s, 0) / p.N);
    const density = logDensity(p, x, slot.scales(view));
    const { mahalanobis, count } = posterior.surprise();
    const known = slot.conditions === "page" || count === 0;
    return {
      logDensity: density,
      perValue: density / p.N,
      surprise: known ? mahalanobis : null,
      count,
      deviation: known ? mean(posterior.standardDeviation(new Float32Array(p.N))) : null,
      deviationBefore: mean(slot.posterior(view, slot.unpinned).standardDeviation(new Float32Array(p.N))),
    };
  }

  private pinned(name: SlotName): Pinned {
    const { pins, p } = this.slot(name);
    const indices: number[] = [];
    for (let n = 0; n < p.N; n++) if (pins.owner[n]! >= 0) indices.push(n);
    return {
      indices,
      values: indices.map((n) => pins.value[n]!),
      variances: indices.map((n) => pins.softness(n)),
    };
  }
}

function maskOf(slot: Slot): Uint8Array<ArrayBuffer> {
  const { p, pins } = slot;
  const plane = p.width * p.height;
  const mask = new Uint8Array(plane);
  if (pins.strokes.length === 0) return mask;
  for (let c = 0; c < p.channels; c++) {
    const o = c * plane;
    for (let i = 0; i < plane; i++) if (pins.owner[o + i]! >= 0) mask[i] = mask[i]! | (1 << c);
  }
  return mask;
}
