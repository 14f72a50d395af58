/**
 * The posterior where the local part has a sparse precision, Σ = BBᵀ + (TTᵀ)⁻¹. What is pinned is continued by
 * `conditioned.ts`: with u_k the continuation of component k and u_δ that of b − μ,
 *
 *   S = BᵀGB,   h = BᵀG(b − μ),   mean μ + Bc + u_δ − Σ c_k u_k,   factor left B − u.
 */
import { Conditioned } from "./conditioned";
import type { Parameters } from "./parameters";
import type { Pins } from "./pins";
import { Posterior } from "./posterior";
import { normals } from "./random";
import { solveLower, solveUpper } from "./symmetric";

/** Up to so many products this page conditions while the pointer moves: some 50 ms. */
export const LIVE = 5e7;
/** And so many where there is nobody else to ask: a second. */
export const PATIENT = 1e9;
/** Samples that a variance is estimated from where it is not worked out: a standard error of 18 %. */
export const DRAWN = 64;

/** What depends on the pins and not on the components' scales: kept until a pin changes. */
class Field {
  readonly S: Float64Array;
  readonly h: Float64Array;
  readonly u: Float64Array[] = [];
  readonly uDelta: Float64Array | null = null;
  readonly delta: Float64Array | null = null;
  private readonly solver: Conditioned | null = null;
  private spread: Float64Array | null = null;
  private noise: { omega: Float32Array; values: Float64Array } | null = null;

  /** @param exact whether `p` is small enough for a factorisation; else pins are left out */
  constructor(
    readonly p: Parameters,
    pins: Pins,
    readonly version: number,
    readonly exact: boolean,
  ) {
    const { R, N, B } = p;
    this.S = new Float64Array(R * R);
    this.h = new Float64Array(R);
    if (!exact) return;
    this.solver = new Conditioned(p.stencil!, pins);
    if (pins.count() === 0) return;
    const solver = this.solver;
    const extended = (x: Float64Array | Float32Array): [Float64Array, Float64Array] => {
      const u = solver.extend(x);
      return [u, solver.energy(x, u)];
    };
    const dot = (x: Float64Array, y: Float64Array): number => {
      let sum = 0;
      for (let n = 0; n < x.length; n++) sum += x[n]! * y[n]!;
      return sum;
    };
    this.delta = Float64Array.from(pins.value, (value, n) => (pins.owner[n]! < 0 ? 0 : value - p.loc[n]!));
    const [uDelta, ofDelta] = extended(this.delta);
    this.uDelta = uDelta;
    const parts: Float64Array[] = [];
    for (let k = 0; k < R; k++) {
      const [u, part] = extended(B.subarray(k * N, (k + 1) * N));
      this.u.push(u);
      parts.push(part);
      this.h[k] = dot(part, ofDelta);
      for (let j = 0; j <= k; j++) this.S[k * R + j] = dot(part, parts[j]!);
    }
  }

  /** ‖·‖²_G of b − μ − Bc. */
  residual(c: Float64Array): number {
    if (!this.solver || !this.uDelta) return 0;
    const { N, B } = this.p;
    const x = Float64Array.from(this.delta!);
    const u = Float64Array.from(this.uDelta);
    this.u.forEach((uk, k) => {
      for (let n = 0; n < N; n++) {
        x[n] = x[n]! - c[k]! * B[k * N + n]!;
        u[n] = u[n]! - c[k]! * uk[n]!;
      }
    });
    return this.solver.energy(x, u).reduce((sum, part) => sum + part * part, 0);
  }

  /** A sample of the local part that pins leave. */
  sample(omega: Float32Array): Float64Array {
    if (this.noise?.omega === omega) return this.noise.values;
    const { stencil, N } = this.p;
    const values = this.solver?.colour(omega) ?? stencil!.colour(omega, new Float64Array(N));
    this.noise = { omega, values };
    return values;
  }

