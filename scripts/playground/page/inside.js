// What the U-Net looked at for each word, and the feature maps of its stages.

import { at, make } from "./dom.js";
import { call } from "./server.js";

const GROUPS = { start: "The start of the prompt", end: "The end of the prompt, with the padding after it," };
const HINT = "Point at a word: the picture keeps its colours where the U-Net paid most attention to it.";
const BLOCK = 150; // pixels: the height of the largest feature maps in the drawing
const SVG = "http://www.w3.org/2000/svg";

// Fetches what was recorded of a finished run. It is kept with the run, because the server drops it after a while.
export async function loadInside(run, id) {
  if (!run.work.attention) return;
  const get = (what) => call("GET", `/api/jobs/${id}/${what}`).catch(() => null);
  [run.attention, run.features] = await Promise.all([get("attention"), get("features")]);
}

export class Words {
  constructor() {
    this.lit = at("lit");
    this.chosen = null;
    this.buttons = [];
  }

  show(run) {
    const { attention, result } = run ?? {};
    this.chosen = null;
    this.buttons = [];
    at("words").hidden = !attention;
    this.look(null);
    if (!attention) return at("looked").replaceChildren();
    this.place(attention.box, result);
    const most = Math.max(...attention.tokens.filter(({ id }) => id !== null).map(({ share }) => share)) || 1;
    this.buttons = attention.tokens.map((token, i) => this.button(token, most, attention.tokens[i + 1]));
    at("looked").replaceChildren(...this.buttons);
  }

  button(token, most, following) {
    const group = token.id === null;
    const weight = token.weight === 1 ? "" : ` × ${Number(token.weight.toPrecision(3))}`;
    const below = make("small", { textContent: group ? "tokens" : `${token.id}${weight}` });
    const button = make("button", { type: "button", className: "token" }, make("bdi", { textContent: token.text }), below);
    button.classList.toggle("group", group);
    button.classList.toggle("joined", token.joined);
    button.classList.toggle("ongoing", Boolean(following?.joined));
    button.style.setProperty("--share", group ? 0 : token.share / most);
    button.setAttribute("aria-pressed", "false");
    button.token = token;
    button.addEventListener("pointerenter", (event) => event.pointerType === "mouse" && this.look(button));
    button.addEventListener("pointerleave", (event) => event.pointerType === "mouse" && this.look(this.chosen));
    button.addEventListener("focus", () => button.matches(":focus-visible") && this.look(button));
    button.addEventListener("blur", () => this.look(this.chosen));
    button.addEventListener("click", () => this.choose(this.chosen === button ? null : button));
    return button;
  }

  choose(button) {
    this.chosen = button;
    for (const other of this.buttons) other.setAttribute("aria-pressed", String(other === button));
    this.look(button);
  }

  // The picture, of whatever step, keeps its colours where the token got attention.
  look(button) {
    at("picture").classList.toggle("looking", button !== null);
    this.lit.hidden = button === null;
    for (const other of this.buttons) other.classList.toggle("on", other === button);
    at("share").textContent = button ? says(button.token) : HINT;
    if (!button) return;
    this.lit.src = at("image").src;
    this.lit.classList.toggle("pixels", at("image").classList.contains("pixels"));
    for (const name of ["webkitMaskImage", "maskImage"]) this.lit.style[name] = `url("${button.token.map}")`;
  }

  // Where the maps lie: on all of the picture, or on the part that was repainted. CSS counts shares of what is left free.
  place(box, { width, height }) {
    const [left, top, right, bottom] = box ?? [0, 0, width, height];
    const [restX, restY] = [width - (right - left), height - (bottom - top)];
    const position = `${(100 * left) / Math.max(restX, 1)}% ${(100 * top) / Math.max(restY, 1)}%`;
    const size = `${100 - (100 * restX) / width}% ${100 - (100 * restY) / height}%`;
    for (const name of ["webkitMaskPosition", "maskPosition"]) this.lit.style[name] = position;
    for (const name of ["webkitMaskSize", "maskSize"]) this.lit.style[name] = size;
  }
}

