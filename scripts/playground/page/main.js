// Puts the parts of the page together.

import { Adapters } from "./adapters.js";
import { Compare } from "./compare.js";
import { at, dragsPicture, dropped, pictureOf, say } from "./dom.js";
import { Form } from "./form.js";
import { Gallery } from "./gallery.js";
import { Live } from "./live.js";
import { call, watchServer } from "./server.js";
import { Start } from "./start.js";
import { Studio } from "./studio.js";

const form = new Form();
const start = new Start(fit);
const adapters = new Adapters(() => live.lines());
const compare = new Compare();
const gallery = new Gallery(restore, startFrom, () => studio.run);
const studio = new Studio(form, start, adapters, (run) => {
  gallery.add(run);
  compare.use(run);
});
const live = new Live((run) => gallery.add(run), watch);

// The four distilled steps need their LoRA; the usual ones should be without it.
form.chosen = ({ sampler_name }) => {
  const row = adapters.rows.loras.get("tiny-lcm");
  if (row) sampler_name === "lcm" ? row.set(1) : (row.box.checked = false);
};

// A size with the shape of a picture, and about as many pixels as the model was trained on. The restored size of a
// picture stays, when the picture comes that it was drawn from.
function fit(width, height) {
  if (form.keepsSize) {
    form.keepsSize = false;
    return;
  }
  const side = form.models?.image_size ?? 512;
  const multiple = (length) => Math.max(8 * Math.round((length * side) / Math.sqrt(width * height) / 8), 8);
  at("width").value = multiple(width);
  at("height").value = multiple(height);
}

async function restore(run) {
  await studio.restore(run);
  compare.use(run);
  at("studio").scrollIntoView();
}

function startFrom(url) {
  start.take(url);
  at("studio").scrollIntoView();
}

// Draws what the live canvas shows once more, with everything to look at.
async function watch(work) {
  await start.write(work);
  form.write(work);
  if (work.sampler_name === null) form.choose(work);
  adapters.write(work);
  studio.draw();
  at("studio").scrollIntoView();
}

// A picture that is dropped anywhere brings its settings back. One without settings becomes the picture to start from.
async function takeDrop(what) {
  if (!what || !form.models) return;
  say("draw-error");
  say("draw-notes");
  at("studio").scrollIntoView();
  try {
    const url = await pictureOf(what);
    const info = await call("POST", "/api/png-info", { image: url });
    if (Object.keys(info.settings).length === 0) {
      say("draw-notes", "This picture has no settings in it, so it is now the picture to start from.");
      return await start.load(url);
    }
    start.remove();
    adapters.write({});
    const notes = form.restore(info);
    say("draw-notes", ["The settings of this picture are restored: Draw makes it again.", ...notes].join(" "));
  } catch (error) {
    say("draw-error", error.message);
  }
}

addEventListener("dragover", (event) => dragsPicture(event) && event.preventDefault());
addEventListener("drop", (event) => {
  if (!dragsPicture(event)) return;
  event.preventDefault();
  takeDrop(dropped(event));
});

addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
    event.preventDefault();
    studio.draw();
  }
  if (event.key === "Escape") {
    studio.cancel();
    compare.cancel();
    studio.words.choose(null);
  }
});

// A browser that goes back, or loads the page again, fills its fields in again: what depends on them follows.
addEventListener("pageshow", () => {
  for (const field of document.querySelectorAll("[name=pen]:checked, #mask-size, #mask-erase, #strength")) {
    for (const name of ["input", "change"]) field.dispatchEvent(new Event(name));
  }
  form.openMore();
});

function showStatus(status, problem) {
  const { worker, waiting, running } = status ?? {};
  const sentences = {
    starting: "The model is being loaded …",
    restarting: "The process that draws has died and is being started again …",
    unusable: status?.problem,
    ready: form.models ? `${form.models.model} on ${form.models.device}, ${running ? "drawing" : "ready"}` : "ready",
  };
  const sentence = status ? sentences[worker] : `${problem} This page tries again every two seconds.`;
  const queue = waiting ? `, ${waiting} waiting` : "";
  if (at("server").textContent !== sentence + queue) at("server").textContent = sentence + queue;
  at("server").className = { ready: "ready", starting: "" }[worker] ?? "trouble";
}

async function learn() {
  const get = (what) => call("GET", `/api/${what}`);
  const [models, samplers, loras, controls] = await Promise.all(["models", "samplers", "loras", "controls"].map(get));
  adapters.know(loras, controls);
  form.know(models, samplers);
  compare.know(samplers);
  studio.player.drawSchedule(models.schedule);
  live.know(models, loras, controls);
}

watchServer(showStatus, learn);
