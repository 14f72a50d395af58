/** The page's end of the engine: at most one request under way, the newest frame first, thumbnails when idle. */
import workerProgram from "worker:./worker";
import type { Show, Stroke, View } from "../types";
import { Engine, type Frame, type Grown, type Request } from "./engine";

interface Waiting {
  request: Request;
  resolve: (result: never) => void;
  reject: (error: Error) => void;
}

export interface FrameWanted {
  view: View;
  strokes: Stroke[];
  show: Show;
  at: number;
}

export class EngineClient {
  onFrame: (frame: Frame) => void = () => {};
  private readonly post: (id: number, request: Request) => void;
  private readonly queue: Waiting[] = [];
  private current: Waiting | null = null;
  private wanted: FrameWanted | null = null;
  private count = 0;
  /** How many numbers of each stroke's points the engine has. */
  private readonly known = new Map<number, number>();

  constructor() {
    this.post = this.inWorker() ?? this.inPage();
  }

  private inWorker(): ((id: number, request: Request) => void) | null {
    try {
      const url = URL.createObjectURL(new Blob([workerProgram], { type: "text/javascript" }));
      const worker = new Worker(url);
      worker.addEventListener("message", (event: MessageEvent) => this.answer(event.data));
      worker.addEventListener("error", (event) => this.answer({ id: this.count, error: event.message }));
      return (id, request) => worker.postMessage({ id, request });
    } catch {
      return null; // a browser that lets no file start a worker
    }
  }

  private inPage(): (id: number, request: Request) => void {
    const engine = new Engine();
    return (id, request) =>
      setTimeout(() => {
        try {
          this.answer({ id, result: engine.handle(request) });
        } catch (error) {
          this.answer({ id, error: String(error) });
        }
      });
  }

  /** Asks for a frame; of several asked for in a hurry only the last one is made. */
  frame(wanted: FrameWanted): void {
    this.wanted = wanted;
    this.next();
  }

  ask<T>(request: Request, first = false): Promise<T> {
    return new Promise((resolve, reject) => {
      const waiting = { request, resolve: resolve as (result: never) => void, reject };
      if (first) this.queue.unshift(waiting);
      else this.queue.push(waiting);
      this.next();
    });
  }

  /** Forgets thumbnails that nobody waits for any more. */
  forget(type: Request["type"]): void {
    for (let i = this.queue.length - 1; i >= 0; i--) {
      if (this.queue[i]!.request.type === type) this.queue.splice(i, 1)[0]!.reject(new Error("outdated"));
    }
  }

  private next(): void {
    if (this.current) return;
    const load = this.queue.findIndex((waiting) => waiting.request.type === "load" || waiting.request.type === "drop");
    if (load >= 0) this.start(this.queue.splice(load, 1)[0]!);
    else if (this.wanted) {
      const wanted = this.wanted;
      this.wanted = null;
      this.start({
        request: this.request(wanted),
        resolve: (frame: Frame) => this.onFrame(frame),
        reject: console.error,
      });
    } else if (this.queue.length) this.start(this.queue.shift()!);
  }

  private request({ view, strokes, show, at }: FrameWanted): Request {
    const fresh: Stroke[] = [];
    const grown: Grown[] = [];
    for (const stroke of strokes) {
      const had = this.known.get(stroke.id);
      if (had === undefined) fresh.push(stroke);
      else if (had < stroke.points.length) grown.push({ id: stroke.id, points: stroke.points.slice(had) });
      this.known.set(stroke.id, stroke.points.length);
    }
    const order = strokes.map(({ id, tau }) => ({ id, tau }));
    return { type: "frame", view, order, fresh, grown, show, at };
  }

  private start(waiting: Waiting): void {
    this.current = waiting;
    this.post(++this.count, waiting.request);
  }

  private answer(message: { id: number; result?: unknown; error?: string }): void {
    const waiting = this.current;
    this.current = null;
    if (waiting) {
      if (message.error !== undefined) waiting.reject(new Error(message.error));
      else waiting.resolve(message.result as never);
    }
    this.next();
  }
}
