/**
 * What the decoder said for one code, in the factor's principal basis:
 *
 *   y = μ + B(a ∘ ω) + √d ∘ ω_d,   B = PV,  PᵀP = V diag(s²) Vᵀ
 *
 * An image is flattened channel by channel, row by row: value n = (channel · H + y) · W + x. B lies component by
 * component, [R, N].
 */
import { readContainer } from "./container";
import { Stencil } from "./stencil";

export type Where = "page" | "server";

export class Parameters {
  readonly N: number;

  constructor(
    readonly channels: number,
    readonly height: number,
    readonly width: number,
    readonly loc: Float32Array,
    readonly B: Float32Array,
    readonly R: number,
    /** Variances of the local part, one for each value or one for all. */
    readonly d: Float32Array,
    readonly header: Record<string, unknown> = {},
    /** Bytes of the image that the code comes from, where there is one, [C, H, W]. */
    readonly original?: Uint8Array,
    /** A local part (TTᵀ)⁻¹ in place of the diagonal d. */
    readonly stencil: Stencil | null = null,
    /** Degrees of freedom of Student's t, of whose scale matrix the rest is; a normal has infinitely many. */
    readonly df = Infinity,
  ) {
    this.N = channels * height * width;
  }

  static read(buffer: ArrayBuffer): Parameters {
    const { header, arrays, shapes } = readContainer(buffer);
    const [channels, height, width] = header["shape"] as [number, number, number];
    const N = channels * height * width;
    const loc = arrays.get("loc") as Float32Array;
    const B = (arrays.get("factor") as Float32Array | undefined) ?? new Float32Array(0);
    const scale = arrays.get("scale") as Float32Array | undefined;
    const R = shapes.get("factor")?.[0] ?? 0;
    if (scale) {
      for (let k = 0; k < R; k++) {
        for (let n = k * N; n < (k + 1) * N; n++) B[n] = B[n]! * scale[k]!;
      }
    }
    const original = arrays.get("original") as Uint8Array | undefined;
    // Without one the page has no formulas: values are shown as if independent until the server has answered.
    const d = (arrays.get("d") as Float32Array | undefined) ?? new Float32Array([1]);
    const t = arrays.get("t") as Float32Array | undefined;
    const stencil =
      t &&
      new Stencil(channels, height, width, {
        offsets: header["offsets"] as [number, number][],
        t,
        s: arrays.get("s") as Float32Array,
        ties: arrays.get("ties") as Float32Array | undefined,
      });
    return new Parameters(
      channels,
      height,
      width,
      loc,
      B,
      R,
      d,
      header,
      original,
      stencil ?? null,
      (header["df"] as number | undefined) ?? Infinity,
    );
  }

  /** "server" where the local part is of a kind that this page has no formulas for. */
  get where(): Where {
    return this.header["where"] === "server" ? "server" : "page";
  }

  /** Products that conditioning takes anew for each set of pinned values. */
  get work(): number {
    if (!this.stencil) return this.N * this.R;
    const b = Math.min(this.N, this.stencil.reach);
    return this.N * b * (b / 2 + 2 * (this.R + 1));
  }

  /** dₙ of a diagonal local part. */
  variance(n: number): number {
    return this.d.length === 1 ? this.d[0]! : this.d[n]!;
  }

  /** out = μ + Bc: a handful of components at a time, so that `out` is read and written R/5 times. */
  apply(c: ArrayLike<number>, out: Float32Array): Float32Array {
    const { B, N, R } = this;
    out.set(this.loc);
    let k = 0;
    for (; k + 5 <= R; k += 5) {
      const c0 = c[k]!,
        c1 = c[k + 1]!,
        c2 = c[k + 2]!,
        c3 = c[k + 3]!,
        c4 = c[k + 4]!;
      if (!(c0 || c1 || c2 || c3 || c4)) continue;
      const o0 = k * N,
        o1 = o0 + N,
        o2 = o1 + N,
        o3 = o2 + N,
        o4 = o3 + N;
      for (let n = 0; n < N; n++) {
        out[n] = out[n]! + c0 * B[o0 + n]! + c1 * B[o1 + n]! + c2 * B[o2 + n]! + c3 * B[o3 + n]! + c4 * B[o4 + n]!;
      }
    }
    for (; k < R; k++) {
      const ck = c[k]!,
        o = k * N;
      if (ck) for (let n = 0; n < N; n++) out[n] = out[n]! + ck * B[o + n]!;
    }
    return out;
  }

  /** Row n of B into `row`. */
  row(n: number, row: Float64Array): Float64Array {
    for (let k = 0; k < this.R; k++) row[k] = this.B[k * this.N + n]!;
    return row;
  }

  /** (μ + Bc)ₙ of one value, in float64. */
  at(n: number, c: ArrayLike<number>): number {
    let sum = this.loc[n]!;
    for (let k = 0; k < this.R; k++) sum += this.B[k * this.N + n]! * c[k]!;
    return sum;
  }

  /** Variance that each component adds, summed over all values: s², descending. */
  componentVariances(): Float64Array {
    const variances = new Float64Array(this.R);
    for (let k = 0; k < this.R; k++) {
      let sum = 0;
      for (let n = k * this.N; n < (k + 1) * this.N; n++) sum += this.B[n]! ** 2;
      variances[k] = sum;
    }
    return variances;
  }
}