  /** diag (Λ + M)⁻¹, or an estimate of it. */
  variance(): Float64Array {
    if (this.spread) return this.spread;
    const { stencil, N } = this.p;
    if (this.solver) this.spread = this.solver.variance();
    else {
      this.spread = new Float64Array(N);
      const y = new Float64Array(N);
      for (let s = 0; s < DRAWN; s++) {
        stencil!.colour(normals(s, N), y);
        for (let n = 0; n < N; n++) this.spread[n] = this.spread[n]! + y[n]! ** 2 / DRAWN;
      }
    }
    return this.spread;
  }

  /** Row n of (Λ + M)⁻¹. */
  row(n: number): Float64Array {
    const { stencil, N } = this.p;
    const one = new Float64Array(N);
    one[n] = 1;
    return this.solver?.solve(one) ?? stencil!.colour(stencil!.uncolour(one, new Float64Array(N)), new Float64Array(N));
  }

  /** What is left of the factor: component k at value n. */
  left(k: number, n: number): number {
    return this.p.B[k * this.p.N + n]! - (this.uDelta ? this.u[k]![n]! : 0);
  }
}

const fields = new WeakMap<Pins, Field>();

function fieldOf(p: Parameters, pins: Pins, limit: number): Field {
  let field = fields.get(pins);
  if (field?.version !== pins.version || field.p !== p) {
    field = new Field(p, pins, pins.version, p.work <= limit);
    fields.set(pins, field);
  }
  return field;
}

export class SparsePosterior extends Posterior {
  private readonly field: Field;

  /** @param limit products that conditioning may take; where it takes more, pinned values are shown and nothing follows */
  constructor(p: Parameters, pins: Pins, a: Float32Array | Float64Array, limit: number) {
    const field = fieldOf(p, pins, limit);
    super(p, pins, a, field);
    this.field = field;
  }

  image(c: Float64Array, out: Float32Array, omegaD?: Float32Array, temperature = 1): Float32Array {
    const { p, pins, field } = this;
    p.apply(c, out);
    if (field.uDelta) {
      for (let n = 0; n < p.N; n++) out[n] = out[n]! + field.uDelta[n]!;
      field.u.forEach((u, k) => {
        const ck = c[k]!;
        if (ck) for (let n = 0; n < p.N; n++) out[n] = out[n]! - ck * u[n]!;
      });
    }
    if (omegaD && temperature) {
      const noise = field.sample(omegaD);
      for (let n = 0; n < p.N; n++) out[n] = out[n]! + temperature * noise[n]!;
    }
    if (pins.strokes.length > 0) {
      for (let n = 0; n < p.N; n++) {
        if (pins.owner[n]! >= 0 && (!field.exact || pins.softness(n) === 0)) out[n] = pins.value[n]!;
      }
    }
    return out;
  }

  protected deviationOfScale(out: Float32Array): Float32Array {
    const { p, a, L, field } = this;
    const { R } = p;
    const variance = field.variance();
    const scaled = new Float64Array(R);
    for (let n = 0; n < p.N; n++) {
      let sum = variance[n]!;
      for (let i = 0; i < R; i++) {
        let value = field.left(i, n) * a[i]!;
        for (let k = 0; k < i; k++) value -= L[i * R + k]! * scaled[k]!;
        scaled[i] = value / L[i * R + i]!;
        sum += scaled[i]! ** 2;
      }
      out[n] = Math.sqrt(Math.max(0, sum));
    }
    return out;
  }

  protected rowOfScale(index: number, out: Float32Array): Float32Array {
    const { p, a, L, field } = this;
    const row = Float64Array.from({ length: p.R }, (_, k) => field.left(k, index) * a[k]!);
    const c = solveUpper(L, solveLower(L, row, p.R), p.R).map((value, k) => value * a[k]!);
    const local = field.row(index);
    for (let n = 0; n < p.N; n++) {
      let sum = local[n]!;
      for (let k = 0; k < p.R; k++) sum += c[k]! * field.left(k, n);
      out[n] = sum;
    }
    return out;
  }

  protected residual(): number {
    return this.field.residual(this.coefficients());
  }
}
