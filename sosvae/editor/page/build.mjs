/**
 * Bundles the page into ../static: a program with its worker inside, a style sheet, and the markup.
 *
 *   node build.mjs            builds
 *   node build.mjs --check    builds elsewhere and fails where ../static is not the same, byte for byte
 */
import { build } from "esbuild";
import { copyFile, mkdtemp, readFile } from "node:fs/promises";
import { tmpdir } from "node:os";
import path from "node:path";
import { fileURLToPath } from "node:url";

const here = path.dirname(fileURLToPath(import.meta.url));
const shipped = path.join(here, "../static");
const FILES = ["page.html", "page.css", "page.js"];

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

async function buildInto(out) {
  // Whoever has the page has the licence of what is in it.
  const licence = (await readFile(path.join(here, "node_modules/gifenc/LICENSE.md"), "utf8")).trim();
  const banner = { js: `/*! Contains gifenc:\n${licence}\n*/` };
  await build({
    ...common,
    entryPoints: ["src/page.ts"],
    outfile: path.join(out, "page.js"),
    plugins: [worker],
    banner,
  });
  await build({ ...common, entryPoints: ["src/page.css"], outfile: path.join(out, "page.css") });
  await copyFile(path.join(here, "src/page.html"), path.join(out, "page.html"));
}

if (process.argv.includes("--check")) {
  const out = await mkdtemp(path.join(tmpdir(), "sosvae-page-"));
  await buildInto(out);
  for (const name of FILES) {
    const [made, kept] = await Promise.all([out, shipped].map((folder) => readFile(path.join(folder, name))));
    if (!made.equals(kept)) {
      console.error(`static/${name} is not what the sources make: npm run build`);
      process.exitCode = 1;
    }
  }
} else {
  await buildInto(shipped);
}
