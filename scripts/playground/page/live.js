// A drawing, and the picture that follows it: one picture is made at a time, and after it one of the newest drawing.

import { at, loadImage, make, say } from "./dom.js";
import { Run } from "./run.js";
import { Picture } from "./server.js";
import { Sketch } from "./sketch.js";

const COLOURS = {
  sky: "#8ec5f2", night: "#1d2450", sea: "#3f78c2", grass: "#6fae4e", sand: "#dcb56c", snow: "#f4f6f8",
  red: "#c23a2b", yellow: "#f7d94c", purple: "#7a4fb0", brown: "#6b4a35", dark: "#26221f",
};
const SIZES = { shapes: 56, lines: 10 }; // of the brush at first, in pixels of the canvas
const PAPER = "#ffffff";
const SLOW_STEPS = 8; // where there is no LoRA for four
const PROMPTS = {
  tiny: ["a red house on green hills at noon", "a red house in the snow at night", "a purple tent in the desert", "a yellow tree at dawn"],
  other: ["a red cottage in a meadow, oil painting", "a lighthouse at night, watercolour", "a tent in the desert, photograph"],
};

export class Live {
  // `keep(run)` puts a picture into the gallery; `watch(work)` draws it again, to be watched.
  constructor(keep, watch) {
    this.mode = "shapes";
    this.seed = 6;
    this.picture = this.run = null;
    this.dirty = false;
    this.sketches = {};
    for (const mode of ["shapes", "lines"]) {
      this.sketches[mode] = new Sketch(at(`sketch-${mode}`), () => this.want());
      this.sketches[mode].brush.size = SIZES[mode];
    }
    this.sketches.shapes.brush.colour = COLOURS.red;
    at("palette").append(...Object.entries(COLOURS).map(([name, colour]) => this.swatch(name, colour)));
    exampleShapes(this.sketches.shapes.context);
    exampleLines(this.sketches.lines.context);
    this.listen(keep, watch);
  }

  listen(keep, watch) {
    const sketch = () => this.sketches[this.mode];
    at("live-prompt").addEventListener("input", () => this.want());
    at("live-strength").addEventListener("input", () => this.want());
    at("brush").addEventListener("input", (event) => (sketch().brush.size = Number(event.target.value)));
    at("undo").addEventListener("click", () => sketch().undo());
    at("clear").addEventListener("click", () => sketch().replace((context) => fill(context, this.mode === "lines" ? PAPER : COLOURS.sky)));
    at("other-noise").addEventListener("click", () => {
      this.seed += 1;
      this.want();
    });
    at("keep").addEventListener("click", () => this.keep(keep));
    at("watch").addEventListener("click", () => this.models && watch(this.work()));
    for (const radio of document.querySelectorAll("[name=mode]")) {
      radio.addEventListener("change", () => this.choose(radio.value));
    }
    for (const radio of document.querySelectorAll("[name=pen]")) {
      radio.addEventListener("change", () => (this.sketches.lines.brush.colour = radio.value));
    }
  }

  swatch(name, colour) {
    const input = make("input", { type: "radio", name: "colour", value: colour, checked: name === "red" });
    input.setAttribute("aria-label", name);
    input.addEventListener("change", () => (this.sketches.shapes.brush.colour = colour));
    const label = make("label", { className: "swatch", title: name }, input, make("span"));
    label.lastChild.style.background = colour;
    return label;
  }

  // Takes what the server has: the model, and the LoRAs and ControlNets by their names.
  know(models, loras, controls) {
    const first = this.models?.file !== models.file;
    this.models = models;
    this.fewSteps = loras.find(({ name }) => /lcm/i.test(name))?.name;
    this.control = (controls.find(({ name }) => /scribble/i.test(name)) ?? controls[0])?.name;
    at("modes").hidden = !this.control;
    at("no-lines").hidden = Boolean(this.control);
    at("slow").hidden = models.fast || Boolean(this.fewSteps);
    if (first) {
      const prompts = PROMPTS[models.tiny ? "tiny" : "other"];
      const given = at("live-prompt").value;
      if (!given || Object.values(PROMPTS).flat().includes(given)) at("live-prompt").value = prompts[0];
      at("live-examples").replaceChildren(...prompts.map((text) => this.example(text)));
    }
    if (first || !this.control) this.mode = this.control ? "lines" : "shapes";
    this.choose(this.mode);
  }

  example(text) {
    const button = make("button", { type: "button", className: "quiet", textContent: text });
    button.addEventListener("click", () => {
      at("live-prompt").value = text;
      this.want();
    });
    return button;
  }

