/** Values as RGBA. */

export function pictureOf(y: Float32Array, channels: number, rgba: Uint8ClampedArray): void {
  const plane = rgba.length / 4;
  const [g, b] = channels === 3 ? [plane, 2 * plane] : [0, 0];
  for (let i = 0, o = 0; i < plane; i++, o += 4) {
    rgba[o] = y[i]! * 255;
    rgba[o + 1] = y[g + i]! * 255;
    rgba[o + 2] = y[b + i]! * 255;
    rgba[o + 3] = 255;
  }
}

// Magma at nine places: light is more, and it stays readable in grey and to the colour-blind.
const MAGMA = [
  [0, 0, 4],
  [28, 16, 68],
  [79, 18, 123],
  [129, 37, 129],
  [181, 54, 122],
  [229, 80, 100],
  [251, 135, 97],
  [254, 194, 135],
  [252, 253, 191],
];
// From blue over white to red.
const DIVERGING = [
  [5, 48, 97],
  [33, 102, 172],
  [67, 147, 195],
  [146, 197, 222],
  [247, 247, 247],
  [244, 165, 130],
  [214, 96, 77],
  [178, 24, 43],
  [103, 0, 31],
];

/** Values from 0 to `top` (all channels of a pixel averaged by `reduce`) as magma, or from −top to top as diverging. */
export function heatOf(values: Float32Array, channels: number, rgba: Uint8ClampedArray, diverging: boolean): number {
  const plane = rgba.length / 4;
  const mean = new Float32Array(plane);
  let top = 0;
  for (let i = 0; i < plane; i++) {
    let sum = 0;
    for (let c = 0; c < channels; c++) sum += values[c * plane + i]!;
    mean[i] = sum / channels;
  }
  // A single value must not darken the whole: the scale ends where 1 in 200 pixels is above.
  const ordered = mean.map(Math.abs).sort();
  top = Math.max(ordered[Math.floor(0.995 * (plane - 1))]!, 1e-12);
  const map = diverging ? DIVERGING : MAGMA;
  for (let i = 0, o = 0; i < plane; i++, o += 4) {
    const t = diverging ? 0.5 + mean[i]! / (2 * top) : mean[i]! / top;
    const place = Math.max(0, Math.min(1, t)) * (map.length - 1);
    const low = Math.min(map.length - 2, Math.floor(place));
    const share = place - low;
    for (let c = 0; c < 3; c++) rgba[o + c] = map[low]![c]! * (1 - share) + map[low + 1]![c]! * share;
    rgba[o + 3] = 255;
  }
  return top;
}
