/** Bundles the page into ../static: a program with its worker inside, a style sheet, and the markup. */
import { build } from "esbuild";
import { copyFile, mkdir } from "node:fs/promises";
import path from "node:path";
import { fileURLToPath } from "node:url";

const here = path.dirname(fileURLToPath(import.meta.url));
const out = path.join(here, process.argv[2] ?? "../static");

const common = {
  absWorkingDir: here,
  bundle: true,
  minify: true,
  format: "iife",
  target: ["es2022"],
  charset: "utf8",
  legalComments: "inline",
  logLevel: "warning",
};

/** `import program from "worker:./worker"` is the text of that module, bundled. */
const worker = {
  name: "worker",
  setup(plugin) {
    plugin.onResolve({ filter: /^worker:/ }, (found) => ({
      path: path.join(found.resolveDir, found.path.slice("worker:".length) + ".ts"),
      namespace: "worker",
    }));
    plugin.onLoad({ filter: /.*/, namespace: "worker" }, async ({ path: entry }) => {
      const { outputFiles } = await build({ ...common, entryPoints: [entry], write: false });
      return { contents: outputFiles[0].text, loader: "text" };
    });
  },
};

await mkdir(out, { recursive: true });
await build({ ...common, entryPoints: ["src/page.ts"], outfile: path.join(out, "page.js"), plugins: [worker] });
await build({ ...common, entryPoints: ["src/page.css"], outfile: path.join(out, "page.css") });
await copyFile(path.join(here, "src/page.html"), path.join(out, "page.html"));