  choose(mode) {
    this.mode = mode;
    document.querySelector(`[name=mode][value=${mode}]`).checked = true;
    for (const name of ["shapes", "lines"]) {
      for (const part of document.querySelectorAll(`.for-${name}`)) part.hidden = name !== mode;
    }
    at("brush").value = this.sketches[mode].brush.size;
    this.want();
  }

  // The lines as a ControlNet reads them: white on black.
  lines() {
    return this.sketches.lines.url(this.models.image_size, this.models.image_size, PAPER, true);
  }

  work() {
    const side = this.models.image_size;
    const work = { prompt: at("live-prompt").value, seed: this.seed, width: side, height: side, cfg_scale: 1, sampler_name: "lcm", n_inference_steps: 4 };
    if (this.models.fast || this.fewSteps) work.loras = [{ name: this.models.fast ? "tiny-lcm" : this.fewSteps, strength: 1 }];
    else Object.assign(work, { cfg_scale: null, sampler_name: null, n_inference_steps: SLOW_STEPS });
    if (this.mode === "lines") return { ...work, control: [{ net: this.control, image: this.lines(), strength: 1 }] };
    const strength = Number(at("live-strength").value);
    return { ...work, input_image: this.sketches.shapes.url(side, side, PAPER), strength };
  }

  // The drawing has changed.
  want() {
    this.dirty = true;
    if (!this.picture) this.next();
  }

  next() {
    if (!this.dirty || !this.models) return;
    this.dirty = false;
    const begun = performance.now();
    const run = new Run(this.work());
    at("live").setAttribute("aria-busy", "true");
    const hear = (event, data) => {
      run.take(event, data);
      if (event === "done") this.show(run, performance.now() - begun);
      if (event === "failed") say("live-error", data.sentence);
      if (!["done", "failed", "cancelled"].includes(event)) return;
      this.picture = null;
      at("live").setAttribute("aria-busy", "false");
      this.next();
    };
    this.picture = new Picture({ ...run.work, previews: "none" }, hear, "-live");
  }

  keep(keep) {
    if (!this.run) return;
    this.run.forget(); // its steps have no pictures
    keep(this.run);
    this.run = null;
  }

  async show(run, milliseconds) {
    this.run = run;
    say("live-error");
    at("live-time").textContent = `${(milliseconds / 1000).toFixed(2)} s from the stroke to the picture`;
    await loadImage(run.result.images[0]).catch(() => {}); // decoded before it is shown, so that nothing flickers
    if (this.run === run) at("live-picture").src = run.result.images[0];
  }
}

function fill(context, colour, x = 0, y = 0, width = context.canvas.width, height = context.canvas.height) {
  context.fillStyle = colour;
  context.fillRect(x, y, width, height);
}

function shape(context, colour, points) {
  context.fillStyle = context.strokeStyle = colour;
  context.beginPath();
  for (const [x, y] of points) context.lineTo(x, y);
  context.closePath();
}

// The drawings that the page opens with, on 512 x 512 pixels: a house, a hill and the sun.
function exampleShapes(context) {
  fill(context, COLOURS.sky);
  fill(context, COLOURS.grass, 0, 330, 512, 182);
  fill(context, COLOURS.red, 270, 270, 150, 130);
  shape(context, COLOURS.brown, [[250, 272], [345, 190], [440, 272]]);
  context.fill();
  context.fillStyle = COLOURS.yellow;
  context.beginPath();
  context.arc(105, 95, 46, 0, 7);
  context.fill();
}

function exampleLines(context) {
  fill(context, PAPER);
  context.lineWidth = SIZES.lines;
  context.lineCap = context.lineJoin = "round";
  for (const points of [
    [[262, 282], [266, 404], [424, 402], [420, 280]],
    [[244, 284], [300, 196], [392, 192], [446, 282]],
    [[326, 402], [328, 350], [364, 350], [364, 402]],
    [[284, 310], [312, 310], [312, 338], [284, 338], [284, 310]],
    [[378, 310], [406, 310], [406, 338], [378, 338], [378, 310]],
  ]) {
    shape(context, "#000", points);
    context.stroke();
  }
  context.beginPath();
  context.moveTo(0, 330);
  context.bezierCurveTo(80, 260, 160, 300, 258, 330);
  context.moveTo(430, 326);
  context.quadraticCurveTo(470, 296, 512, 318);
  context.moveTo(150, 96);
  context.arc(104, 96, 46, 0, 7);
  context.stroke();
}
