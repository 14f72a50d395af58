/** Everything that was done, one whole state each: strokes, sliders, codes. States share what did not change. */
import type { Doc } from "../types";

export interface Entry {
  label: string;
  doc: Doc;
  time: number;
  /** Entries of one key follow each other as one, until they are sealed. */
  key: string | null;
}

export class History {
  readonly entries: Entry[];
  index = 0;

  constructor(doc: Doc) {
    this.entries = [{ label: "Opened", doc, time: Date.now(), key: null }];
  }

  get doc(): Doc {
    return this.entries[this.index]!.doc;
  }

  push(label: string, doc: Doc, key: string | null = null): void {
    const last = this.entries[this.index]!;
    this.entries.length = this.index + 1;
    if (key !== null && last.key === key) {
      last.doc = doc;
      return;
    }
    this.entries.push({ label, doc, time: Date.now(), key });
    this.index++;
  }

  /** What follows is an entry of its own, even under the same key. */
  seal(): void {
    this.entries[this.index]!.key = null;
  }

  go(index: number): boolean {
    const within = Math.max(0, Math.min(this.entries.length - 1, index));
    this.seal();
    const moved = within !== this.index;
    this.index = within;
    return moved;
  }
}
