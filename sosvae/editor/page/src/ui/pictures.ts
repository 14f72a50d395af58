/** Pictures as canvases and files. */
import { GIFEncoder, applyPalette, quantize } from "gifenc";
import type { Picture } from "../engine/engine";

export function canvasOf(picture: Picture, scale = 1): HTMLCanvasElement {
  const small = document.createElement("canvas");
  small.width = picture.width;
  small.height = picture.height;
  small.getContext("2d")!.putImageData(new ImageData(picture.rgba, picture.width, picture.height), 0, 0);
  if (scale === 1) return small;
  const large = document.createElement("canvas");
  large.width = picture.width * scale;
  large.height = picture.height * scale;
  const context = large.getContext("2d")!;
  context.imageSmoothingEnabled = false;
  context.drawImage(small, 0, 0, large.width, large.height);
  return large;
}

export function pngOf(canvas: HTMLCanvasElement): Promise<Blob> {
  return new Promise((resolve, reject) =>
    canvas.toBlob((blob) => (blob ? resolve(blob) : reject(new Error("no PNG could be made"))), "image/png"),
  );
}

/** Pictures in rows, one pixel apart. */
export function sheetOf(pictures: Picture[], columns: number, scale: number): HTMLCanvasElement {
  const { width, height } = pictures[0]!;
  const rows = Math.ceil(pictures.length / columns);
  const sheet = document.createElement("canvas");
  sheet.width = columns * (width * scale + 1) - 1;
  sheet.height = rows * (height * scale + 1) - 1;
  const context = sheet.getContext("2d")!;
  pictures.forEach((picture, i) => {
    const [x, y] = [(i % columns) * (width * scale + 1), Math.floor(i / columns) * (height * scale + 1)];
    context.drawImage(canvasOf(picture, scale), x, y);
  });
  return sheet;
}

export function gifOf(pictures: Picture[], scale: number, delay: number): Blob {
  const encoder = GIFEncoder();
  for (const picture of pictures) {
    const canvas = canvasOf(picture, scale);
    const { data } = canvas.getContext("2d")!.getImageData(0, 0, canvas.width, canvas.height);
    const palette = quantize(data, 256);
    encoder.writeFrame(applyPalette(data, palette), canvas.width, canvas.height, { palette, delay, repeat: 0 });
  }
  encoder.finish();
  return new Blob([encoder.bytes()], { type: "image/gif" });
}

/** A film by the browser's own recorder, in real time. Raises an error where it has none. */
export async function webmOf(pictures: Picture[], scale: number, delay: number): Promise<Blob> {
  if (typeof MediaRecorder === "undefined") throw new Error("this browser records no films; GIF works");
  const canvas = canvasOf(pictures[0]!, scale);
  const context = canvas.getContext("2d")!;
  const recorder = new MediaRecorder(canvas.captureStream(1000 / delay), { mimeType: "video/webm" });
  const parts: Blob[] = [];
  recorder.addEventListener("dataavailable", (event) => parts.push(event.data));
  const stopped = new Promise((resolve) => recorder.addEventListener("stop", resolve));
  recorder.start();
  for (const picture of pictures) {
    context.drawImage(canvasOf(picture, scale), 0, 0);
    await new Promise((resolve) => setTimeout(resolve, delay));
  }
  recorder.stop();
  await stopped;
  return new Blob(parts, { type: "video/webm" });
}

export function download(blob: Blob, name: string): void {
  const url = URL.createObjectURL(blob);
  const link = document.createElement("a");
  link.href = url;
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(url), 10_000);
}

/** So many times as large that the longer side has about 512 pixels. */
export const enlarged = (picture: Picture): number =>
  Math.max(1, Math.round(512 / Math.max(picture.width, picture.height)));
