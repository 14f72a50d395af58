/** Turns `start` into `end` at constant angular speed (paper, eq. 4); a straight line where they share a direction. */
export function slerp(start: Float32Array, end: Float32Array, t: number): Float32Array {
  let dot = 0;
  let a2 = 0;
  let b2 = 0;
  for (let i = 0; i < start.length; i++) {
    dot += start[i]! * end[i]!;
    a2 += start[i]! ** 2;
    b2 += end[i]! ** 2;
  }
  const angle = Math.acos(Math.max(-1, Math.min(1, dot / Math.max(Math.sqrt(a2 * b2), 1e-30))));
  const sine = Math.sin(angle);
  const [u, v] = sine < 1e-4 ? [1 - t, t] : [Math.sin((1 - t) * angle) / sine, Math.sin(t * angle) / sine];
  return start.map((value, i) => u * value + v * end[i]!);
}

/** The grid between four corners (paper, fig. 4), row by row: along the left and right edge first, then across. */
export function grid(corners: Float32Array[], rows: number, columns: number): Float32Array[] {
  const [topLeft, topRight, bottomLeft, bottomRight] = corners as [
    Float32Array,
    Float32Array,
    Float32Array,
    Float32Array,
  ];
  const cells: Float32Array[] = [];
  for (let i = 0; i < rows; i++) {
    const s = rows > 1 ? i / (rows - 1) : 0;
    const left = slerp(topLeft, bottomLeft, s);
    const right = slerp(topRight, bottomRight, s);
    for (let j = 0; j < columns; j++) cells.push(slerp(left, right, columns > 1 ? j / (columns - 1) : 0));
  }
  return cells;
}
