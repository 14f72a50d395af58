/** The posterior of either kind of local part. */
import { DiagonalPosterior } from "./diagonal";
import type { Parameters } from "./parameters";
import type { Pins } from "./pins";
import type { Posterior } from "./posterior";
import { LIVE, SparsePosterior } from "./sparse";

/** @param limit see `SparsePosterior` */
export function posteriorOf(p: Parameters, pins: Pins, a: Float64Array | Float32Array, limit = LIVE): Posterior {
  return p.stencil ? new SparsePosterior(p, pins, a, limit) : new DiagonalPosterior(p, pins, a);
}
