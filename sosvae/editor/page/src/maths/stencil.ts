/**
 * A local part with a sparse precision, D = (TTᵀ)⁻¹: T is lower triangular in raster order and ties each value to later
 * neighbours in its channel and to later channels of its pixel,
 *
 *   (Tᵀδ)ₙ = tₙ (δₙ + Σₖ sₙₖ δₙ₊ₖ + Σ_c' mₙ_c' δₙ_c')
 *
 * Neighbours outside of the image count as 0. Products and solves are one sweep each over the weights.
 */
export interface StencilArrays {
  /** Of each later neighbour, row and column. */
  offsets: [number, number][];
  /** [stencils, pixels], one stencil for all channels or one for each. */
  t: Float32Array;
  /** [stencils, neighbours, pixels]. */
  s: Float32Array;
  /** [pairs, pixels] or [pairs, 1], of the channels (0, 1), (0, 2), …, (1, 2), … */
  ties?: Float32Array;
}

export class Stencil {
  readonly pixels: number;
  readonly logDeterminant: number;
  private readonly stencils: number;
  private readonly tiedAt: number;

  constructor(
    readonly channels: number,
    readonly height: number,
    readonly width: number,
    readonly arrays: StencilArrays,
  ) {
    this.pixels = height * width;
    this.stencils = arrays.t.length / this.pixels;
    this.tiedAt = (arrays.ties?.length ?? 0) > (channels * (channels - 1)) / 2 ? 1 : 0;
    let sum = 0;
    for (const t of arrays.t) sum += Math.log(t);
    /** log |det T|. */
    this.logDeterminant = (sum * channels) / this.stencils;
  }

  get N(): number {
    return this.channels * this.pixels;
  }

  /** How far below the diagonal T reaches, where the channels of a pixel stand side by side. */
  get reach(): number {
    const { channels, width, arrays } = this;
    return channels * Math.max(...arrays.offsets.map(([dy, dx]) => dy * width + dx)) + channels - 1;
  }

  /** tₙ and each later value that T ties n to, with its relative weight: calls `visit(value, weight)`. */
  private later(c: number, y: number, x: number, visit: (value: number, weight: number) => void): number {
    const { channels, height, width, pixels, arrays } = this;
    const { offsets, t, s, ties } = arrays;
    const i = y * width + x;
    const stencil = this.stencils === 1 ? 0 : c;
    for (let k = 0; k < offsets.length; k++) {
      const yk = y + offsets[k]![0];
      const xk = x + offsets[k]![1];
      if (yk < height && xk >= 0 && xk < width) {
        visit(c * pixels + yk * width + xk, s[(stencil * offsets.length + k) * pixels + i]!);
      }
    }
    if (ties) {
      for (let other = c + 1; other < channels; other++) {
        const pair = c * channels - (c * (c + 1)) / 2 + other - c - 1;
        visit(other * pixels + i, this.tiedAt ? ties[pair * pixels + i]! : ties[pair]!);
      }
    }
    return t[stencil * pixels + i]!;
  }

  /** Calls `visit(n, t, entries)` for every column n of T, first to last, or last to first where `backwards`. */
  private sweep(
    backwards: boolean,
    visit: (n: number, t: number, values: Int32Array, weights: Float64Array, count: number) => void,
  ): void {
    const { channels, width, pixels } = this;
    const most = this.arrays.offsets.length + channels;
    const values = new Int32Array(most);
    const weights = new Float64Array(most);
    let count = 0;
    const note = (value: number, weight: number): void => {
      values[count] = value;
      weights[count++] = weight;
    };
    for (let j = 0; j < pixels; j++) {
      const i = backwards ? pixels - 1 - j : j;
      const y = Math.floor(i / width);
      for (let k = 0; k < channels; k++) {
        const c = backwards ? channels - 1 - k : k;
        count = 0;
        const t = this.later(c, y, i - y * width, note);
        visit(c * pixels + i, t, values, weights, count);
      }
    }
  }

  /** Tᵀδ into `out`. */
  whiten(delta: ArrayLike<number>, out: Float64Array): Float64Array {
    this.sweep(false, (n, t, values, weights, count) => {
      let sum = delta[n]!;
      for (let k = 0; k < count; k++) sum += weights[k]! * delta[values[k]!]!;
      out[n] = t * sum;
    });
    return out;
  }

  /** Tv into `out`. */
  spread(v: ArrayLike<number>, out: Float64Array): Float64Array {
    out.fill(0);
    this.sweep(false, (n, t, values, weights, count) => {
      const value = t * v[n]!;
      out[n] = out[n]! + value;
      for (let k = 0; k < count; k++) out[values[k]!] = out[values[k]!]! + weights[k]! * value;
    });
    return out;
  }

  /** y with Tᵀy = ω: with ω standard normal, a sample of the local part. */
  colour(omega: ArrayLike<number>, out: Float64Array): Float64Array {
    this.sweep(true, (n, t, values, weights, count) => {
      let sum = omega[n]! / t;
      for (let k = 0; k < count; k++) sum -= weights[k]! * out[values[k]!]!;
      out[n] = sum;
    });
    return out;
  }

  /** y with Ty = v. */
  uncolour(v: ArrayLike<number>, out: Float64Array): Float64Array {
    for (let n = 0; n < this.N; n++) out[n] = v[n]!;
    this.sweep(false, (n, t, values, weights, count) => {
      const y = out[n]! / t;
      out[n] = y;
      for (let k = 0; k < count; k++) out[values[k]!] = out[values[k]!]! - t * weights[k]! * y;
    });
    return out;
  }

  /** Calls `add(n, m, value)` for the products that TTᵀ is the sum of, n and m both ways round. */
  products(add: (n: number, m: number, value: number) => void): void {
    this.sweep(false, (n, t, values, weights, count) => {
      const t2 = t * t;
      add(n, n, t2);
      for (let k = 0; k < count; k++) {
        add(values[k]!, n, t2 * weights[k]!);
        add(n, values[k]!, t2 * weights[k]!);
        for (let l = 0; l < count; l++) add(values[k]!, values[l]!, t2 * weights[k]! * weights[l]!);
      }
    });
  }
}
