/** The posterior where the local part is a diagonal: noise of each value for itself. */
import type { Parameters } from "./parameters";
import type { Pins } from "./pins";
import { Posterior } from "./posterior";
import { solveLower, solveUpper } from "./symmetric";

export class DiagonalPosterior extends Posterior {
  constructor(p: Parameters, pins: Pins, a: Float32Array | Float64Array) {
    super(p, pins, a, pins.sums);
  }

  image(c: Float64Array, out: Float32Array, omegaD?: Float32Array, temperature = 1): Float32Array {
    const { p, pins } = this;
    p.apply(c, out);
    const noisy = omegaD && temperature ? omegaD : undefined;
    if (pins.strokes.length > 0) {
      for (let n = 0; n < p.N; n++) {
        if (pins.owner[n]! < 0) {
          if (noisy) out[n] = out[n]! + temperature * Math.sqrt(p.variance(n)) * noisy[n]!;
          continue;
        }
        const d = p.variance(n);
        const tau2 = pins.softness(n);
        if (tau2 === 0) {
          out[n] = pins.value[n]!;
          continue;
        }
        out[n] = out[n]! + (d / (d + tau2)) * (pins.value[n]! - out[n]!);
        if (noisy) out[n] = out[n]! + temperature * Math.sqrt((d * tau2) / (d + tau2)) * noisy[n]!;
      }
    } else if (noisy) {
      for (let n = 0; n < p.N; n++) out[n] = out[n]! + temperature * Math.sqrt(p.variance(n)) * noisy[n]!;
    }
    return out;
  }

  /** What pinning leaves of a value's dependence on ω, and of its local variance. */
  private unpinned(n: number): { share: number; local: number } {
    const d = this.p.variance(n);
    if (this.pins.owner[n]! < 0) return { share: 1, local: d };
    const tau2 = this.pins.softness(n);
    return tau2 === 0 ? { share: 0, local: 0 } : { share: tau2 / (d + tau2), local: (d * tau2) / (d + tau2) };
  }

  protected deviationOfScale(out: Float32Array): Float32Array {
    const { p, a, L } = this;
    const { R } = p;
    const scaled = new Float64Array(R);
    for (let n = 0; n < p.N; n++) {
      const { share, local } = this.unpinned(n);
      let variance = 0;
      if (share > 0) {
        for (let i = 0; i < R; i++) {
          let sum = p.B[i * p.N + n]! * a[i]!;
          for (let k = 0; k < i; k++) sum -= L[i * R + k]! * scaled[k]!;
          scaled[i] = sum / L[i * R + i]!;
          variance += scaled[i]! ** 2;
        }
      }
      out[n] = Math.sqrt(share * share * variance + local);
    }
    return out;
  }

  protected rowOfScale(index: number, out: Float32Array): Float32Array {
    const { p, a } = this;
    const here = this.unpinned(index);
    const row = p.row(index, new Float64Array(p.R)).map((value, k) => value * a[k]!);
    const c = solveUpper(this.L, solveLower(this.L, row, p.R), p.R).map((value, k) => value * a[k]! * here.share);
    out.fill(0);
    for (let k = 0; k < p.R; k++) {
      const ck = c[k]!,
        o = k * p.N;
      if (ck) for (let n = 0; n < p.N; n++) out[n] = out[n]! + ck * p.B[o + n]!;
    }
    if (this.pins.strokes.length > 0) {
      for (let n = 0; n < p.N; n++) if (this.pins.owner[n]! >= 0) out[n] = out[n]! * this.unpinned(n).share;
    }
    out[index] = out[index]! + here.local;
    return out;
  }

  protected residual(): number {
    const { p, pins } = this;
    const c = this.coefficients();
    let sum = 0;
    for (let n = 0; n < p.N; n++) {
      if (pins.owner[n]! >= 0) sum += (pins.value[n]! - p.at(n, c)) ** 2 / (p.variance(n) + pins.softness(n));
    }
    return sum;
  }
}