// The U-Net to scale: one radio button for each stage, so that arrow keys go from one to the next.
export class Stages {
  constructor() {
    this.chosen = null;
    this.position = 0;
    at("stages").addEventListener("change", (event) => {
      this.chosen = event.target.value;
      this.showMap();
    });
    new ResizeObserver(() => this.connect()).observe(at("stages"));
  }

  show(run) {
    this.run = run;
    const features = run?.features;
    at("unet").hidden = !features?.length;
    if (!features?.length) return;
    const { stages } = features[0];
    const highest = Math.max(...stages.map(({ shape }) => shape[1]));
    if (!stages.some(({ name }) => name === this.chosen)) this.chosen = stages.at(-3).name; // large, and not yet noise
    at("stages").replaceChildren(...stages.map((stage) => block(stage, highest, stage.name === this.chosen)));
    this.connect();
    this.showMap();
  }

  // Follows the slider of the steps.
  move(position) {
    this.position = position;
    if (this.run?.features?.length) this.showMap();
  }

  showMap() {
    const frame = this.run.frame(this.position);
    const place = (one) => one.pass * 10000 + one.index;
    const now = frame ? place(frame.step) : Infinity;
    const kept = this.run.features.filter((one) => place(one) <= now).at(-1) ?? this.run.features[0];
    const { name, shape, image } = kept.stages.find((stage) => stage.name === this.chosen);
    at("feature").src = image;
    at("feature").alt = `The feature maps of ${name}`;
    at("feature-title").textContent = spoken(name);
    const steps = this.run.features.map((one) => one.index + 1).join(", ");
    at("feature-text").textContent =
      `${shape[0]} channels of ${shape[2]} × ${shape[1]}, in step ${kept.index + 1}. Positions with similar features have ` +
      `similar colours. Maps are kept of the steps ${steps}: move the slider of the steps to see another.`;
  }

  // The skip connections, as lines above the blocks.
  connect() {
    const blocks = [...at("stages").children];
    const centre = (name) => {
      const found = blocks.find(({ dataset }) => dataset.stage === name);
      return found ? found.offsetLeft + found.offsetWidth / 2 : null;
    };
    const count = blocks.filter(({ dataset }) => dataset.stage.startsWith("down.")).length;
    const height = 8 * count + 8;
    at("skips").setAttribute("viewBox", `0 0 ${at("stages").scrollWidth} ${height}`);
    at("skips").style.height = `${height}px`;
    at("skips").style.width = `${at("stages").scrollWidth}px`;
    const lines = [];
    for (let i = 0; i < count; i++) {
      const [from, to] = [centre(`down.${i}`), centre(`up.${count - 1 - i}`)];
      if (from === null || to === null) continue;
      const line = document.createElementNS(SVG, "path");
      line.setAttribute("class", "skip");
      line.setAttribute("d", `M${from},${height} V${8 * i + 4} H${to} V${height}`);
      lines.push(line);
    }
    at("skips").replaceChildren(...lines);
  }
}

function block({ name, shape }, highest, checked) {
  const input = make("input", { type: "radio", name: "stage", value: name, checked });
  input.setAttribute("aria-label", `${name}: ${shape[0]} channels of ${shape[2]} by ${shape[1]}`);
  const bar = make("span", { className: "bar" });
  bar.style.height = `${Math.max((BLOCK * shape[1]) / highest, 6)}px`;
  const element = make("label", { className: "block", title: `${name}: ${shape[0]} × ${shape[2]} × ${shape[1]}` }, input, bar);
  element.style.flexGrow = shape[0];
  element.dataset.stage = name;
  return element;
}

function spoken(name) {
  const [part, index] = name.split(".");
  if (part === "down") return `Way down, stage ${Number(index) + 1} (${name})`;
  if (part === "up") return `Way up, stage ${Number(index) + 1} (${name})`;
  return name === "middle" ? "The middle, with the smallest maps" : `The last convolution (${name})`;
}

function says({ text, id, share }) {
  return `${id === null ? GROUPS[text] : `“${text}”`} got ${(100 * share).toFixed(1)}% of the attention.`;
}
