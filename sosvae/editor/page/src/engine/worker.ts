/** The engine in a worker: one message in, one out. */
import { Engine, type Request } from "./engine";

const engine = new Engine();

self.addEventListener("message", (event: MessageEvent<{ id: number; request: Request }>) => {
  const { id, request } = event.data;
  try {
    const result = engine.handle(request);
    postMessage({ id, result }, { transfer: transferable(result) });
  } catch (error) {
    postMessage({ id, error: error instanceof Error ? error.message : String(error) });
  }
});

/** Pictures change hands instead of being copied. */
function transferable(result: unknown): ArrayBuffer[] {
  const buffers: ArrayBuffer[] = [];
  const visit = (value: unknown, depth: number): void => {
    if (value instanceof Uint8ClampedArray || value instanceof Uint8Array) buffers.push(value.buffer as ArrayBuffer);
    else if (value && typeof value === "object" && depth < 2) Object.values(value).forEach((v) => visit(v, depth + 1));
  };
  visit(result, 0);
  return buffers;
}
