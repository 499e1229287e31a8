// Two runs from the same noise that differ in one setting, side by side.

import { at, make, numberIn, say, seedIn } from "./dom.js";
import { factors } from "./form.js";
import { Run } from "./run.js";
import { Picture } from "./server.js";

const NUMBERS = {
  cfg_scale: "scale", n_inference_steps: "steps", strength: "strength", seed: "seed", clip_skip: "clip skip",
  hires_scale: "enlargement",
};
const TEXTS = { prompt: "prompt", uncond_prompt: "negative prompt", freeu: "FreeU" };

export class Compare {
  constructor() {
    this.picture = this.first = this.second = null;
    at("compare-what").addEventListener("change", () => this.offer());
    at("compare-form").addEventListener("submit", (event) => {
      event.preventDefault();
      this.draw();
    });
    at("compare-step").addEventListener("input", () => this.show());
  }

  know(samplers) {
    this.samplers = samplers;
    at("compare-sampler").replaceChildren(
      ...samplers.map(({ name, label }) => make("option", { value: name, textContent: label })),
    );
  }

  // The finished picture to compare with.
  use(run) {
    this.cancel();
    this.first = run;
    this.second = null;
    const strength = [...at("compare-what").options].find(({ value }) => value === "strength");
    strength.hidden = strength.disabled = !run.work.input_image;
    if (strength.disabled && at("compare-what").value === "strength") at("compare-what").value = "prompt";
    at("compare-ready").hidden = false;
    at("compare-empty").hidden = true;
    say("compare-error");
    this.offer();
    this.show();
  }

  // Fills the field for the new value with the old one.
  offer() {
    const what = at("compare-what").value;
    const value = written(this.first?.work[what] ?? (what in NUMBERS ? 1 : "")); // what a drawing leaves out is 1
    at("compare-text").hidden = at("compare-text").disabled = !(what in TEXTS);
    at("compare-number").hidden = at("compare-number").disabled = !(what in NUMBERS);
    at("compare-sampler").hidden = at("compare-sampler").disabled = what !== "sampler_name";
    this.field().value = value;
  }

  field() {
    const what = at("compare-what").value;
    return at(what in TEXTS ? "compare-text" : what in NUMBERS ? "compare-number" : "compare-sampler");
  }

  read(what) {
    if (what === "seed") return seedIn(this.field());
    if (what === "freeu") return factors(this.field().value);
    return what in NUMBERS ? numberIn(this.field()) : this.field().value;
  }

  draw() {
    const what = at("compare-what").value;
    let value;
    try {
      value = this.read(what);
    } catch (error) {
      return say("compare-error", error.message);
    }
    if (value === null && what in NUMBERS) return say("compare-error", `The new ${NUMBERS[what]} should be a number.`);
    say("compare-error");
    this.cancel();
    const run = new Run({ ...this.first.work, [what]: value, attention: false, features: false });
    this.second = run;
    this.changed = what;
    at("second-image").removeAttribute("src"); // or the one before would be shown with the new value
    this.busy(true);
    this.picture = new Picture(run.work, (event, data) => this.hear(run, event, data), "-compare");
  }

  hear(run, event, data) {
    if (run !== this.second) return;
    run.take(event, data);
    if (event === "failed") say("compare-error", data.sentence);
    if (["done", "failed", "cancelled"].includes(event)) this.busy(false);
    this.show();
  }

  busy(is) {
    at("compare-draw").textContent = is ? "Drawing …" : "Draw the other";
    at("compare-form").setAttribute("aria-busy", String(is));
  }

  cancel() {
    this.picture?.cancel();
    this.picture = null;
  }

  // Both runs at the slider's share of their steps: they may have different numbers of them.
  show() {
    const share = Number(at("compare-step").value) / Number(at("compare-step").max);
    for (const [id, run] of [["first", this.first], ["second", this.second]]) {
      at(`${id}-figure`).hidden = !run;
      if (!run || run.last < 0) continue;
      const wanted = Math.round(share * (run.result ? run.last : run.total));
      const shown = run.picture(Math.min(wanted, run.last));
      at(`${id}-image`).src = shown.url;
      at(`${id}-image`).classList.toggle("pixels", shown.pixels);
    }
    if (!this.second) return;
    at("first-value").textContent = this.value(this.first);
    at("second-value").textContent = this.value(this.second);
  }

  value({ work }) {
    const value = work[this.changed];
    if (this.changed === "sampler_name") return this.samplers.find(({ name }) => name === value)?.label ?? value;
    return this.changed in NUMBERS ? `${NUMBERS[this.changed]} ${value ?? 1}` : written(value) || `(no ${TEXTS[this.changed]})`;
  }
}

// A value as its field has it: FreeU is a list of four numbers.
function written(value) {
  return Array.isArray(value) ? value.join(" ") : value ?? "";
}
