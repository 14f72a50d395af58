/** Small pictures to choose from. */
import type { Picture, Request } from "../../engine/engine";
import type { App } from "../app";
import { el } from "../dom";

export interface ThumbWanted {
  label: string;
  request: Extract<Request, { type: "thumbnail" }>;
  onPick?: () => void;
  pressed?: boolean;
}

/** A grid of thumbnails; `show` fills it one by one as the engine finds time. */
export class Thumbs {
  readonly element: HTMLElement;
  pictures: Picture[] = [];
  private run = 0;

  constructor(
    private readonly app: App,
    label: string,
    columns: number,
  ) {
    this.element = el("div", { class: "thumbs", role: "group", "aria-label": label });
    this.element.style.setProperty("--columns", String(columns));
  }

  async show(wanted: ThumbWanted[]): Promise<void> {
    const run = ++this.run;
    const cells = wanted.map(({ label, onPick, pressed }, i) => {
      const had = this.element.children[i]?.querySelector("canvas");
      const canvas = had ?? el("canvas", { "aria-hidden": "true" });
      return onPick
        ? el(
            "button",
            {
              type: "button",
              class: "thumb",
              "aria-label": label,
              title: label,
              click: onPick,
              "aria-pressed": pressed === undefined ? undefined : String(pressed),
            },
            canvas,
          )
        : el("div", { class: "thumb", role: "img", "aria-label": label }, canvas);
    });
    const focused = [...this.element.children].indexOf(document.activeElement as Element);
    this.element.replaceChildren(...cells);
    if (focused >= 0) (cells[focused] as HTMLElement | undefined)?.focus();
    const pictures: Picture[] = [];
    for (let i = 0; i < wanted.length; i++) {
      try {
        const picture = await this.app.thumbnail(wanted[i]!.request);
        if (run !== this.run) return;
        pictures.push(picture);
        drawInto(cells[i]!.querySelector("canvas")!, picture);
      } catch {
        return; // outdated: somebody asked for others
      }
    }
    this.pictures = pictures;
  }
}

export function drawInto(canvas: HTMLCanvasElement, picture: Picture): void {
  canvas.width = picture.width;
  canvas.height = picture.height;
  canvas.getContext("2d")!.putImageData(new ImageData(picture.rgba, picture.width, picture.height), 0, 0);
}

/** Bytes [C, H, W] as a picture. */
export function pictureOfBytes(bytes: ArrayLike<number>, channels: number, height: number, width: number): Picture {
  const plane = height * width;
  const rgba = new Uint8ClampedArray(4 * plane);
  for (let i = 0; i < plane; i++) {
    for (let c = 0; c < 3; c++) rgba[4 * i + c] = bytes[(channels === 3 ? c : 0) * plane + i]!;
    rgba[4 * i + 3] = 255;
  }
  return { width, height, rgba };
}
