/**
 * What pins leave of a local part with a sparse precision Λ = TTᵀ. With M = 1/τ² at pinned values (without bound where
 * τ = 0), a field x known at the pins is continued to
 *
 *   u(x) = (Λ + M)⁻¹Mx,   which minimises uᵀΛu + Σ(x − u)²/τ²,
 *
 * and that minimum is xᵀGx with G = M − M(Λ + M)⁻¹M. Λ + M has a band, so that it is factorised directly: N·b²/2
 * products for a band b of one row of pixels or two.
 */
import { Band } from "./band";
import type { Pins } from "./pins";
import type { Stencil } from "./stencil";

export class Conditioned {
  private readonly band: Band;
  private readonly weight: Float64Array; // 1/τ², 0 where nothing is pinned, Infinity where τ = 0
  private readonly N: number;

  constructor(
    private readonly stencil: Stencil,
    pins: Pins | null,
  ) {
    const { N } = stencil;
    this.N = N;
    this.weight = new Float64Array(N);
    if (pins) for (let n = 0; n < N; n++) if (pins.owner[n]! >= 0) this.weight[n] = 1 / pins.softness(n);
    this.band = new Band(N, Math.min(N - 1, stencil.reach));
    stencil.products((n, m, value) => {
      if (this.weight[n]! === Infinity || this.weight[m]! === Infinity) return;
      const [i, j] = [this.place(n), this.place(m)];
      if (i >= j) this.band.add(i, j, value);
    });
    for (let n = 0; n < N; n++) {
      const i = this.place(n);
      this.band.add(i, i, this.weight[n] === Infinity ? 1 : this.weight[n]!);
    }
    this.band.factorise();
  }

  /** Where a value stands when the channels of a pixel stand side by side. */
  private place(n: number): number {
    const { channels, pixels } = this.stencil;
    return channels === 1 ? n : (n % pixels) * channels + Math.floor(n / pixels);
  }

  private pinned(n: number): boolean {
    return this.weight[n] === Infinity;
  }

  /** (Λ + M)⁻¹x over what is not pinned exactly; 0 where it is. */
  solve(x: ArrayLike<number>): Float64Array {
    return this.among(x, (moved) => this.band.solveUpper(this.band.solveLower(moved)));
  }

  /** A sample with covariance (Λ + M)⁻¹; T⁻ᵀω where nothing is pinned. */
  colour(omega: ArrayLike<number>): Float64Array {
    return this.among(omega, (moved) => this.band.solveUpper(moved));
  }

  private among(x: ArrayLike<number>, work: (moved: Float64Array) => void): Float64Array {
    const moved = new Float64Array(this.N);
    for (let n = 0; n < this.N; n++) if (!this.pinned(n)) moved[this.place(n)] = x[n]!;
    work(moved);
    const out = new Float64Array(this.N);
    for (let n = 0; n < this.N; n++) if (!this.pinned(n)) out[n] = moved[this.place(n)]!;
    return out;
  }

  /** u(x); of x only what is pinned counts. */
  extend(x: ArrayLike<number>): Float64Array {
    const { N, stencil, weight } = this;
    const known = new Float64Array(N);
    for (let n = 0; n < N; n++) if (this.pinned(n)) known[n] = x[n]!;
    const right = stencil.spread(stencil.whiten(known, new Float64Array(N)), new Float64Array(N));
    for (let n = 0; n < N; n++) right[n] = (weight[n]! > 0 && !this.pinned(n) ? weight[n]! * x[n]! : 0) - right[n]!;
    const u = this.solve(right);
    for (let n = 0; n < N; n++) if (this.pinned(n)) u[n] = known[n]!;
    return u;
  }

  /** The parts of xᵀGx = Σ part², as a vector: Tᵀu and (x − u)/τ. */
  energy(x: ArrayLike<number>, u: Float64Array): Float64Array {
    const { N, weight } = this;
    const parts = new Float64Array(2 * N);
    this.stencil.whiten(u, parts);
    for (let n = 0; n < N; n++) {
      if (weight[n]! > 0 && !this.pinned(n)) parts[N + n] = Math.sqrt(weight[n]!) * (x[n]! - u[n]!);
    }
    return parts;
  }

  /** diag (Λ + M)⁻¹. */
  variance(): Float64Array {
    const diagonal = this.band.inverseDiagonal();
    const out = new Float64Array(this.N);
    for (let n = 0; n < this.N; n++) if (!this.pinned(n)) out[n] = diagonal[this.place(n)]!;
    return out;
  }
}
