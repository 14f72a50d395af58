/** The mathematics without the page. */
import { logDensity } from "./maths/density";
import { Parameters } from "./maths/parameters";
import { Pins } from "./maths/pins";
import { Posterior } from "./maths/posterior";
import { normals } from "./maths/random";
import { slerp } from "./maths/slerp";

export const core = { logDensity, Parameters, Pins, Posterior, normals, slerp };
