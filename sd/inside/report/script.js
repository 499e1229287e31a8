"use strict";

const data = JSON.parse(document.getElementById("data").textContent);
const at = (id) => document.getElementById(id);

// Tokens: the one under the pointer or with the focus, or else the chosen one, lights up the image where it got attention.
const tokens = [...document.querySelectorAll(".token")];
const stage = document.querySelector(".stage");
const lit = new Image();  // the coloured image, above the grey one
let chosen = null;
lit.id = "lit";
lit.alt = "";
lit.hidden = true;
lit.src = at("image").src;
for (const name of ["maskPosition", "webkitMaskPosition"]) lit.style[name] = data.position;
for (const name of ["maskSize", "webkitMaskSize"]) lit.style[name] = data.size;
stage.append(lit);

function look(token) {
  stage.classList.toggle("looking", token !== null);
  lit.hidden = token === null;
  for (const other of tokens) other.classList.toggle("on", other === token);
  at("look").textContent = token ? token.dataset.says : "";
  if (!token) return;
  const map = `url("${data.maps[tokens.indexOf(token)]}")`;
  lit.style.webkitMaskImage = map;
  lit.style.maskImage = map;
}

function choose(token) {
  chosen = token;
  for (const other of tokens) other.setAttribute("aria-pressed", String(other === chosen));
  look(chosen);
}

for (const token of tokens) {
  token.addEventListener("pointerenter", (event) => { if (event.pointerType === "mouse") look(token); });
  token.addEventListener("pointerleave", (event) => { if (event.pointerType === "mouse") look(chosen); });
  token.addEventListener("focus", () => { if (token.matches(":focus-visible")) look(token); });
  token.addEventListener("blur", () => look(chosen));
  token.addEventListener("click", () => choose(chosen === token ? null : token));
}
document.addEventListener("keydown", (event) => { if (event.key === "Escape") choose(null); });

// The slider, and the button that moves it through all steps: they show everything that belongs to one step.
const slider = at("step");
const play = at("play");
const last = data.steps.length - 1;
const pace = Math.min(500, Math.max(100, 5000 / data.steps.length));  // milliseconds for each step
let timer = null;  // while it plays

function show(index) {
  const step = data.steps[index];
  slider.value = index;
  for (const image of document.querySelectorAll(".panels img")) image.src = step[image.id];
  at("now").textContent = step.title;
  slider.setAttribute("aria-valuetext", step.title);
  at("mixture").textContent = step.mixture;
  at("mark").style.left = at("signal-dot").style.left = at("noise-dot").style.left = `${step.x}%`;
  at("signal-dot").style.top = `${100 - 100 * step.signal}%`;
  at("noise-dot").style.top = `${100 - 100 * step.noise}%`;
}

function stop() {
  clearInterval(timer);
  timer = null;
  play.textContent = "Play";
  at("now").removeAttribute("aria-live");
}

function advance() {
  show(Number(slider.value) + 1);
  if (Number(slider.value) === last) stop();
}

slider.addEventListener("input", () => { stop(); show(Number(slider.value)); });
play.addEventListener("click", () => {
  if (timer !== null) { stop(); return; }
  if (Number(slider.value) === last) show(0);
  timer = setInterval(advance, pace);
  play.textContent = "Pause";
  at("now").setAttribute("aria-live", "off");  // otherwise a screen reader would read every step aloud
});
play.hidden = last === 0;
show(0);  // the page itself shows the middle step, for readers without JavaScript

if (navigator.clipboard) {
  at("copy").hidden = false;
  at("copy").addEventListener("click", async () => {
    try {
      await navigator.clipboard.writeText(at("command").textContent);
      at("copy").textContent = "Copied";
    } catch {
      at("copy").textContent = "Please select it and copy it";
    }
  });
}
