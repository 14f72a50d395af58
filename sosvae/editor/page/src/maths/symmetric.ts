/** Small symmetric positive definite matrices, R×R in float64, row by row. */

/** L with A = LLᵀ, lower triangular. Only the lower triangle of `A` is read. */
export function cholesky(A: Float64Array, R: number): Float64Array {
  const L = new Float64Array(R * R);
  for (let i = 0; i < R; i++) {
    for (let j = 0; j <= i; j++) {
      let sum = A[i * R + j]!;
      for (let k = 0; k < j; k++) sum -= L[i * R + k]! * L[j * R + k]!;
      if (i === j) {
        // A ⪰ I here, so a pivot below 1 is rounding.
        L[i * R + i] = Math.sqrt(Math.max(sum, 1e-12));
      } else {
        L[i * R + j] = sum / L[j * R + j]!;
      }
    }
  }
  return L;
}

/** x with Lx = b. */
export function solveLower(L: Float64Array, b: ArrayLike<number>, R: number): Float64Array {
  const x = new Float64Array(R);
  for (let i = 0; i < R; i++) {
    let sum = b[i]!;
    for (let k = 0; k < i; k++) sum -= L[i * R + k]! * x[k]!;
    x[i] = sum / L[i * R + i]!;
  }
  return x;
}

/** x with Lᵀx = b. */
export function solveUpper(L: Float64Array, b: ArrayLike<number>, R: number): Float64Array {
  const x = new Float64Array(R);
  for (let i = R - 1; i >= 0; i--) {
    let sum = b[i]!;
    for (let k = i + 1; k < R; k++) sum -= L[k * R + i]! * x[k]!;
    x[i] = sum / L[i * R + i]!;
  }
  return x;
}

/** x with LLᵀx = b. */
export function solve(L: Float64Array, b: ArrayLike<number>, R: number): Float64Array {
  return solveUpper(L, solveLower(L, b, R), R);
}

/** log|LLᵀ|. */
export function logDeterminant(L: Float64Array, R: number): number {
  let sum = 0;
  for (let i = 0; i < R; i++) sum += 2 * Math.log(L[i * R + i]!);
  return sum;
}

/** I + aaᵀ∘S. */
export function capacitance(S: Float64Array, a: ArrayLike<number>, R: number): Float64Array {
  const C = new Float64Array(R * R);
  for (let i = 0; i < R; i++) {
    for (let j = 0; j <= i; j++) C[i * R + j] = a[i]! * a[j]! * S[i * R + j]! + (i === j ? 1 : 0);
  }
  return C;
}
