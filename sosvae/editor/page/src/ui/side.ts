/** The panels, one at a time. */
import type { App } from "./app";
import { el } from "./dom";
import { codesPanel } from "./panels/codes";
import { comparePanel } from "./panels/compare";
import { componentsPanel } from "./panels/components";
import { editPanel } from "./panels/edit";
import { interpolatePanel } from "./panels/interpolate";
import { lookPanel } from "./panels/look";
import { samplePanel } from "./panels/sample";
import { savePanel } from "./panels/save";

const PANELS: [string, string, (app: App) => HTMLElement][] = [
  ["codes", "Codes", codesPanel],
  ["edit", "Edit", editPanel],
  ["sample", "Sample", samplePanel],
  ["components", "Components", componentsPanel],
  ["interpolate", "Interpolate", interpolatePanel],
  ["look", "Look", lookPanel],
  ["compare", "Compare", comparePanel],
  ["save", "Save", savePanel],
];

export function sidePanel(app: App): HTMLElement {
  const tabs = PANELS.map(([id, name]) =>
    el(
      "button",
      {
        type: "button",
        role: "tab",
        id: `tab-${id}`,
        "aria-controls": `panel-${id}`,
        click: () => app.setPrefs({ panel: id, sheet: true }),
      },
      name,
    ),
  );
  const bodies = PANELS.map(([id, , make]) =>
    el(
      "div",
      {
        role: "tabpanel",
        id: `panel-${id}`,
        "aria-labelledby": `tab-${id}`,
        class: "body",
        tabindex: 0,
      },
      make(app),
    ),
  );
  const list = el("div", { class: "tabs", role: "tablist", "aria-label": "Panels" }, ...tabs);
  list.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    const at = tabs.indexOf(document.activeElement as HTMLButtonElement);
    if (!step || at < 0) return;
    event.preventDefault();
    const next = (at + step + tabs.length) % tabs.length;
    app.setPrefs({ panel: PANELS[next]![0] });
    tabs[next]!.focus();
  });
  const handle = el("button", {
    type: "button",
    class: "handle",
    "aria-label": "Show or hide the panel",
    click: () => app.setPrefs({ sheet: !app.prefs.sheet }),
  });
  const aside = el("aside", { class: "side", "aria-label": "Panels" }, handle, list, ...bodies);
  let shown = "";
  app.listen(() => {
    const known = PANELS.some(([id]) => id === app.prefs.panel) ? app.prefs.panel : "codes";
    aside.classList.toggle("folded", !app.prefs.sheet);
    handle.setAttribute("aria-expanded", String(app.prefs.sheet));
    PANELS.forEach(([id], i) => {
      const on = id === known;
      tabs[i]!.setAttribute("aria-selected", String(on));
      tabs[i]!.tabIndex = on ? 0 : -1;
      bodies[i]!.hidden = !on;
    });
    if (shown !== known) {
      shown = known;
      tabs[PANELS.findIndex(([id]) => id === known)]!.scrollIntoView?.({ block: "nearest", inline: "nearest" });
      app.engine.forget("thumbnail");
      if (app.loaded) app.refresh(); // the panel's pictures come when the hand rests
    }
  });
  return aside;
}
