/**
 * Pinned values and what the rest of the image has to know of them.
 *
 * Each stroke pins values n to bₙ with variance τ² (0: exactly) and keeps its own share of
 *
 *   S = Σ BₙBₙᵀ/(dₙ + τ²)    and    h = Σ Bₙ(bₙ − μₙ)/(dₙ + τ²)
 *
 * in float64 (where the local part is a diagonal; under a sparse precision see `conditioned.ts`). A value belongs to the last stroke that touched it, so a later stroke takes the value's share out of the
 * earlier one's sums. Nothing here depends on the scales a of the components, so a slider leaves the sums alone.
 */
import type { Parameters } from "./parameters";

/** What one stroke changed, so that it can be taken back. */
export interface PinStroke {
  /** Standard deviation τ that the stroke is meant with; `null` unpins. */
  tau: number | null;
  S: Float64Array;
  h: Float64Array;
  values: number[];
  /** Owner and value before, for each of `values`. */
  before: { owner: number; value: number }[];
}

export class Pins {
  readonly owner: Int32Array;
  readonly value: Float32Array;
  readonly strokes: PinStroke[] = [];
  /** Counts changes, for whoever keeps what was computed from the pins. */
  version = 0;
  private S: Float64Array;
  private h: Float64Array;
  private readonly row: Float64Array;

  constructor(readonly p: Parameters) {
    this.owner = new Int32Array(p.N).fill(-1);
    this.value = new Float32Array(p.N);
    this.S = new Float64Array(p.R * p.R);
    this.h = new Float64Array(p.R);
    this.row = new Float64Array(p.R);
  }

  /** S (lower triangle) and h of all strokes. */
  get sums(): { S: Float64Array; h: Float64Array } {
    return { S: this.S, h: this.h };
  }

  /** Starts a stroke; what `put` adds belongs to it until the next one. */
  begin(tau: number | null): PinStroke {
    const { R } = this.p;
    this.version++;
    const stroke = { tau, S: new Float64Array(R * R), h: new Float64Array(R), values: [], before: [] };
    this.strokes.push(stroke);
    return stroke;
  }

  /** Pins value n to b under the current stroke, or unpins it where that stroke erases. */
  put(n: number, b: number): void {
    const current = this.strokes.length - 1;
    const stroke = this.strokes[current]!;
    const owner = this.owner[n]!;
    if (owner === current || (stroke.tau === null && owner < 0)) return;
    this.version++;
    stroke.values.push(n);
    stroke.before.push({ owner, value: this.value[n]! });
    if (owner >= 0) this.share(owner, n, -1, true);
    if (stroke.tau === null) {
      this.owner[n] = -1;
    } else {
      this.owner[n] = current;
      this.value[n] = b;
      this.share(current, n, 1, true);
    }
  }

  /** Takes the last stroke back, whole. */
  pop(): void {
    const stroke = this.strokes.pop();
    if (!stroke) return;
    this.version++;
    for (let i = stroke.values.length - 1; i >= 0; i--) {
      const n = stroke.values[i]!;
      const { owner, value } = stroke.before[i]!;
      this.owner[n] = owner;
      this.value[n] = value;
      if (owner >= 0) this.share(owner, n, 1, false);
    }
    this.total();
  }

  /** Changes how firmly a stroke is meant. */
  setTau(index: number, tau: number): void {
    const stroke = this.strokes[index]!;
    if (stroke.tau === tau || stroke.tau === null) return;
    stroke.tau = tau;
    this.version++;
    stroke.S.fill(0);
    stroke.h.fill(0);
    for (let n = 0; n < this.p.N; n++) if (this.owner[n] === index) this.share(index, n, 1, false);
    this.total();
  }

  /** How many values are pinned. */
  count(): number {
    let count = 0;
    for (let n = 0; n < this.owner.length; n++) if (this.owner[n]! >= 0) count++;
    return count;
  }

  /** τ² of a pinned value. */
  softness(n: number): number {
    return this.strokes[this.owner[n]!]!.tau! ** 2;
  }

  private share(index: number, n: number, sign: number, intoTotal: boolean): void {
    const { p, row } = this;
    if (p.stencil) return; // neighbours' noise goes together: there are no sums over single values
    const stroke = this.strokes[index]!;
    const weight = sign / (p.variance(n) + stroke.tau! ** 2);
    p.row(n, row);
    addOuter(stroke.S, stroke.h, row, weight, this.value[n]! - p.loc[n]!);
    if (intoTotal) addOuter(this.S, this.h, row, weight, this.value[n]! - p.loc[n]!);
  }

  /** The total from the strokes' sums: nothing that was taken back leaves rounding behind. */
  private total(): void {
    this.S.fill(0);
    this.h.fill(0);
    for (const stroke of this.strokes) {
      for (let i = 0; i < this.S.length; i++) this.S[i] = this.S[i]! + stroke.S[i]!;
      for (let i = 0; i < this.h.length; i++) this.h[i] = this.h[i]! + stroke.h[i]!;
    }
  }
}

function addOuter(S: Float64Array, h: Float64Array, row: Float64Array, weight: number, delta: number): void {
  const R = row.length;
  for (let i = 0; i < R; i++) {
    const u = weight * row[i]!;
    h[i] = h[i]! + u * delta;
    for (let j = 0; j <= i; j++) S[i * R + j] = S[i * R + j]! + u * row[j]!;
  }
}
