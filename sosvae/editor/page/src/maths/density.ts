/**
 * log p(x) under N(μ, B diag(a²) Bᵀ + D), or under Student's t with that scale matrix, in float64 by the residual form: never a difference of two large numbers.
 *
 * Where D is (TTᵀ)⁻¹ it is that of Tᵀ(x − μ) under N(0, QQᵀ + I), Q = TᵀB, and log |det T|.
 */
import { Parameters } from "./parameters";
import { capacitance, cholesky, logDeterminant, solve } from "./symmetric";

const grams = new WeakMap<Parameters, Float64Array>();

/** BᵀD⁻¹B (lower triangle): once for each code. */
function gram(p: Parameters): Float64Array {
  let S = grams.get(p);
  if (S) return S;
  const { R, N, B } = p;
  S = new Float64Array(R * R);
  const weighted = new Float64Array(N);
  for (let i = 0; i < R; i++) {
    for (let n = 0; n < N; n++) weighted[n] = B[i * N + n]! / p.variance(n);
    for (let j = 0; j <= i; j++) {
      let sum = 0;
      const o = j * N;
      for (let n = 0; n < N; n++) sum += weighted[n]! * B[o + n]!;
      S[i * R + j] = sum;
    }
  }
  grams.set(p, S);
  return S;
}

const whitened = new WeakMap<Parameters, Parameters>();

function whiten(p: Parameters): Parameters {
  let white = whitened.get(p);
  if (white) return white;
  const { N, R, B, channels, height, width } = p;
  const Q = new Float32Array(R * N);
  const row = new Float64Array(N);
  for (let k = 0; k < R; k++) Q.set(p.stencil!.whiten(B.subarray(k * N, (k + 1) * N), row), k * N);
  white = new Parameters(channels, height, width, new Float32Array(N), Q, R, new Float32Array([1]));
  whitened.set(p, white);
  return white;
}

export function logDensity(p: Parameters, x: Float32Array, a: ArrayLike<number>): number {
  const { q, logdet } = quadratic(p, x, a);
  const constant = -0.5 * (p.N * Math.log(2 * Math.PI) + logdet);
  if (p.df === Infinity) return constant - 0.5 * q;
  const [half, n] = [p.df / 2, p.N / 2];
  return constant + logGammaRatio(half, n) - (half + n) * Math.log1p(q / p.df);
}

/** Δ(a) = log Γ(a + n) − log Γ(a) − n log a, by Stirling's series from a ≥ 15 on, as logarithms of Γ would cancel. */
function logGammaRatio(a: number, n: number): number {
  let sum = 0;
  for (; a < 15; a++) sum += n * Math.log1p(1 / a) - Math.log1p(n / a); // Δ(a) − Δ(a + 1)
  const rest = (x: number): number => 1 / (12 * x) - 1 / (360 * x ** 3) + 1 / (1260 * x ** 5);
  return sum + (a + n - 0.5) * Math.log1p(n / a) - n + rest(a + n) - rest(a);
}

/** (x − μ)ᵀΣ⁻¹(x − μ) and log|Σ|. */
function quadratic(p: Parameters, x: Float32Array, a: ArrayLike<number>): { q: number; logdet: number } {
  if (p.stencil) {
    const delta = Float64Array.from(x, (value, n) => value - p.loc[n]!);
    const white = Float32Array.from(p.stencil.whiten(delta, new Float64Array(p.N)));
    const { q, logdet } = quadratic(whiten(p), white, a);
    return { q, logdet: logdet - 2 * p.stencil.logDeterminant };
  }
  const { R, N, B } = p;
  const L = cholesky(capacitance(gram(p), a, R), R);
  const residual = new Float64Array(N);
  for (let n = 0; n < N; n++) residual[n] = x[n]! - p.loc[n]!;
  const project = (): Float64Array => {
    const w = new Float64Array(R);
    for (let k = 0; k < R; k++) {
      let sum = 0;
      for (let n = 0; n < N; n++) sum += (B[k * N + n]! * residual[n]!) / p.variance(n);
      w[k] = sum * a[k]!;
    }
    return w;
  };
  const v = solve(L, project(), R);
  for (let k = 0; k < R; k++) {
    const c = v[k]! * a[k]!;
    for (let n = 0; n < N; n++) residual[n] = residual[n]! - c * B[k * N + n]!;
  }
  // g is zero at the exact v: what rounding left in v is taken out without another pass.
  const g = project().map((value, k) => value - v[k]!);
  const correction = solve(L, g, R);
  let q = 0;
  let logD = 0;
  for (let n = 0; n < N; n++) {
    const d = p.variance(n);
    q += residual[n]! ** 2 / d;
    logD += Math.log(d);
  }
  for (let k = 0; k < R; k++) q += v[k]! ** 2 - g[k]! * correction[k]!;
  return { q, logdet: logDeterminant(L, R) + logD };
}
