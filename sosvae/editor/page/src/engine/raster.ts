/** Which pixels a brush or a lasso touches. */

export type Touch = (x: number, y: number) => void;

/** Pixels within half a diameter of the way from (x0, y0) to (x1, y1), at least the one under each point of it. */
export function brush(
  x0: number,
  y0: number,
  d0: number,
  x1: number,
  y1: number,
  d1: number,
  width: number,
  height: number,
  touch: Touch,
): void {
  const reach = Math.max(d0, d1) / 2;
  const dx = x1 - x0,
    dy = y1 - y0;
  const length2 = dx * dx + dy * dy;
  if (reach < 0.75) {
    const steps = Math.ceil(Math.sqrt(length2) * 2) + 1;
    for (let i = 0; i <= steps; i++) {
      const x = Math.floor(x0 + (dx * i) / steps),
        y = Math.floor(y0 + (dy * i) / steps);
      if (x >= 0 && y >= 0 && x < width && y < height) touch(x, y);
    }
    return;
  }
  const left = Math.max(0, Math.floor(Math.min(x0, x1) - reach));
  const right = Math.min(width - 1, Math.ceil(Math.max(x0, x1) + reach));
  const top = Math.max(0, Math.floor(Math.min(y0, y1) - reach));
  const bottom = Math.min(height - 1, Math.ceil(Math.max(y0, y1) + reach));
  for (let y = top; y <= bottom; y++) {
    for (let x = left; x <= right; x++) {
      const px = x + 0.5 - x0,
        py = y + 0.5 - y0;
      const t = length2 > 0 ? Math.max(0, Math.min(1, (px * dx + py * dy) / length2)) : 0;
      const radius = (d0 + t * (d1 - d0)) / 2;
      if ((px - t * dx) ** 2 + (py - t * dy) ** 2 < radius * radius) touch(x, y);
    }
  }
}

/** Pixels whose centre is inside the polygon (even-odd). `points` has three numbers a corner: x, y and one ignored. */
export function polygon(points: number[], width: number, height: number, touch: Touch): void {
  const corners = points.length / 3;
  for (let y = 0; y < height; y++) {
    const crossings: number[] = [];
    const centre = y + 0.5;
    for (let i = 0; i < corners; i++) {
      const j = (i + 1) % corners;
      const ya = points[3 * i + 1]!,
        yb = points[3 * j + 1]!;
      if (ya <= centre === yb <= centre) continue;
      const xa = points[3 * i]!,
        xb = points[3 * j]!;
      crossings.push(xa + ((centre - ya) / (yb - ya)) * (xb - xa));
    }
    crossings.sort((a, b) => a - b);
    for (let i = 0; i + 1 < crossings.length; i += 2) {
      const from = Math.max(0, Math.ceil(crossings[i]! - 0.5));
      const to = Math.min(width - 1, Math.ceil(crossings[i + 1]! - 0.5) - 1);
      for (let x = from; x <= to; x++) touch(x, y);
    }
  }
}

/** The same points mirrored, once for each symmetry that `mirror` asks for; the points themselves first. */
export function mirrored(points: number[], mirror: number, width: number, height: number): number[][] {
  const flip = (source: number[], axis: 0 | 1, size: number): number[] =>
    source.map((value, i) => (i % 3 === axis ? size - value : value));
  const all = [points];
  if (mirror & 1) all.push(flip(points, 0, width));
  if (mirror & 2) for (const some of [...all]) all.push(flip(some, 1, height));
  return all;
}
