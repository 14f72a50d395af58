/** The state and what changes it. Panels listen; none of them holds state of its own that undo would miss. */
import type { Mean } from "../maths/container";
import { pictureOf } from "../engine/colours";
import { LIVE, PATIENT } from "../maths/sparse";
import { EngineClient } from "../engine/client";
import type { Frame, Loaded, Picture, Request, Stats } from "../engine/engine";
import { START_VIEW, START_WALK, type Code, type Doc, type Stroke, type View } from "../types";
import { History } from "./history";
import { loadPrefs, savePrefs, type Prefs } from "./prefs";
import { Remote } from "./remote";
import { Refused, type Source } from "./source";

export interface SeenCode {
  run: string;
  code: Code;
}

export class App {
  readonly engine = new EngineClient();
  readonly prefs: Prefs = loadPrefs();
  readonly history: History;
  readonly remote = new Remote(this);
  /** Products that conditioning may take in the page: fewer where there is a server to ask. */
  private readonly limit: number;
  /** The state that is shown: the history's, or one with a stroke that is being drawn. */
  doc: Doc;
  live: Stroke | null = null;
  loaded: Loaded | null = null;
  loadedOther: Loaded | null = null;
  frame: Frame | null = null;
  stats: Stats | null = null;
  /** The state that `stats` and what the server works out are of. */
  rested: Doc | null = null;
  seen: SeenCode[] = [];
  /** Where covariances are to, as a pixel of the image. */
  pointer = { x: 0, y: 0 };
  holdingBefore = false;
  busy = false;
  /** Milliseconds from opening the page to its first picture. */
  firstImage = 0;
  /** The same to the first picture that can be painted on. */
  ready = 0;
  private readonly listeners: (() => void)[] = [];
  private readonly frameListeners: (() => void)[] = [];
  private shownKeys = { main: "", other: "" };
  private strokeIds = 0;
  private restTimer = 0;
  private loading: Promise<void> = Promise.resolve();
  onMessage: (text: string) => void = () => {};

  constructor(readonly source: Source) {
    this.limit = source.isFile ? PATIENT : LIVE;
    const { runs, codes } = source.settings;
    const code: Code = codes?.[0] ?? { kind: "seed", seed: 0 };
    this.doc = { run: runs[0]!.name, code, view: START_VIEW, strokes: [], compare: null, walk: START_WALK };
    this.history = new History(this.doc);
    this.engine.onFrame = (frame) => {
      this.showFrame(frame);
      this.ready ||= performance.now();
    };
  }

  listen(listener: () => void): void {
    this.listeners.push(listener);
  }

  onFrame(listener: () => void): void {
    this.frameListeners.push(listener);
  }

  get channels(): number {
    return this.loaded?.shape[0] ?? 1;
  }

  // --- Changes ---------------------------------------------------------------------------------------------

  /** A new state. Changes under one `key` are one step of undo until `seal` is called. */
  change(label: string, patch: Partial<Doc>, key: string | null = null): void {
    this.doc = { ...this.doc, ...patch };
    this.history.push(label, this.doc, key);
    this.refresh();
  }

  view(label: string, patch: Partial<View>, key: string | null = null): void {
    this.change(label, { view: { ...this.doc.view, ...patch } }, key);
  }

  seal = (): void => {
    this.history.seal();
    this.notify();
  };

  undo(): void {
    this.goTo(this.history.index - 1);
  }

  redo(): void {
    this.goTo(this.history.index + 1);
  }

  goTo(index: number): void {
    if (this.live) return;
    if (!this.history.go(index)) return;
    this.doc = this.history.doc;
    this.refresh();
  }

  setPrefs(patch: Partial<Prefs>): void {
    Object.assign(this.prefs, patch);
    savePrefs(this.prefs);
    if ("show" in patch) this.refresh();
    else this.notify();
  }

  openCode(code: Code, label: string, key: string | null = null): void {
    this.change(label, { code }, key);
  }

  // --- Strokes ---------------------------------------------------------------------------------------------

