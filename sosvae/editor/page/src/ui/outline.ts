/** The border between pinned pixels and the others, along the edges of pixels. */
export function outlineOf(mask: Uint8Array, width: number, height: number): Path2D {
  const path = new Path2D();
  const at = (x: number, y: number): number => (x < 0 || y < 0 || x >= width || y >= height ? 0 : mask[y * width + x]!);
  // Runs of edges become one line each: a large mask has few of them.
  for (let y = 0; y <= height; y++) {
    for (let x = 0; x < width; x++) {
      if (at(x, y - 1) === at(x, y)) continue;
      const start = x;
      while (x < width && at(x, y - 1) !== at(x, y)) x++;
      path.moveTo(start, y);
      path.lineTo(x, y);
    }
  }
  for (let x = 0; x <= width; x++) {
    for (let y = 0; y < height; y++) {
      if (at(x - 1, y) === at(x, y)) continue;
      const start = y;
      while (y < height && at(x - 1, y) !== at(x, y)) y++;
      path.moveTo(x, start);
      path.lineTo(x, y);
    }
  }
  return path;
}
