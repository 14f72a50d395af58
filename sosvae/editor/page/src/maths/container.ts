/**
 * What the server sends: named arrays behind a JSON header.
 *
 *   "SOSP" | uint32 length of the header | header | arrays, each at a multiple of 8 bytes
 *
 * Little-endian. `sosvae/editor/parameters.py` writes it and has the meaning of each array.
 */
import { halvesToFloats } from "./half";

export interface ArrayEntry {
  name: string;
  dtype: "float16" | "float32" | "uint8";
  shape: number[];
  offset: number;
}

export interface Container {
  header: Record<string, unknown>;
  arrays: Map<string, Float32Array | Uint8Array>;
  shapes: Map<string, number[]>;
}

const MAGIC = 0x534f5350; // "SOSP"

/** All arrays, or those of `names`. */
export function readContainer(buffer: ArrayBuffer, names?: string[]): Container {
  const view = new DataView(buffer);
  if (buffer.byteLength < 8 || view.getUint32(0) !== MAGIC) {
    throw new Error("these are no parameters of sosvae edit");
  }
  const length = view.getUint32(4, true);
  const header = JSON.parse(new TextDecoder().decode(new Uint8Array(buffer, 8, length))) as Record<string, unknown>;
  const start = 8 + length;
  const arrays = new Map<string, Float32Array | Uint8Array>();
  const shapes = new Map<string, number[]>();
  for (const entry of header["arrays"] as ArrayEntry[]) {
    const count = entry.shape.reduce((product, size) => product * size, 1);
    if (names && !names.includes(entry.name)) continue;
    shapes.set(entry.name, entry.shape);
    arrays.set(entry.name, decode(buffer, entry, start + entry.offset, count));
  }
  return { header, arrays, shapes };
}

export interface Mean {
  shape: [number, number, number];
  loc: Float32Array;
}

/** The mean, where enough of a container has come to read it. */
export function meanOf(bytes: Uint8Array<ArrayBuffer>): Mean | null {
  const { buffer, length: have } = bytes;
  const view = new DataView(buffer, bytes.byteOffset, have);
  if (have < 8 || view.getUint32(0) !== MAGIC) return null;
  const start = 8 + view.getUint32(4, true);
  if (have < start) return null;
  const header = JSON.parse(new TextDecoder().decode(bytes.subarray(8, start))) as Record<string, unknown>;
  const entry = (header["arrays"] as ArrayEntry[]).find(({ name }) => name === "loc");
  const shape = header["shape"] as [number, number, number];
  const count = shape[0] * shape[1] * shape[2];
  const size = entry?.dtype === "float16" ? 2 : 4;
  if (!entry || have < start + entry.offset + size * count) return null;
  return { shape, loc: decode(buffer, entry, bytes.byteOffset + start + entry.offset, count) as Float32Array };
}

function decode(buffer: ArrayBuffer, entry: ArrayEntry, offset: number, count: number): Float32Array | Uint8Array {
  switch (entry.dtype) {
    case "float16":
      return halvesToFloats(new Uint16Array(buffer, offset, count));
    case "float32":
      return new Float32Array(buffer, offset, count);
    case "uint8":
      return new Uint8Array(buffer, offset, count);
  }
}
