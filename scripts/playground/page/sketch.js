// A canvas with a brush, for the pointer, a finger and the keyboard.

const UNDOS = 20;
const KEYS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
const PACE = 12; // pixels of the canvas that an arrow key moves the pen; four times as many with Shift

export class Sketch {
  // `change()` is called after every piece of a stroke. The canvas should lie in an element with position: relative.
  constructor(canvas, change) {
    this.canvas = canvas;
    this.context = canvas.getContext("2d", { willReadFrequently: true });
    this.change = change;
    this.brush = { colour: "#000", size: 12, erase: false };
    this.undos = [];
    this.at = null; // the last point of the stroke
    this.pointer = null; // that draws it: a second finger does not join in
    this.pen = { x: canvas.width / 2, y: canvas.height / 2, down: false }; // of the keyboard
    this.mark = document.createElement("span");
    this.mark.className = "pen";
    this.mark.hidden = true;
    canvas.after(this.mark);
    canvas.addEventListener("pointerdown", (event) => this.press(event));
    canvas.addEventListener("pointermove", (event) => this.move(event));
    for (const name of ["pointerup", "pointercancel", "lostpointercapture"]) canvas.addEventListener(name, (event) => this.lift(event));
    canvas.addEventListener("keydown", (event) => this.key(event));
    canvas.addEventListener("blur", () => (this.mark.hidden = true));
  }

  point(event) {
    const box = this.canvas.getBoundingClientRect();
    const scale = this.canvas.width / box.width;
    return { x: (event.clientX - box.left) * scale, y: (event.clientY - box.top) * scale };
  }

  press(event) {
    if (event.button !== 0 || this.at) return;
    this.pointer = event.pointerId;
    this.canvas.setPointerCapture(event.pointerId);
    this.mark.hidden = true;
    this.remember();
    this.line(this.point(event), this.point(event));
  }

  move(event) {
    if (!this.at || event.pointerId !== this.pointer) return;
    const events = event.getCoalescedEvents?.() ?? [];
    for (const piece of events.length ? events : [event]) this.line(this.at, this.point(piece));
  }

  lift(event) {
    if (event.pointerId === this.pointer) this.at = null;
  }

  line(from, to) {
    const { context, brush } = this;
    context.globalCompositeOperation = brush.erase ? "destination-out" : "source-over";
    context.strokeStyle = brush.colour;
    context.lineWidth = brush.size;
    context.lineCap = context.lineJoin = "round";
    context.beginPath();
    context.moveTo(from.x, from.y);
    context.lineTo(to.x, to.y);
    context.stroke();
    context.globalCompositeOperation = "source-over";
    this.at = to;
    this.change();
  }

  // Arrow keys move the pen, and the space bar puts it down and lifts it.
  key(event) {
    const { pen, canvas } = this;
    if (event.altKey || event.ctrlKey || event.metaKey) return; // the browser's own
    pen.x = Math.min(pen.x, canvas.width); // another picture may have another shape
    pen.y = Math.min(pen.y, canvas.height);
    if (event.key === " ") {
      if (!event.repeat) pen.down = !pen.down;
      if (pen.down && !event.repeat) {
        this.remember();
        this.line(pen, { x: pen.x, y: pen.y });
      }
    } else if (event.key in KEYS) {
      const [x, y] = KEYS[event.key].map((way) => way * PACE * (event.shiftKey ? 4 : 1));
      const from = { x: pen.x, y: pen.y };
      pen.x = Math.min(Math.max(pen.x + x, 0), canvas.width);
      pen.y = Math.min(Math.max(pen.y + y, 0), canvas.height);
      if (pen.down) this.line(from, { x: pen.x, y: pen.y });
    } else return;
    event.preventDefault();
    this.at = null;
    this.mark.hidden = false;
    this.mark.classList.toggle("down", pen.down);
    this.mark.style.left = `${(100 * pen.x) / canvas.width}%`;
    this.mark.style.top = `${(100 * pen.y) / canvas.height}%`;
  }

  remember() {
    this.undos.push(this.context.getImageData(0, 0, this.canvas.width, this.canvas.height));
    this.undos = this.undos.slice(-UNDOS);
  }

  undo() {
    const before = this.undos.pop();
    if (!before) return;
    this.context.putImageData(before, 0, 0);
    this.change();
  }

  // Draws something else: `paint(context)` gets an empty canvas.
  replace(paint) {
    this.remember();
    this.context.clearRect(0, 0, this.canvas.width, this.canvas.height);
    paint(this.context);
    this.change();
  }

  // The canvas in another size as a data URL, on a background. `inverted` makes black lines white.
  url(width, height, background, inverted = false) {
    const small = Object.assign(document.createElement("canvas"), { width, height });
    const context = small.getContext("2d");
    context.fillStyle = background;
    context.fillRect(0, 0, width, height);
    context.imageSmoothingQuality = "high";
    context.drawImage(this.canvas, 0, 0, width, height);
    if (inverted) {
      context.globalCompositeOperation = "difference"; // |white - x|
      context.fillStyle = "#fff";
      context.fillRect(0, 0, width, height);
    }
    return small.toDataURL("image/png");
  }
}
