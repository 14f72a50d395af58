/** One model at one code, with the strokes on it. Two of them stand side by side when runs are compared. */
import type { Parameters, Where } from "../maths/parameters";
import { Pins } from "../maths/pins";
import type { Posterior } from "../maths/posterior";
import { posteriorOf } from "../maths/posteriors";
import { normals } from "../maths/random";
import type { Stroke, View } from "../types";
import { brush, mirrored, polygon } from "./raster";

/** What a stroke pinned, so that undo and redo need not work it out again. */
interface Drawn {
  values: number[];
  b: number[];
  /** Numbers of `stroke.points` that are in it. */
  points: number;
  base?: Float32Array;
}

export class Slot {
  pins: Pins;
  /** No pins: the model itself. */
  unpinned: Pins;
  /** An image that the server worked out where the page does not. Under strokes made since it is the latest there is. */
  override: Float32Array | null = null;
  private applied: number[] = [];
  private readonly drawn = new Map<number, Drawn>();
  private readonly noise = new Map<string, Float32Array>();

  /** @param limit products that conditioning may take here */
  constructor(
    public p: Parameters,
    public limit: number,
  ) {
    this.pins = new Pins(p);
    this.unpinned = new Pins(p);
  }

  /** Who works out what pinned values leave of the rest. */
  get conditions(): Where {
    return this.p.where === "server" || (this.p.stencil !== null && this.p.work > this.limit) ? "server" : "page";
  }

  /** Another code: strokes are applied to it anew. */
  replace(p: Parameters, limit: number): void {
    if (p.N !== this.p.N || p.channels !== this.p.channels) this.drawn.clear();
    this.p = p;
    this.limit = limit;
    this.pins = new Pins(p);
    this.unpinned = new Pins(p);
    this.applied = [];
    this.override = null;
    this.noise.clear();
  }

  /** Brings the pins to the strokes of `order`: takes back what is not in it, applies what is new. */
  sync(order: Stroke[]): void {
    let same = 0;
    while (same < order.length && same < this.applied.length && this.applied[same] === order[same]!.id) same++;
    if (same < this.applied.length) this.override = null;
    while (this.applied.length > same) {
      this.pins.pop();
      this.applied.pop();
    }
    for (let i = 0; i < same; i++) if (order[i]!.tool !== "erase") this.pins.setTau(i, order[i]!.tau);
    if (same > 0) this.extend(order[same - 1]!);
    for (const stroke of order.slice(same)) this.apply(stroke);
  }

  /** The last stroke has grown. */
  private extend(stroke: Stroke): void {
    const drawn = this.drawn.get(stroke.id);
    if (!drawn || stroke.points.length <= drawn.points) return;
    this.draw(stroke, drawn);
  }

  private apply(stroke: Stroke): void {
    let drawn = this.drawn.get(stroke.id);
    if (!drawn) {
      drawn = { values: [], b: [], points: 0 };
      if (stroke.tool === "pin" || stroke.tool === "recolour") {
        drawn.base = this.image(stroke.view!, new Float32Array(this.p.N)).map((v) => Math.max(0, Math.min(1, v)));
      }
      this.drawn.set(stroke.id, drawn);
    }
    this.applied.push(stroke.id);
    this.pins.begin(stroke.tool === "erase" ? null : stroke.tau);
    for (let i = 0; i < drawn.values.length; i++) this.pins.put(drawn.values[i]!, drawn.b[i]!);
    if (drawn.points < stroke.points.length || stroke.shape === "all") this.draw(stroke, drawn);
  }

  private draw(stroke: Stroke, drawn: Drawn): void {
    const { width, height, channels } = this.p;
    const plane = width * height;
    const put = (n: number, b: number): void => {
      drawn.values.push(n);
      drawn.b.push(b);
      this.pins.put(n, b);
    };
    const shift = drawn.base && stroke.tool === "recolour" ? this.shift(stroke, drawn.base) : null;
    const touch = (x: number, y: number): void => {
      for (let c = 0; c < channels; c++) {
        if (!((stroke.channels >> c) & 1)) continue;
        const n = c * plane + y * width + x;
        if (shift) put(n, Math.max(0, Math.min(1, drawn.base![n]! + shift[c]!)));
        else put(n, drawn.base ? drawn.base[n]! : stroke.colour[c]!);
      }
    };
    if (stroke.shape === "all") {
      if (drawn.points === 0) for (let i = 0; i < plane; i++) touch(i % width, Math.floor(i / width));
      drawn.points = Infinity;
      return;
    }
    for (const points of mirrored(stroke.points, stroke.mirror, width, height)) {
      if (stroke.shape === "lasso") {
        if (points.length >= 9) polygon(points, width, height, touch);
        continue;
      }
      for (let i = Math.max(0, drawn.points - 3); i < points.length; i += 3) {
        const [x0, y0, d0] = [points[i]!, points[i + 1]!, points[i + 2]!];
        const last = i + 3 >= points.length;
        if (last && i > 0) break;
        const [x1, y1, d1] = last ? [x0, y0, d0] : [points[i + 3]!, points[i + 4]!, points[i + 5]!];
        brush(x0, y0, d0, x1, y1, d1, width, height, touch);
      }
    }
    drawn.points = stroke.points.length;
  }

  /** What recolouring adds to each channel: the pixel that the stroke begins at takes the colour. */
  private shift(stroke: Stroke, base: Float32Array): number[] {
    const { width, height } = this.p;
    const x = Math.max(0, Math.min(width - 1, Math.floor(stroke.points[0]!)));
    const y = Math.max(0, Math.min(height - 1, Math.floor(stroke.points[1]!)));
    return stroke.colour.map((value, c) => value - base[c * width * height + y * width + x]!);
  }

  scales(view: View): Float64Array {
    const a = new Float64Array(this.p.R).fill(1);
    view.scales?.forEach((value, k) => {
      if (k < a.length) a[k] = value;
    });
    return a;
  }

  posterior(view: View, pins = this.pins): Posterior {
    return posteriorOf(this.p, pins, this.scales(view), this.limit);
  }

  /** ω_d and ω of a seed; kept, because they are asked for at every frame. */
  normals(seed: number, count: number): Float32Array {
    const key = `${seed} ${count}`;
    let values = this.noise.get(key);
    if (!values) {
      if (this.noise.size > 16) this.noise.clear();
      values = normals(seed, count);
      this.noise.set(key, values);
    }
    return values;
  }

  /** What `view` shows, unclipped; with `pins` other than the strokes' where given. */
  image(view: View, out: Float32Array, epsilon?: ArrayLike<number>, pins = this.pins): Float32Array {
    if (this.override && pins === this.pins) {
      out.set(this.override);
      for (let n = 0; n < out.length; n++) {
        if (pins.owner[n]! >= 0 && pins.softness(n) === 0) out[n] = pins.value[n]!;
      }
      return out;
    }
    const posterior = this.posterior(view, pins);
    // Of a distribution without formulas here only the mean is known, until the server has answered.
    if ((view.mode === "mean" && !epsilon) || this.p.where === "server")
      return posterior.image(posterior.coefficients(), out);
    const width = posterior.width(epsilon ? undefined : view.seed);
    const c = posterior.coefficients(epsilon ?? this.normals(view.seed, this.p.R), width * view.globalTemperature);
    const local = view.localTemperature > 0 ? this.normals(view.localSeed + 7919, this.p.N) : undefined;
    return posterior.image(c, out, local, width * view.localTemperature);
  }
}