  newStroke(points: number[], patch: Partial<Stroke> = {}): Stroke {
    const { tool, shape, colour, tau, channels, mirror } = this.prefs;
    const stroke: Stroke = {
      id: ++this.strokeIds,
      tool,
      shape,
      points,
      tau,
      mirror,
      colour: colour.slice(0, this.channels),
      channels: this.channels === 1 ? 1 : channels,
      ...patch,
    };
    if (stroke.tool === "pin" || stroke.tool === "recolour") stroke.view = this.doc.view;
    return stroke;
  }

  begin(stroke: Stroke): void {
    this.live = stroke;
    this.doc = { ...this.doc, strokes: [...this.doc.strokes, stroke] };
    if (this.prefs.live && stroke.shape === "brush") this.requestFrame();
  }

  /** The stroke that is being drawn has grown. */
  grow(points: number[]): void {
    if (!this.live) return;
    for (const value of points) this.live.points.push(value);
    if (this.prefs.live && this.live.shape === "brush") this.requestFrame();
  }

  end(keep = true): void {
    const stroke = this.live;
    if (!stroke) return;
    this.live = null;
    if (keep) this.history.push(describe(stroke), this.doc);
    else this.doc = this.history.doc;
    this.refresh();
  }

  addStroke(stroke: Stroke): void {
    this.change(describe(stroke), { strokes: [...this.doc.strokes, stroke] });
  }

  setTau(id: number, tau: number): void {
    const strokes = this.doc.strokes.map((stroke) => (stroke.id === id ? { ...stroke, tau } : stroke));
    this.change("How firmly a stroke is meant", { strokes }, `tau ${id}`);
  }

  removeStroke(id: number): void {
    this.change("Stroke removed", { strokes: this.doc.strokes.filter((stroke) => stroke.id !== id) });
  }

  /** A whole state from a file or a link, its strokes under new numbers. */
  restore(doc: Doc, label: string): void {
    const strokes = doc.strokes.map((stroke) => ({ ...stroke, id: ++this.strokeIds }));
    const known = this.source.settings.runs.map((run) => run.name);
    const run = known.includes(doc.run) ? doc.run : this.doc.run;
    const compare = doc.compare && known.includes(doc.compare) ? doc.compare : null;
    this.change(label, { ...doc, run, compare, strokes });
  }

  // --- What follows from the state -------------------------------------------------------------------------

  refresh(): void {
    const { doc } = this;
    const main = JSON.stringify([doc.run, doc.code]);
    const other = doc.compare ? JSON.stringify([doc.compare, otherCode(doc)]) : "";
    if (main !== this.shownKeys.main || other !== this.shownKeys.other) {
      const changed = { main: main !== this.shownKeys.main, other: other !== this.shownKeys.other };
      this.shownKeys = { main, other };
      this.loading = this.loading.then(() => this.load(changed, { main, other }));
    } else {
      this.requestFrame();
      this.atRest();
    }
    this.notify();
  }

  private async load(changed: { main: boolean; other: boolean }, keys: { main: string; other: string }): Promise<void> {
    if (keys.main !== this.shownKeys.main || keys.other !== this.shownKeys.other) {
      // Overtaken: what was not loaded here has to be loaded there.
      this.pending.main ||= changed.main;
      this.pending.other ||= changed.other;
      return;
    }
    const { doc } = this;
    const want = { main: changed.main || this.pending.main, other: changed.other || this.pending.other };
    this.pending = { main: false, other: false };
    this.busy = true;
    this.notify();
    try {
      if (want.main) {
        const buffer = await this.source.parameters(doc.run, doc.code, (mean) => this.preview(mean));
        this.loaded = await this.engine.ask<Loaded>({ type: "load", slot: "main", buffer, limit: this.limit });
        this.remember({ run: doc.run, code: doc.code });
      }
      if (want.other && doc.compare) {
        const buffer = await this.source.parameters(doc.compare, otherCode(doc));
        this.loadedOther = await this.engine.ask<Loaded>({ type: "load", slot: "other", buffer, limit: this.limit });
      } else if (!doc.compare && this.loadedOther) {
        this.loadedOther = null;
        await this.engine.ask({ type: "drop", slot: "other" });
      }
    } catch (error) {
      this.fail(error);
      this.shownKeys = { main: "", other: "" };
      if (this.history.doc === doc && this.history.index > 0) {
        // The picture is still that of the state before: so is the state, and the failed step is gone.
        this.history.go(this.history.index - 1);
        this.history.entries.length = this.history.index + 1;
        this.doc = this.history.doc;
        if (this.loaded) {
          this.shownKeys = { main: JSON.stringify([this.doc.run, this.doc.code]), other: this.shownOther() };
        } else {
          this.refresh(); // a link that could not be followed: there is no picture yet
          return;
        }
      }
    }
    this.busy = false;
    this.requestFrame();
    this.atRest();
    this.notify();
  }

