/** A session as JSON, as a link and inside a PNG: codes, seeds and strokes, from which the picture follows. */
import { START_VIEW, START_WALK, type Doc, type Stroke, type View, type Walk } from "../types";

interface Session {
  format: "sosvae-edit";
  version: 1;
  doc: Doc;
}

export function toSession(doc: Doc): Session {
  const strokes = doc.strokes.map((stroke) => ({ ...stroke, points: stroke.points.map((v) => Math.round(v * 8) / 8) }));
  return { format: "sosvae-edit", version: 1, doc: { ...doc, strokes } };
}

/** The state in `value`. Raises an error that says so where it is no session. */
export function fromSession(value: unknown): Doc {
  const session = value as Session;
  const doc = session?.doc;
  const sound =
    session?.format === "sosvae-edit" &&
    doc &&
    typeof doc.run === "string" &&
    isObject(doc.code) &&
    Array.isArray(doc.strokes) &&
    doc.strokes.every(isStroke) &&
    (doc.walk === undefined || isWalk(doc.walk)) &&
    isView({ ...START_VIEW, ...doc.view });
  if (!sound) throw new Error("this is no session of sosvae edit");
  const view = { ...START_VIEW, ...doc.view };
  const { run, code, strokes, compare = null, walk = START_WALK } = doc;
  return { run, code, view, strokes, compare, walk };
}

function isObject(value: unknown): boolean {
  return typeof value === "object" && value !== null;
}

function isStroke(stroke: Stroke): boolean {
  return (
    ["paint", "recolour", "pin", "erase"].includes(stroke.tool) &&
    ["brush", "lasso", "all"].includes(stroke.shape) &&
    [stroke.points, stroke.colour].every((list) => Array.isArray(list) && list.every(Number.isFinite)) &&
    [stroke.tau, stroke.channels, stroke.mirror].every(Number.isFinite)
  );
}

function isView(view: View): boolean {
  const { mode, seed, localSeed, globalTemperature, localTemperature, scales, locked } = view;
  return (
    ["mean", "sample"].includes(mode) &&
    [seed, localSeed, globalTemperature, localTemperature].every(Number.isFinite) &&
    (scales === null || (Array.isArray(scales) && scales.every(Number.isFinite))) &&
    Array.isArray(locked)
  );
}

function isWalk({ corners, edge, t }: Walk): boolean {
  const seeds = Array.isArray(corners) && corners.length === 4 && corners.every(Number.isFinite);
  return seeds && [0, 1, 2, 3].includes(edge) && t >= 0 && t <= 1;
}

export async function toLink(doc: Doc): Promise<string> {
  const bytes = await pipe(
    new TextEncoder().encode(JSON.stringify(toSession(doc))),
    new CompressionStream("deflate-raw"),
  );
  const text = btoa(Array.from(bytes, (byte) => String.fromCharCode(byte)).join(""));
  const url = new URL(location.href);
  url.hash = "s=" + text.replace(/\+/g, "-").replace(/\//g, "_").replace(/=+$/, "");
  return url.href;
}

/** The session in the page's address, if there is one. */
export async function fromLink(hash: string): Promise<Doc | null> {
  const text = /^#s=([\w-]+)$/.exec(hash)?.[1];
  if (!text) return null;
  const bytes = Uint8Array.from(atob(text.replace(/-/g, "+").replace(/_/g, "/")), (letter) => letter.charCodeAt(0));
  const plain = await pipe(bytes, new DecompressionStream("deflate-raw"));
  return fromSession(JSON.parse(new TextDecoder().decode(plain)));
}

async function pipe(
  bytes: Uint8Array<ArrayBuffer>,
  through: CompressionStream | DecompressionStream,
): Promise<Uint8Array> {
  const stream = new Blob([bytes])
    .stream()
    .pipeThrough(through as ReadableWritablePair<Uint8Array, Uint8Array<ArrayBuffer>>);
  return new Uint8Array(await new Response(stream).arrayBuffer());
}

// --- PNG with the session inside its metadata ---------------------------------------------------------------

const KEYWORD = "sosvae-edit";

/** The same PNG with one more text chunk (iTXt, UTF-8), right before its end. */
export async function withSession(png: Blob, doc: Doc): Promise<Blob> {
  const bytes = new Uint8Array(await png.arrayBuffer());
  const text = new TextEncoder().encode(`iTXt${KEYWORD}\0\0\0\0\0${JSON.stringify(toSession(doc))}`);
  const chunk = new Uint8Array(8 + text.length);
  const view = new DataView(chunk.buffer);
  view.setUint32(0, text.length - 4);
  chunk.set(text, 4);
  view.setUint32(4 + text.length, crc(text));
  return new Blob([bytes.slice(0, -12), chunk, bytes.slice(-12)], { type: "image/png" });
}

/** The session inside a PNG, if it has one. */
export async function sessionOf(file: Blob): Promise<Doc | null> {
  const bytes = new Uint8Array(await file.arrayBuffer());
  const view = new DataView(bytes.buffer);
  if (bytes.length < 20 || view.getUint32(0) !== 0x89504e47) return null;
  for (let at = 8; at + 12 <= bytes.length; ) {
    const length = view.getUint32(at);
    const head = new TextDecoder().decode(bytes.subarray(at + 4, at + 8 + KEYWORD.length));
    if (head === `iTXt${KEYWORD}`) {
      const text = bytes.subarray(at + 8 + KEYWORD.length + 5, at + 8 + length);
      return fromSession(JSON.parse(new TextDecoder().decode(text)));
    }
    at += 12 + length;
  }
  return null;
}

function crc(bytes: Uint8Array): number {
  let value = 0xffffffff;
  for (const byte of bytes) {
    value ^= byte;
    for (let bit = 0; bit < 8; bit++) value = value & 1 ? (value >>> 1) ^ 0xedb88320 : value >>> 1;
  }
  return (value ^ 0xffffffff) >>> 0;
}
