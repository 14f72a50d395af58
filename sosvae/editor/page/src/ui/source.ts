/** Where parameters come from: a server, or this very file. */
import { meanOf, readContainer, type Mean } from "../maths/container";
import type { Code, RunInfo } from "../types";

export interface Settings {
  mode: "server" | "file";
  runs: RunInfo[];
  /** Of a file: the codes that are in it. */
  codes?: Code[];
}

export class Refused extends Error {}

/** Parameters that are on their way. */
interface Asked {
  buffer: Promise<ArrayBuffer>;
  mean?: Mean;
  onMean?: (mean: Mean) => void;
}

export class Source {
  readonly settings: Settings;
  onState: (reachable: boolean, why: string) => void = () => {};
  private readonly token = new URLSearchParams(location.search).get("token") ?? "";
  private readonly kept = new Map<string, ArrayBuffer>();
  private readonly asked = new Map<string, Asked>();
  private reachable = true;
  /** Half the bytes where they have a network to cross. */
  private readonly precision = ["127.0.0.1", "localhost", "[::1]"].includes(location.hostname) ? "float32" : "float16";

  constructor() {
    this.settings = JSON.parse(document.getElementById("settings")!.textContent!) as Settings;
  }

  get isFile(): boolean {
    return this.settings.mode === "file";
  }

  /**
   * Parameters of a run at a code; those seen lately are there without a server.
   *
   * `onMean` gets the mean as soon as it has come: the factor, which is R times as large, is still on its way.
   */
  parameters(run: string, code: Code, onMean?: (mean: Mean) => void): Promise<ArrayBuffer> {
    const key = JSON.stringify([run, code]);
    const kept = this.kept.get(key);
    if (kept) return Promise.resolve(kept);
    let asked = this.asked.get(key);
    if (!asked) {
      asked = { buffer: this.isFile ? this.embedded(run, code) : this.decoded(key, run, code) };
      this.asked.set(key, asked);
      asked.buffer
        .then((buffer) => this.keep(key, buffer))
        .catch(() => {}) // whoever waits for it says so
        .finally(() => this.asked.delete(key));
    }
    if (onMean) {
      if (asked.mean) onMean(asked.mean);
      else asked.onMean = onMean;
    }
    return asked.buffer;
  }

  private keep(key: string, buffer: ArrayBuffer): void {
    this.kept.set(key, buffer);
    // 32 codes, or a quarter of a gigabyte of large ones.
    const most = Math.max(2, Math.min(32, Math.floor(2 ** 28 / buffer.byteLength)));
    while (this.kept.size > most) this.kept.delete(this.kept.keys().next().value!);
  }

  private async embedded(run: string, code: Code): Promise<ArrayBuffer> {
    const r = this.settings.runs.findIndex((info) => info.name === run);
    const wanted = code.kind === "mean of" ? code.code : code; // the export has put the same image there
    const c = this.settings.codes!.findIndex((known) => JSON.stringify(known) === JSON.stringify(wanted));
    const find = (): Element | null => document.querySelector(`script[data-parameters="${r}-${c}"]`);
    // The first code stands before the program; a large file's others may still be on their way.
    if (!find() && document.readyState === "loading") {
      await new Promise((resolve) => document.addEventListener("DOMContentLoaded", resolve, { once: true }));
    }
    const block = find();
    if (!block) throw new Refused("This file holds a few codes only; others need `sosvae edit` and its server.");
    const text = atob(block.textContent!);
    const bytes = new Uint8Array(text.length);
    for (let i = 0; i < text.length; i++) bytes[i] = text.charCodeAt(i);
    return bytes.buffer;
  }

  private async decoded(key: string, run: string, code: Code): Promise<ArrayBuffer> {
    const { label: _, ...bare } = code as Code & { label?: string };
    const body = JSON.stringify({ run, code: bare, precision: this.precision });
    const answer = await this.request("api/decode", { method: "POST", body });
    const size = Number(answer.headers.get("content-length"));
    // A proxy that compresses says another length: then all of it is waited for.
    if (!answer.body || !size || answer.headers.has("content-encoding")) return answer.arrayBuffer();
    const bytes = new Uint8Array(size);
    const reader = answer.body.getReader();
    let at = 0;
    for (let part = await reader.read(); !part.done; part = await reader.read()) {
      bytes.set(part.value, at);
      at += part.value.length;
      const asked = this.asked.get(key);
      if (asked && !asked.mean) {
        const mean = meanOf(bytes.subarray(0, at));
        if (mean) {
          asked.mean = mean;
          asked.onMean?.(mean);
        }
      }
    }
    if (at !== size) throw new Refused("the server stopped in the middle of an answer");
    return bytes.buffer;
  }

  /** Parameters at the code of an image file. */
  async encode(run: string, file: Blob): Promise<ArrayBuffer> {
    return (
      await this.request(`api/encode?run=${encodeURIComponent(run)}&precision=${this.precision}`, {
        method: "POST",
        body: file,
      })
    ).arrayBuffer();
  }

  /** An upload is known under its code from now on, with the image that it came from. */
  remember(run: string, code: Code, buffer: ArrayBuffer): void {
    this.keep(JSON.stringify([run, code]), buffer);
  }

  async heldout(run: string, count: number): Promise<{ indices: number[]; shape: number[]; bytes: Uint8Array }> {
    const answer = await this.request(`api/heldout?run=${encodeURIComponent(run)}&count=${count}`);
    const { header, arrays, shapes } = readContainer(await answer.arrayBuffer());
    return {
      indices: header["indices"] as number[],
      shape: shapes.get("images")!,
      bytes: arrays.get("images") as Uint8Array,
    };
  }

  async condition(body: unknown): Promise<ArrayBuffer> {
    return (await this.request("api/condition", { method: "POST", body: JSON.stringify(body) })).arrayBuffer();
  }

  async save(run: string, kind: "png" | "json", body: Blob): Promise<string> {
    const answer = await this.request(`api/save?run=${encodeURIComponent(run)}&kind=${kind}`, { method: "POST", body });
    return ((await answer.json()) as { file: string }).file;
  }

  private async request(address: string, init: RequestInit = {}): Promise<Response> {
    if (this.isFile) throw new Refused("This needs `sosvae edit` and its server.");
    let answer: Response;
    try {
      answer = await fetch(address, { ...init, headers: { "x-token": this.token } });
    } catch {
      this.lost("The server does not answer. What is loaded goes on working; new codes wait until it is back.");
      throw new Refused("the server does not answer");
    }
    if (answer.ok) {
      this.found();
      return answer;
    }
    const why = await answer.text();
    if (answer.status === 403) this.lost("The server was started anew: open the address that it printed.");
    throw new Refused(why || `the server says ${answer.status}`);
  }

  private found(): void {
    if (!this.reachable) this.onState(true, "");
    this.reachable = true;
  }

  private lost(why: string): void {
    this.onState(false, why);
    if (this.reachable) void this.await();
    this.reachable = false;
  }

  /** Asks until the server is back. */
  private async await(): Promise<void> {
    do {
      await new Promise((resolve) => setTimeout(resolve, 1500));
      try {
        await this.request("api/health");
      } catch {
        continue;
      }
    } while (!this.reachable);
  }
}
