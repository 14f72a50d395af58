/** Symmetric positive definite matrices that are zero far from the diagonal, in float64. */

export class Band {
  /** Row i of the lower triangle: columns i − b to i, the last one the diagonal. */
  readonly rows: Float64Array;

  constructor(
    readonly size: number,
    readonly b: number,
  ) {
    this.rows = new Float64Array(size * (b + 1));
  }

  /** Adds to an entry of the lower triangle, i ≥ j ≥ i − b. */
  add(i: number, j: number, value: number): void {
    const at = i * (this.b + 1) + j - i + this.b;
    this.rows[at] = this.rows[at]! + value;
  }

  /** A = LLᵀ in place: N·b²/2 products. */
  factorise(): this {
    const { size, b, rows } = this;
    for (let i = 0; i < size; i++) {
      const oi = i * (b + 1) + b - i; // of column 0, were there one
      const first = Math.max(0, i - b);
      for (let j = first; j <= i; j++) {
        const oj = j * (b + 1) + b - j;
        let sum = rows[oi + j]!;
        for (let k = Math.max(first, j - b); k < j; k++) sum -= rows[oi + k]! * rows[oj + k]!;
        rows[oi + j] = i === j ? Math.sqrt(Math.max(sum, 1e-300)) : sum / rows[oj + j]!;
      }
    }
    return this;
  }

  /** x with Lx = y, in place. */
  solveLower(x: Float64Array): Float64Array {
    const { size, b, rows } = this;
    for (let i = 0; i < size; i++) {
      const o = i * (b + 1) + b - i;
      let sum = x[i]!;
      for (let k = Math.max(0, i - b); k < i; k++) sum -= rows[o + k]! * x[k]!;
      x[i] = sum / rows[o + i]!;
    }
    return x;
  }

  /** x with Lᵀx = y, in place. */
  solveUpper(x: Float64Array): Float64Array {
    const { size, b, rows } = this;
    for (let i = size - 1; i >= 0; i--) {
      const o = i * (b + 1) + b - i;
      const value = x[i]! / rows[o + i]!;
      x[i] = value;
      for (let k = Math.max(0, i - b); k < i; k++) x[k] = x[k]! - rows[o + k]! * value;
    }
    return x;
  }

  /** diag (LLᵀ)⁻¹ by Takahashi's recursion, last row first: N·b² products. */
  inverseDiagonal(): Float64Array {
    const { size, b, rows } = this;
    const Z = new Float64Array(size * (b + 1)); // Z[i][k] is entry (i, i + k) of the inverse
    const diagonal = new Float64Array(size);
    const column = new Float64Array(b + 1);
    for (let i = size - 1; i >= 0; i--) {
      const last = Math.min(b, size - 1 - i);
      const pivot = rows[i * (b + 1) + b]!;
      for (let k = 1; k <= last; k++) column[k] = rows[(i + k) * (b + 1) + b - k]! / pivot;
      for (let j = last; j >= 0; j--) {
        let sum = j === 0 ? 1 / (pivot * pivot) : 0;
        for (let k = 1; k <= last; k++) {
          const low = Math.min(j, k);
          sum -= column[k]! * Z[(i + low) * (b + 1) + Math.abs(j - k)]!;
        }
        Z[i * (b + 1) + j] = sum;
      }
      diagonal[i] = Z[i * (b + 1)]!;
    }
    return diagonal;
  }
}
