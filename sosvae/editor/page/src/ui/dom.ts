/** Elements, and the few controls that the panels are made of. Every control has a label. */

type Props = Record<string, string | number | boolean | undefined | ((event: never) => void)>;

export function el<K extends keyof HTMLElementTagNameMap>(
  tag: K,
  props: Props = {},
  ...children: (Node | string | null | undefined)[]
): HTMLElementTagNameMap[K] {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(props)) {
    if (typeof value === "function") element.addEventListener(name, value as EventListener);
    else if (value === true) element.setAttribute(name, "");
    else if (value !== undefined && value !== false) element.setAttribute(name, String(value));
  }
  element.append(...children.filter((child): child is Node | string => child != null));
  return element;
}

let ids = 0;
export const uniqueId = (): string => `c${++ids}`;

export function button(label: string, onClick: () => void, props: Props = {}): HTMLButtonElement {
  return el("button", { type: "button", class: "button", click: onClick, ...props }, label);
}

/** A button that shows only an icon; the label is its name and its tooltip. */
export function iconButton(icon: string, label: string, onClick: () => void, props: Props = {}): HTMLButtonElement {
  const made = el("button", {
    type: "button",
    class: "icon",
    "aria-label": label,
    title: label,
    click: onClick,
    ...props,
  });
  made.append(iconElement(icon));
  return made;
}

const ICONS: Record<string, string> = {
  paint: "M4 20c3 0 5-1 5-3.5A2.5 2.5 0 0 0 6.5 14C4 14 4.500 18 4 20zM9 14 19 4a1.4 1.4 0 0 1 2 2L11 16",
  recolour: "M12 3c4 5 6 7.500 6 11a6 6 0 0 1-12 0c0-3.5 2-6 6-11zM12 20V8",
  pin: "M9 4h6l-1 6 3 3v2H7v-2l3-3zM12 15v6",
  erase: "m7 20-4-4L14 5l6 6-9 9zM9 10l6 6M11 20h9",
  lasso: "M12 5c5 0 8 2 8 5s-3 5-8 5-8-2-8-5 3-5 8-5zM7 14c-1 1-1 3 1 3s2 3 0 4",
  brush: "M12 4a8 8 0 1 1 0 16 8 8 0 0 1 0-16zM12 9.5a2.5 2.5 0 1 1 0 5 2.5 2.5 0 0 1 0-5z",
  picker: "m14 7 3 3M4 20l1-4 9-9 3 3-9 9zM15 6l2-2a1.5 1.5 0 0 1 3 3l-2 2",
  mirror: "M12 3v18M9 7 4 17h5zM15 7l5 10h-5z",
  undo: "M8 5 4 9l4 4M4 9h10a5 5 0 0 1 0 10h-3",
  redo: "m16 5 4 4-4 4M20 9H10a5 5 0 0 0 0 10h3",
  before: "M12 4v16M4 6h5v12H4M15 6h5v12h-5",
  theme: "M20 14A8 8 0 1 1 10 4a6.5 6.5 0 0 0 10 10z",
  plus: "M12 5v14M5 12h14",
  minus: "M5 12h14",
  fit: "M4 9V4h5M20 9V4h-5M4 15v5h5M20 15v5h-5",
  mask: "M4 4h4M12 4h4M20 4v4M20 12v4M20 20h-4M12 20H8M4 20v-4M4 12V8",
  dice: "M5 5h14v14H5zM9 9h.01M15 15h.01M15 9h.01M9 15h.01",
  reset: "M5 12a7 7 0 1 0 2-5L4 9M4 4v5h5",
  lock: "M7 11V8a5 5 0 0 1 10 0v3M5 11h14v9H5z",
  bin: "M4 7h16M9 7V4h6v3M6 7l1 13h10l1-13",
};

export function iconElement(name: string): SVGSVGElement {
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  svg.setAttribute("viewBox", "0 0 24 24");
  svg.setAttribute("aria-hidden", "true");
  const path = document.createElementNS("http://www.w3.org/2000/svg", "path");
  path.setAttribute("d", ICONS[name] ?? "");
  svg.append(path);
  return svg;
}

export interface Slider {
  element: HTMLElement;
  set(value: number): void;
}

export interface SliderOptions {
  label: string;
  min: number;
  max: number;
  step: number;
  value: number;
  /** Also as words beside it, where the number alone says little. */
  format?: (value: number) => string;
  onInput: (value: number) => void;
  onCommit?: () => void;
  /** The label is for those who listen: the row says it in another way. */
  quiet?: boolean;
}

/** A slider and a typed number for the same value. */
export function slider(options: SliderOptions): Slider {
  const { label, min, max, step, onInput, onCommit } = options;
  const id = uniqueId();
  const range = el("input", { type: "range", id, min, max, step, value: options.value, "aria-label": label });
  const number = el("input", {
    type: "number",
    min,
    max,
    step,
    value: options.value,
    "aria-label": `${label}, number`,
  });
  const words = el("output", { class: "words", for: id });
  const show = (value: number): void => {
    range.value = String(value);
    if (document.activeElement !== number) number.value = String(Number(value.toFixed(4)));
    words.textContent = options.format?.(value) ?? "";
    range.style.setProperty("--filled", `${(100 * (Number(range.value) - min)) / (max - min)}%`);
  };
  const take = (text: string): void => {
    const value = Number(text);
    if (text === "" || !Number.isFinite(value)) return;
    const within = Math.max(min, Math.min(max, value));
    show(within);
    onInput(within);
  };
  range.addEventListener("input", () => take(range.value));
  number.addEventListener("input", () => take(number.value));
  for (const input of [range, number]) input.addEventListener("change", () => onCommit?.());
  const element = el(
    "div",
    { class: options.quiet ? "slider quiet" : "slider" },
    options.quiet ? null : el("label", { for: id }, label),
    words,
    range,
    number,
  );
  show(options.value);
  return { element, set: show };
}

export interface Choice<T extends string> {
  element: HTMLElement;
  set(value: T): void;
}

/** One of a few, as buttons side by side. */
export function choice<T extends string>(label: string, options: [T, string][], onPick: (value: T) => void): Choice<T> {
  const buttons = options.map(([value, text]) =>
    el("button", { type: "button", role: "radio", "aria-checked": "false", click: () => onPick(value) }, text),
  );
  const element = el("div", { class: "choice", role: "radiogroup", "aria-label": label }, ...buttons);
  element.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
    const at = buttons.indexOf(document.activeElement as HTMLButtonElement);
    if (!step || at < 0) return;
    event.preventDefault();
    event.stopPropagation();
    const next = buttons[(at + step + buttons.length) % buttons.length]!;
    next.focus();
    next.click();
  });
  return {
    element,
    set(value) {
      buttons.forEach((made, i) => {
        const on = options[i]![0] === value;
        made.setAttribute("aria-checked", String(on));
        made.tabIndex = on ? 0 : -1;
      });
    },
  };
}

export function checkbox(
  label: string,
  onChange: (on: boolean) => void,
): { element: HTMLElement; set(on: boolean): void } {
  const input = el("input", { type: "checkbox", change: () => onChange(input.checked) });
  return {
    element: el("label", { class: "check" }, input, el("span", {}, label)),
    set: (on) => {
      input.checked = on;
    },
  };
}

export function section(title: string, ...children: (Node | string | null)[]): HTMLElement {
  const id = uniqueId();
  return el("section", { "aria-labelledby": id }, el("h2", { id }, title), ...children);
}

export const note = (...text: (Node | string)[]): HTMLElement => el("p", { class: "note" }, ...text);
