/** The mathematics without the page. */
import { logDensity } from "./maths/density";
import { Parameters } from "./maths/parameters";
import { Pins } from "./maths/pins";
import { posteriorOf } from "./maths/posteriors";
import { chiSquare, normals } from "./maths/random";
import { slerp } from "./maths/slerp";
import { Stencil } from "./maths/stencil";

export const core = { chiSquare, logDensity, Parameters, Pins, posteriorOf, normals, slerp, Stencil };
