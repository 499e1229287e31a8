// Draws what the form asks for, and shows it step by step.

import { at, say } from "./dom.js";
import { loadInside, Stages, Words } from "./inside.js";
import { Player } from "./player.js";
import { Run } from "./run.js";
import { Picture } from "./server.js";

export class Studio {
  // `finished(run)` is called for every picture that was drawn to its end.
  constructor(form, start, adapters, finished) {
    Object.assign(this, { form, start, adapters, finished });
    this.picture = this.run = null;
    this.player = new Player();
    this.words = new Words();
    this.stages = new Stages();
    this.player.moved = (position) => {
      this.stages.move(position);
      this.words.look(this.words.chosen);
    };
    at("form").addEventListener("submit", (event) => {
      event.preventDefault();
      this.draw();
    });
    at("cancel").addEventListener("click", () => this.cancel());
  }

  draw() {
    say("draw-error");
    say("draw-notes");
    let work;
    try {
      work = { ...this.form.read(), ...this.start.read(), ...this.adapters.read() };
    } catch (error) {
      return say("draw-error", error.message);
    }
    this.picture?.cancel();
    const run = (this.run = new Run(work));
    this.words.show(null);
    this.stages.show(null);
    this.player.follow(run);
    this.busy("Asking …");
    this.picture = new Picture(work, (event, data) => this.hear(run, event, data), "-studio");
  }

  async hear(run, event, data) {
    if (run !== this.run) return;
    run.take(event, data);
    if (event === "accepted" && data.notes.length) say("draw-notes", data.notes.join(" "));
    if (event === "queued") this.busy(waiting(data));
    if (event === "started") this.busy("Drawing …");
    if (event === "failed") say("draw-error", data.sentence);
    if (["started", "step", "predicted", "done"].includes(event)) this.player.update();
    if (event === "step") {
      at("progress").max = run.total;
      at("progress").value = run.frames.length;
    }
    if (["done", "failed", "cancelled"].includes(event)) this.idle(event === "cancelled" ? "Cancelled." : "");
    if (event === "done") await this.done(run);
  }

  async done(run) {
    at("state").textContent = `Drawn in ${run.result.seconds.toFixed(1)} s, with the seed ${run.result.seed}.`;
    if (run.result.notes.length) say("draw-notes", run.result.notes.join(" "));
    this.form.offer(run.result.seed);
    this.finished(run);
    await loadInside(run, this.picture.id);
    if (run === this.run) this.showInside(run);
  }

  showInside(run) {
    this.stages.show(run);
    this.words.show(run);
    this.stages.move(Number(at("step").value));
  }

  // Shows a picture of the gallery again, with the settings that it was drawn with.
  async restore(run) {
    this.cancel();
    this.run = run;
    say("draw-error");
    say("draw-notes");
    this.adapters.write(run.work);
    await this.start.write(run.work);
    this.form.write(run.work);
    this.player.follow(run);
    this.showInside(run);
    at("state").textContent = "These are the settings of this picture.";
  }

  busy(sentence) {
    at("state").textContent = sentence;
    at("cancel").disabled = false;
    at("progress").hidden = false;
    at("progress").removeAttribute("value");
  }

  idle(sentence) {
    at("state").textContent = sentence;
    if (document.activeElement === at("cancel")) at("submit").focus(); // what is disabled loses the focus
    at("cancel").disabled = true;
    at("progress").hidden = true;
  }

  cancel() {
    this.picture?.cancel();
  }
}

function waiting({ position, worker }) {
  if (worker === "starting") return "The model is being loaded …";
  if (worker === "restarting") return "The process that draws is being started again …";
  return position > 1 ? `Number ${position} in the queue.` : "Next in the queue.";
}