  /** The mean of the first code, while its factor is on its way: the picture, where nothing else is asked for. */
  private preview({ shape: [channels, height, width], loc }: Mean): void {
    const { doc, prefs } = this;
    if (this.frame || doc.strokes.length > 0 || doc.view.mode !== "mean" || prefs.show !== "image") return;
    const rgba = new Uint8ClampedArray(4 * width * height);
    pictureOf(loc, channels, rgba);
    this.showFrame({ main: { width, height, rgba }, mask: new Uint8Array(width * height), pinned: 0, milliseconds: 0 });
  }

  private showFrame(frame: Frame): void {
    this.frame = frame;
    this.frameListeners.forEach((listener) => listener());
    this.firstImage ||= performance.now();
  }

  private pending = { main: false, other: false };

  private shownOther(): string {
    return this.doc.compare ? JSON.stringify([this.doc.compare, otherCode(this.doc)]) : "";
  }

  fail(error: unknown): void {
    this.onMessage(error instanceof Refused || error instanceof Error ? error.message : String(error));
  }

  private remember(seen: SeenCode): void {
    const key = JSON.stringify(seen);
    if (seen.code.kind === "mix") return; // a slider passes hundreds
    this.seen = [seen, ...this.seen.filter((other) => JSON.stringify(other) !== key)].slice(0, 24);
  }

  requestFrame(): void {
    if (!this.loaded) return;
    const { loaded, pointer } = this;
    const [, height, width] = loaded.shape;
    const x = Math.max(0, Math.min(width - 1, pointer.x));
    const y = Math.max(0, Math.min(height - 1, pointer.y));
    const show = this.holdingBefore ? "before" : this.prefs.show;
    // A lasso is nothing until it is closed, and so is a stroke where the picture waits for the button's release.
    const hidden = this.live && (this.live.shape === "lasso" || !this.prefs.live);
    const strokes = hidden ? this.doc.strokes.slice(0, -1) : this.doc.strokes;
    this.engine.frame({ view: this.doc.view, strokes, show, at: y * width + x });
  }

  /** What takes longer than a frame waits until the hand rests. */
  private atRest(): void {
    clearTimeout(this.restTimer);
    this.restTimer = window.setTimeout(async () => {
      if (this.live || !this.loaded) return;
      const { doc } = this;
      try {
        await this.remote.update();
        this.stats = await this.engine.ask<Stats | null>({ type: "stats", view: this.doc.view });
      } catch (error) {
        this.fail(error);
      }
      this.rested = doc;
      this.restListeners.forEach((listener) => listener());
    }, 120);
  }

  /** A small picture; under pins that only the server can condition on, by the server. */
  thumbnail(request: Extract<Request, { type: "thumbnail" }>): Promise<Picture> {
    const remote = this.remote.conditions && request.pinned && (this.frame?.pinned ?? 0) > 0 && !request.epsilon;
    return remote ? this.remote.thumbnail(request.view) : this.engine.ask<Picture>(request);
  }

  private readonly restListeners: (() => void)[] = [];

  /** Called when the state has not changed for a moment: time for thumbnails. */
  onRest(listener: () => void): void {
    this.restListeners.push(listener);
  }

  notify(): void {
    this.listeners.forEach((listener) => listener());
  }
}

/** The other run sees the same image: held-out images have a number, everything else is encoded anew. */
export function otherCode(doc: Doc): Code {
  return doc.code.kind === "heldout" ? doc.code : { kind: "mean of", run: doc.run, code: doc.code };
}

function describe(stroke: Stroke): string {
  const what = { paint: "Painted", recolour: "Recoloured", pin: "Pinned", erase: "Unpinned" }[stroke.tool];
  const how = stroke.shape === "lasso" ? " an area" : stroke.shape === "all" ? " everything" : "";
  return what + how + (stroke.tau > 0 ? `, ±${Math.round(255 * stroke.tau)}` : "");
}
