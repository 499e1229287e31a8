// The picture to start from (image-to-image), and the mask that is painted on it (inpainting).

import { at, dropped, loadImage, pictureOf, say } from "./dom.js";
import { Sketch } from "./sketch.js";

const SIDE = 512; // the longer side of the canvas for the mask
const INK = "#d65c1c";

export class Start {
  // `fit(width, height)` is told the size of a new picture.
  constructor(fit) {
    this.fit = fit;
    this.url = null;
    this.sketch = new Sketch(at("mask"), () => {});
    this.sketch.brush = { colour: INK, size: 48, erase: false };
    const frame = at("start-frame");
    frame.addEventListener("dragover", () => frame.classList.add("over"));
    frame.addEventListener("dragleave", () => frame.classList.remove("over"));
    frame.addEventListener("drop", (event) => {
      event.preventDefault();
      event.stopPropagation(); // elsewhere on the page, a drop restores settings
      frame.classList.remove("over");
      this.take(dropped(event));
    });
    at("start-file").addEventListener("change", (event) => {
      this.take(event.target.files[0]);
      event.target.value = ""; // so that the same file can be chosen again
    });
    at("mask-size").addEventListener("input", (event) => (this.sketch.brush.size = Number(event.target.value)));
    at("mask-erase").addEventListener("change", (event) => (this.sketch.brush.erase = event.target.checked));
    at("mask-undo").addEventListener("click", () => this.sketch.undo());
    at("mask-clear").addEventListener("click", () => this.sketch.replace(() => {}));
    at("start-remove").addEventListener("click", () => this.remove());
    at("strength").addEventListener("input", () => this.showStrength());
  }

  // Takes a File or a data URL, and says what is wrong with it.
  async take(what) {
    say("start-error");
    if (!what) return;
    try {
      await this.load(await pictureOf(what));
    } catch (error) {
      say("start-error", error.message);
    }
  }

  async load(url) {
    const image = await loadImage(url);
    const scale = SIDE / Math.max(image.naturalWidth, image.naturalHeight);
    at("mask").width = Math.max(Math.round(image.naturalWidth * scale), 1);
    at("mask").height = Math.max(Math.round(image.naturalHeight * scale), 1);
    this.sketch.undos = [];
    this.url = at("start-image").src = url;
    at("start-empty").hidden = true;
    at("start-full").hidden = false;
    at("start").open = true;
    this.fit(image.naturalWidth, image.naturalHeight);
  }

  remove() {
    this.url = null;
    const focused = at("start-full").contains(document.activeElement);
    at("start-empty").hidden = false;
    at("start-full").hidden = true;
    if (focused) at("start-file").focus();
    say("start-error");
  }

  showStrength() {
    at("strength-now").textContent = Number(at("strength").value).toFixed(2);
  }

  read() {
    if (!this.url) return {};
    return { input_image: this.url, mask_image: this.maskUrl(), strength: Number(at("strength").value) };
  }

  // Restores what `read` gave.
  async write({ input_image, mask_image, strength }) {
    if (!input_image) return this.remove();
    await this.load(input_image);
    at("strength").value = strength;
    this.showStrength();
    if (!mask_image) return;
    const mask = await loadImage(mask_image);
    this.sketch.replace((context) => {
      const { width, height } = context.canvas;
      context.drawImage(mask, 0, 0, width, height);
      const pixels = context.getImageData(0, 0, width, height);
      for (let i = 0; i < pixels.data.length; i += 4) pixels.data[i + 3] = pixels.data[i]; // black becomes transparent
      context.putImageData(pixels, 0, 0);
      context.globalCompositeOperation = "source-in";
      context.fillStyle = INK;
      context.fillRect(0, 0, width, height);
      context.globalCompositeOperation = "source-over";
    });
  }

  // White where it was painted and black elsewhere, or null if nothing was painted.
  maskUrl() {
    const { width, height } = at("mask");
    const painted = this.sketch.context.getImageData(0, 0, width, height).data.some((value, i) => i % 4 === 3 && value);
    if (!painted) return null;
    const canvas = Object.assign(document.createElement("canvas"), { width, height });
    const context = canvas.getContext("2d");
    context.drawImage(at("mask"), 0, 0);
    for (const [how, colour] of [["source-in", "#fff"], ["destination-over", "#000"]]) {
      context.globalCompositeOperation = how;
      context.fillStyle = colour;
      context.fillRect(0, 0, width, height);
    }
    return canvas.toDataURL("image/png");
  }
}
