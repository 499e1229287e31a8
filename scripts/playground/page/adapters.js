// The LoRAs and ControlNets in data/: a checkbox and a strength for each, and for a ControlNet the image it follows.

import { at, make, pictureOf, say } from "./dom.js";

export class Adapters {
  // `lines()` gives the lines of the drawing at the top of the page as a data URL, or null.
  constructor(lines) {
    this.lines = lines;
    this.rows = { loras: new Map(), controls: new Map() };
  }

  know(loras, controls) {
    for (const [kind, files] of Object.entries({ loras, controls })) {
      const before = this.rows[kind];
      const row = ({ name, file }) => before.get(name) ?? (kind === "loras" ? adapterRow(name, file, kind) : this.controlRow(name, file));
      this.rows[kind] = new Map(files.map((one) => [one.name, row(one)]));
      at(kind).replaceChildren(...[...this.rows[kind].values()].map(({ element }) => element));
      at(`${kind}-none`).hidden = files.length > 0;
    }
  }

  controlRow(name, file) {
    const row = adapterRow(name, file, "controls");
    const image = make("img", { alt: `The image that ${name} follows`, hidden: true });
    const choose = make("input", { type: "file", accept: "image/png,image/jpeg,image/webp" });
    choose.setAttribute("aria-label", `An image for ${name} to follow`);
    const drawing = make("button", { type: "button", className: "quiet", textContent: "Use my lines" });
    for (const control of [choose, drawing]) control.setAttribute("aria-describedby", "controls-help");
    drawing.title = "Takes the lines from the drawing at the top of this page.";
    row.use = (url) => {
      row.url = image.src = url;
      image.hidden = false;
      row.box.checked = true;
    };
    choose.addEventListener("change", async () => {
      try {
        if (choose.files[0]) row.use(await pictureOf(choose.files[0]));
      } catch (error) {
        say("draw-error", error.message);
      }
    });
    drawing.addEventListener("click", () => row.use(this.lines()));
    row.element.append(make("div", { className: "row" }, image, drawing, choose));
    return row;
  }

  // Throws an Error with a sentence if something is missing.
  read() {
    const chosen = (kind) => [...this.rows[kind]].filter(([, row]) => row.box.checked);
    const strength = (row) => Number(row.range.value);
    const loras = chosen("loras").map(([name, row]) => ({ name, strength: strength(row) }));
    const control = chosen("controls").map(([net, row]) => {
      if (!row.url) throw new Error(`${net} should have an image to follow: use your lines, or choose a file.`);
      return { net, image: row.url, strength: strength(row) };
    });
    return { loras, control: control.length ? control : null };
  }

  // Restores what `read` gave.
  write({ loras = [], control }) {
    for (const rows of Object.values(this.rows)) for (const row of rows.values()) row.box.checked = false;
    for (const { name, strength } of loras) this.rows.loras.get(name)?.set(strength);
    for (const { net, image, strength } of control ?? []) {
      this.rows.controls.get(net)?.set(strength);
      this.rows.controls.get(net)?.use(image);
    }
    at("adapters").open ||= loras.length > 0 || Boolean(control);
  }
}

function adapterRow(name, file, kind) {
  const box = make("input", { type: "checkbox" });
  const range = make("input", { type: "range", min: 0, max: 2, step: 0.05, value: 1 });
  range.setAttribute("aria-label", `Strength of ${name}`);
  for (const control of [box, range]) control.setAttribute("aria-describedby", `${kind}-help`);
  const now = make("output", { textContent: "1.00" });
  const show = () => (now.textContent = Number(range.value).toFixed(2));
  range.addEventListener("input", show);
  const label = make("label", { title: file }, box, make("bdi", { textContent: name }));
  const element = make("li", {}, make("div", { className: "row" }, label, range, now));
  const set = (strength) => {
    box.checked = true;
    range.value = strength;
    show();
  };
  return { element, box, range, set, url: null };
}
