/** What the server works out where the page does not: images under pins, by `p.condition`. */
import type { Loaded, Picture, Pinned, SlotName } from "../engine/engine";
import { pictureOf } from "../engine/colours";
import { Parameters } from "../maths/parameters";
import type { Code, View } from "../types";
import { otherCode, type App } from "./app";
import { Refused } from "./source";

export class Remote {
  /** log-density of what is shown, of a distribution that only the server knows. */
  logDensity: number | null = null;
  private readonly overridden: Record<SlotName, boolean> = { main: false, other: false };

  constructor(private readonly app: App) {}

  /** Who is asked for what pins leave of the main picture. */
  get conditions(): boolean {
    return this.app.loaded?.conditions === "server";
  }

  /** Brings the pictures that the server has to work out up to the state. */
  async update(): Promise<void> {
    const { app } = this;
    this.logDensity = null;
    for (const [slot, loaded] of [
      ["main", app.loaded],
      ["other", app.loadedOther],
    ] as [SlotName, Loaded | null][]) {
      if (loaded?.conditions === "server") await this.updateSlot(slot, loaded);
    }
  }

  private async updateSlot(slot: SlotName, loaded: Loaded): Promise<void> {
    const { app } = this;
    const { doc } = app;
    const pinned = await app.engine.ask<Pinned>({ type: "pinned", slot });
    const needed = pinned.indices.length > 0 || (loaded.where === "server" && doc.view.mode === "sample");
    if (app.source.isFile || (!needed && !this.overridden[slot])) return;
    let buffer: ArrayBuffer | null = null;
    if (needed) {
      try {
        buffer = await this.conditional(slot, doc.view, pinned);
      } catch (error) {
        app.fail(error);
      }
      if (app.doc !== doc) return;
    }
    this.overridden[slot] = buffer !== null;
    if (buffer && slot === "main") this.logDensity = Parameters.read(buffer).header["log_density"] as number;
    await app.engine.ask({ type: "override", slot, buffer });
    app.requestFrame();
  }

  /** A thumbnail of the main picture under its pins. */
  async thumbnail(view: View): Promise<Picture> {
    const { app } = this;
    if (app.source.isFile) throw new Refused("this needs the server");
    const pinned = await app.engine.ask<Pinned>({ type: "pinned", slot: "main" });
    const { loc, channels, width, height } = Parameters.read(await this.conditional("main", view, pinned));
    const rgba = new Uint8ClampedArray(4 * width * height);
    pictureOf(loc, channels, rgba);
    return { width, height, rgba };
  }

  private conditional(slot: SlotName, view: View, pinned: Pinned): Promise<ArrayBuffer> {
    const { doc, source } = this.app;
    const [run, full] = slot === "main" ? [doc.run, doc.code] : [doc.compare, otherCode(doc)];
    const { label: _, ...code } = full as Code & { label?: string };
    return source.condition({
      run,
      code,
      ...pinned,
      scales: view.scales,
      seed: view.mode === "sample" ? view.seed : null,
      temperature: [view.globalTemperature, view.localTemperature],
    });
  }
}
