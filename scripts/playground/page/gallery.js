// The pictures of this session, with all their settings. Nothing of it is stored: closing the page empties it.

import { at, download, make } from "./dom.js";

const MOST = 60; // pictures
const WITH_STEPS = 10; // of the newest, the steps are kept too: they take the most memory

export class Gallery {
  // `restore(run)` shows a picture and its settings again, `start(url)` takes it for image-to-image, `shown()` is the
  // run that the page shows.
  constructor(restore, start, shown) {
    Object.assign(this, { restore, start, shown, runs: [] });
  }

  add(run) {
    this.runs.unshift(run);
    at("shelf").prepend(this.card(run));
    for (const old of this.runs.slice(WITH_STEPS)) if (old !== this.shown()) old.forget();
    while (this.runs.length > MOST) {
      this.runs.pop();
      at("shelf").lastElementChild.remove();
    }
    at("shelf-empty").hidden = true;
  }

  card(run) {
    const { work, result } = run;
    const [url] = result.images;
    const picture = make("img", { src: url, alt: work.prompt || "A picture without a prompt", width: result.width, height: result.height });
    const again = make("button", { type: "button", className: "card", title: `Restores these settings.\n${result.parameters}` }, picture);
    again.addEventListener("click", () => this.restore(run));
    const start = make("button", { type: "button", className: "quiet", textContent: "Start from it" });
    start.title = "Takes this picture for image-to-image.";
    start.addEventListener("click", () => this.start(url));
    const save = make("button", { type: "button", className: "quiet", textContent: "Download" });
    save.title = "Saves a PNG file with the settings in it. Drop it onto this page to get them back.";
    save.addEventListener("click", () => download(url, fileName(work, result)));
    const about = make("p", {}, make("bdi", { textContent: work.prompt || "(no prompt)" }));
    about.append(make("small", { textContent: `seed ${result.seed}, ${result.seconds.toFixed(1)} s` }));
    return make("li", {}, again, about, make("div", { className: "row" }, start, save));
  }
}

function fileName({ prompt }, { seed }) {
  const words = prompt.toLowerCase().replace(/[^\p{L}\p{N}]+/gu, "-").slice(0, 60).replace(/^-+|-+$/g, "");
  return `${words || "picture"}-${seed}.png`;
}
