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
