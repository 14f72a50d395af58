/** Compare: another run at the code of the same image, under the same brush. */
import type { App } from "../app";
import { el, note, section, uniqueId } from "../dom";

export function comparePanel(app: App): HTMLElement {
  const id = uniqueId();
  const select = el("select", {
    id,
    change: () =>
      app.change(select.value ? `Compared with ${select.value}` : "Comparison closed", {
        compare: select.value || null,
      }),
  });
  const alone = note(
    "There is one run here. Give ",
    el("code", {}, "sosvae edit"),
    " two runs, or a folder of runs, to compare them.",
  );
  const others = (): string[] =>
    app.source.settings.runs
      .filter((run) => run.name !== app.doc.run && run.shape.join() === runOf(app)?.shape.join())
      .map((run) => run.name);
  app.listen(() => {
    const names = others();
    if (
      select.options.length !== names.length + 1 ||
      [...select.options].slice(1).some((o, i) => o.value !== names[i])
    ) {
      select.replaceChildren(
        el("option", { value: "" }, "nothing"),
        ...names.map((name) => el("option", { value: name }, name)),
      );
    }
    select.value = app.doc.compare ?? "";
    select.disabled = names.length === 0;
    alone.hidden = names.length > 0;
  });
  return el(
    "div",
    {},
    section(
      "Beside it",
      el("div", { class: "row" }, el("label", { for: id }, "Run"), select),
      alone,
      note(
        "Both see the same image: a held-out one is encoded by each; of anything else the second run encodes the first one's mean. Paint in either, and both follow. A model of independent pixels changes only where you paint.",
      ),
    ),
  );
}

const runOf = (app: App): { shape: number[] } | undefined =>
  app.source.settings.runs.find((run) => run.name === app.doc.run);
