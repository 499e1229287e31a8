// One picture in the making, as the page keeps it: what was asked for, every step, and the result.

export class Run {
  constructor(work) {
    this.work = work; // as it was sent; later with the seed and the settings that the server chose
    this.starts = []; // one "started" for each pass
    this.frames = []; // {start, step, predicted}
    this.result = null; // the event "done"
    this.attention = this.features = null;
  }

  take(event, data) {
    if (event === "accepted") {
      const { seed, width, height, sampler_name, n_inference_steps, cfg_scale } = data;
      this.work = { ...this.work, seed, width, height, sampler_name, n_inference_steps, cfg_scale };
    }
    if (event === "started") this.starts.push(data);
    if (event === "step") this.frames.push({ start: this.starts.at(-1), step: data, predicted: null });
    if (event === "predicted") {
      const frame = this.frames.find(({ step }) => step.pass === data.pass && step.index === data.index);
      if (frame) frame.predicted = data.image;
    }
    if (event === "done") this.result = data;
  }

  // How many steps all passes have together, as far as this is known.
  get total() {
    return this.starts.reduce((sum, start) => sum + start.steps, 0);
  }

  // The positions of a slider: every step, and after them the finished picture.
  get last() {
    return this.frames.length - (this.result ? 0 : 1);
  }

  // The newest position to show: a step waits for its decoded picture, if the one before it had one.
  get newest() {
    const [before, now] = this.frames.slice(-2);
    return !this.result && before?.predicted && now && !now.predicted ? this.last - 1 : this.last;
  }

  finishedAt(position) {
    return this.result !== null && position >= this.frames.length;
  }

  frame(position) {
    return this.frames[Math.min(position, this.frames.length - 1)] ?? null;
  }

  // What the big picture shows at a position: its address, and whether it has one pixel for each latent.
  picture(position) {
    if (this.finishedAt(position)) return { url: this.result.images[0], pixels: false };
    const frame = this.frame(position);
    if (!frame) return null;
    return { url: frame.predicted ?? frame.step.images?.denoised, pixels: frame.predicted === null };
  }

  // For how the position is called.
  title(position) {
    if (this.finishedAt(position)) return this.result.interrupted ? "as far as it was drawn" : "finished";
    const { step, start } = this.frame(position);
    const pass = start.passes > 1 ? `, pass ${start.pass}` : "";
    return `${step.index + 1} of ${step.steps}${pass}, t = ${Math.round(step.timestep)}`;
  }

  // Drops the steps, which take the most memory.
  forget() {
    this.frames = [];
    this.starts = [];
    this.attention = this.features = null;
  }
}
