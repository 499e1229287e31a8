// The slider, and all that it moves: the big picture, the small ones, and the marks on the noise schedule.

import { at, make } from "./dom.js";

const PANELS = ["latents", "uncond", "cond", "push"];
const SVG = "http://www.w3.org/2000/svg";

export class Player {
  constructor() {
    this.run = null;
    this.following = true; // shows the newest step, until the reader moves the slider
    this.slider = at("step");
    this.slider.addEventListener("input", () => {
      this.following = Number(this.slider.value) >= this.run.newest;
      this.show(Number(this.slider.value));
    });
  }

  // Starts to follow a run. Call `update` whenever it has something new.
  follow(run) {
    this.run = run;
    this.following = true;
    this.ticked = null;
    this.update();
  }

  update() {
    const { run, slider } = this;
    const known = run.frames.length > 0;
    slider.disabled = !known;
    if (run.starts.at(-1) !== this.ticked) this.tick(run.starts.at(-1));
    if (!known) return this.empty();
    slider.max = Math.max(run.last, run.total - 1, 1);
    if (this.following) this.show(run.newest);
    else this.show(Number(slider.value));
  }

  empty() {
    at("picture").hidden = !this.run.result;
    if (this.run.result) {
      const { images, width, height } = this.run.result;
      at("image").src = images[0];
      at("image").classList.remove("pixels");
      at("picture").style.setProperty("--ratio", width / height);
    }
    at("now").textContent = this.run.result ? "The steps of this picture are not kept. Draw it again to see them." : "";
    at("steps").hidden = true;
  }

  show(position) {
    const { run, slider } = this;
    position = Math.min(position, run.last);
    slider.value = position;
    const picture = run.picture(position);
    at("picture").hidden = !picture;
    if (picture) {
      at("image").src = picture.url;
      at("image").classList.toggle("pixels", picture.pixels);
    }
    const { start, step } = run.frame(position);
    at("steps").hidden = false;
    at("picture").style.setProperty("--ratio", start.width / start.height);
    at("now").textContent = run.title(position);
    slider.setAttribute("aria-valuetext", run.title(position));
    for (const name of PANELS) {
      const url = step.images?.[name];
      at(name).closest("figure").hidden = !url;
      if (url) at(name).src = url;
    }
    at("cond-title").textContent = start.prediction === "epsilon" ? "Predicted noise" : "Predicted v";
    at("uncond-title").textContent = at("cond-title").textContent;
    at("uncond-text").textContent = run.work.uncond_prompt ? "With the negative prompt" : "Without the prompt";
    this.mark(step, run.finishedAt(position) ? start.alpha_bar.at(-1) : step.alpha_bar);
    this.moved?.(position);
  }

  mark(step, alphaBar) {
    const finished = alphaBar !== step.alpha_bar;
    const signal = Math.sqrt(alphaBar);
    const noise = Math.sqrt(1 - alphaBar);
    const x = finished ? 100 : this.across(step.timestep);
    for (const id of ["mark", "signal-dot", "noise-dot"]) at(id).style.left = `${x}%`;
    at("signal-dot").style.top = `${100 - 100 * signal}%`;
    at("noise-dot").style.top = `${100 - 100 * noise}%`;
    at("mixture").textContent = `latents = ${signal.toFixed(2)} · image + ${noise.toFixed(2)} · noise`;
  }

  across(timestep) {
    return 100 * (1 - timestep / this.timesteps);
  }

  // The two curves: the factors of the image and of the noise, with all noise on the left.
  drawSchedule({ timesteps, alphas_cumprod }) {
    this.timesteps = timesteps.at(-1);
    const path = (factors) =>
      "M" + factors.map((factor, i) => `${this.across(timesteps[i])},${100 - 100 * Math.sqrt(factor)}`).join(" L");
    const signal = path(alphas_cumprod);
    const noise = path(alphas_cumprod.map((a) => 1 - a));
    const curves = { area: `${signal} L0,100 L100,100 Z`, noise, signal };
    at("curves").replaceChildren(
      ...Object.entries(curves).map(([name, d]) => {
        const curve = document.createElementNS(SVG, "path");
        curve.setAttribute("class", name);
        curve.setAttribute("d", d);
        return curve;
      }),
    );
    at("first-t").textContent = `t = ${this.timesteps}`;
  }

  // A tick for every step, and hatching over the part that image-to-image skips.
  tick(start) {
    this.ticked = start;
    const ticks = [];
    if (start?.skipped) {
      ticks.push(make("span", { className: "unvisited" }));
      ticks[0].style.width = `${this.across(start.timesteps[0])}%`;
    }
    for (const timestep of start?.timesteps ?? []) {
      const tick = make("span", { className: "visited" });
      tick.style.left = `${this.across(timestep)}%`;
      ticks.push(tick);
    }
    at("ticks").replaceChildren(...ticks);
  }
}
