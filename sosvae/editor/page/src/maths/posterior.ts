/**
 * The rest of the image given what is pinned (paper, eq. 6 and 7): C₂ = I + aaᵀ∘S = L₂L₂ᵀ, ω̂ = C₂⁻¹(a ∘ h), and
 * another plausible image is at ω = ω̂ + L₂⁻ᵀε. With nothing pinned that is the model itself.
 *
 * `Posterior` is what both local parts have in common; `diagonal.ts` and `sparse.ts` have the rest.
 */
import type { Parameters } from "./parameters";
import type { Pins } from "./pins";
import { chiSquare } from "./random";
import { capacitance, cholesky, solve, solveUpper } from "./symmetric";

export abstract class Posterior {
  readonly L: Float64Array;
  readonly omegaHat: Float64Array;

  constructor(
    readonly p: Parameters,
    readonly pins: Pins,
    readonly a: Float32Array | Float64Array,
    { S, h }: { S: Float64Array; h: Float64Array },
  ) {
    this.L = cholesky(capacitance(S, a, p.R), p.R);
    this.omegaHat = solve(
      this.L,
      h.map((value, k) => value * a[k]!),
      p.R,
    );
  }

  /** a ∘ (ω̂ + t L₂⁻ᵀε): what B is multiplied with. */
  coefficients(epsilon?: ArrayLike<number>, temperature = 1): Float64Array {
    const { p, a, omegaHat } = this;
    const c = Float64Array.from(omegaHat);
    if (epsilon && temperature) {
      const turned = solveUpper(this.L, epsilon, p.R);
      for (let k = 0; k < p.R; k++) c[k] = c[k]! + temperature * turned[k]!;
    }
    for (let k = 0; k < p.R; k++) c[k] = c[k]! * a[k]!;
    return c;
  }

  /** The whole image into `out`: at coefficients c, the local part of noise ω_d times `temperature`, pins pinned. */
  abstract image(c: Float64Array, out: Float32Array, omegaD?: Float32Array, temperature?: number): Float32Array;

  /** Standard deviation of each value given what is pinned. */
  standardDeviation(out: Float32Array): Float32Array {
    const factor = Math.sqrt(this.widening());
    this.deviationOfScale(out);
    if (factor !== 1) for (let n = 0; n < out.length; n++) out[n] = out[n]! * factor;
    return out;
  }

  /** Covariance of every value with value `index`, given what is pinned. */
  covarianceRow(index: number, out: Float32Array): Float32Array {
    const factor = this.widening();
    this.rowOfScale(index, out);
    if (factor !== 1) for (let n = 0; n < out.length; n++) out[n] = out[n]! * factor;
    return out;
  }

  /** The same of the normal, or of the scale matrix of Student's t. */
  protected abstract deviationOfScale(out: Float32Array): Float32Array;
  protected abstract rowOfScale(index: number, out: Float32Array): Float32Array;

  /** What M pins with Mahalanobis distance q₂ leave of a t: ν + M degrees of freedom, (ν + q₂)/(ν + M) of its scale. */
  private left(): { df: number; scale: number } {
    const { df } = this.p;
    if (df === Infinity) return { df, scale: 1 };
    const { mahalanobis, count } = this.surprise();
    return { df: df + count, scale: (df + mahalanobis) / (df + count) };
  }

  /** Covariance over scale matrix, ν/(ν − 2); of a t without a covariance the scale matrix is shown. */
  private widening(): number {
    const { df, scale } = this.left();
    return df === Infinity || df <= 2 ? scale : (scale * df) / (df - 2);
  }

  /** How much wider than under a normal the sample of a seed is; without one (given noise) of u = 1, its mean. */
  width(seed?: number): number {
    const { df, scale } = this.left();
    if (df === Infinity) return 1;
    return Math.sqrt(scale / (seed === undefined ? 1 : chiSquare(seed, df) / df));
  }

  /** (b − μ − Ba∘ω̂)ᵀG(b − μ − Ba∘ω̂): how far the pinned values are from what the components make of them. */
  protected abstract residual(): number;

  /**
   * δᵀΣ⁻¹δ of the pinned values under the model: how surprising the edit is. As a sum of squares, not a difference of
   * two large numbers. Where the model is right it is about the number of pinned values.
   */
  surprise(): { mahalanobis: number; count: number } {
    const count = this.pins.count();
    if (count === 0) return { mahalanobis: 0, count };
    let mahalanobis = this.residual();
    for (let k = 0; k < this.p.R; k++) mahalanobis += this.omegaHat[k]! ** 2;
    return { mahalanobis, count };
  }
}
