/** Standard normal numbers that follow from a seed alone, in every browser. */

/** Uniform 32-bit integers (mulberry32). */
function generator(seed: number): () => number {
  let state = (seed ^ 0x9e3779b9) >>> 0;
  return () => {
    state = (state + 0x6d2b79f5) >>> 0;
    let t = Math.imul(state ^ (state >>> 15), state | 1);
    t ^= t + Math.imul(t ^ (t >>> 7), t | 61);
    return (t ^ (t >>> 14)) >>> 0;
  };
}

/** `count` standard normal numbers (Box-Muller). */
export function normals(seed: number, count: number): Float32Array {
  const next = generator(Math.imul(seed + 1, 0x85ebca6b));
  const values = new Float32Array(count);
  for (let i = 0; i < count; i += 2) {
    const radius = Math.sqrt(-2 * Math.log((next() + 1) / 4294967297));
    const angle = (2 * Math.PI * next()) / 4294967296;
    values[i] = radius * Math.cos(angle);
    if (i + 1 < count) values[i + 1] = radius * Math.sin(angle);
  }
  return values;
}

/** A number from χ² with so many degrees of freedom (Marsaglia and Tsang's gamma); it hardly moves as they grow. */
export function chiSquare(seed: number, df: number): number {
  const next = generator(Math.imul(seed + 1, 0xc2b2ae35));
  const uniform = (): number => (next() + 0.5) / 4294967296;
  const normal = (): number => Math.sqrt(-2 * Math.log(uniform())) * Math.cos(2 * Math.PI * uniform());
  const boost = df < 2 ? uniform() ** (2 / df) : 1; // below shape 1 from shape + 1
  const d = (df < 2 ? df / 2 + 1 : df / 2) - 1 / 3;
  for (;;) {
    const x = normal();
    const v = (1 + x / Math.sqrt(9 * d)) ** 3;
    const u = uniform();
    if (v > 0 && Math.log(u) < 0.5 * x * x + d * (1 - v + Math.log(v))) return 2 * d * v * boost;
  }
}
