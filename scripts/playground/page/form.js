// The prompt with its tokens, and the settings of a picture.

import { at, make, numberIn, say, seedIn } from "./dom.js";
import { call } from "./server.js";

const HUES = 5; // of tokens, one after the other
const PAUSE = 120; // milliseconds without a key before the tokens are asked for
const HIRES_STRENGTH = 0.6;
const PLAIN_SCHEDULES = ["Automatic", "Uniform", "Normal"]; // of other programs: noise levels that every sampler has

// Settings in a picture’s file that need no sentence.
const IGNORED = ["Model", "Model hash", "Lora hashes", "Version"];

export class Form {
  constructor() {
    this.asked = 0;
    at("prompt").addEventListener("input", () => this.later());
    at("form").addEventListener("invalid", ({ target }) => unfold(target), true); // or the browser cannot show why
    at("fill-seed").addEventListener("click", () => (at("seed").value = at("fill-seed").dataset.seed));
    at("quick").addEventListener("click", () => this.choose({ sampler_name: "lcm", n_inference_steps: 4, cfg_scale: 1 }));
    at("normal").addEventListener("click", () => this.choose({}));
  }

  // Shows what the model can do. `models` and `samplers` are the server's answers.
  know(models, samplers) {
    const first = this.models?.file !== models.file; // also if the server was started again with another one
    Object.assign(this, { models, samplers });
    const chosen = at("sampler").value;
    at("sampler").replaceChildren(...samplers.map(({ name, label }) => make("option", { value: name, textContent: label })));
    at("sampler").value = chosen || models.defaults.sampler;
    at("quick").hidden = at("quick-help").hidden = !models.fast;
    at("steps-count").max = models.limits.steps;
    at("size-trained").textContent = `The model was trained on ${models.image_size} × ${models.image_size}.`;
    if (!first) return;
    this.choose({});
    at("width").value = at("height").value = models.image_size;
    at("look").checked = models.tiny; // larger models take long enough without
    if (!at("prompt").value && models.tiny) at("prompt").value = "a red house on green hills at noon, with clouds";
    this.tokens();
  }

  // Sets the sampler, steps and scale: those given, or the model's own.
  choose(given) {
    if (!this.models) return;
    const { sampler, steps, cfg_scale } = this.models.defaults;
    at("sampler").value = given.sampler_name ?? sampler;
    at("steps-count").value = given.n_inference_steps ?? steps;
    at("scale").value = given.cfg_scale ?? cfg_scale;
    this.chosen?.(given);
  }

  read() {
    return {
      prompt: at("prompt").value,
      uncond_prompt: at("negative").value,
      sampler_name: at("sampler").value || null,
      n_inference_steps: numberIn(at("steps-count")),
      cfg_scale: numberIn(at("scale")),
      seed: seedIn(at("seed")),
      width: numberIn(at("width")),
      height: numberIn(at("height")),
      clip_skip: numberIn(at("clip-skip")) ?? 1,
      hires_scale: numberIn(at("hires-scale")) ?? 1,
      hires_strength: numberIn(at("hires-strength")) ?? HIRES_STRENGTH,
      hires_latents: at("hires-latents").checked,
      freeu: factors(at("freeu").value),
      attention: at("look").checked,
      features: at("look").checked,
    };
  }

  write(work) {
    at("prompt").value = work.prompt;
    at("negative").value = work.uncond_prompt ?? "";
    at("sampler").value = work.sampler_name;
    at("steps-count").value = work.n_inference_steps;
    at("scale").value = work.cfg_scale;
    at("seed").value = work.seed;
    at("width").value = work.width;
    at("height").value = work.height;
    this.writeMore(work);
    this.tokens();
  }

  // The settings that are folded away. They are opened if one of them is used.
  writeMore({ clip_skip = 1, hires_scale = 1, hires_strength = HIRES_STRENGTH, hires_latents = false, freeu = null }) {
    at("clip-skip").value = clip_skip;
    at("hires-scale").value = hires_scale;
    at("hires-strength").value = hires_strength;
    at("hires-latents").checked = hires_latents;
    at("freeu").value = freeu?.join(" ") ?? "";
    this.openMore();
  }

  openMore() {
    at("more").open ||= Boolean(at("clip-skip").value > 1 || at("hires-scale").value > 1 || at("freeu").value);
  }

  // Takes the settings of a picture's file, the answer of /api/png-info. Returns sentences on what it did not take.
  restore({ prompt, negative, settings }) {
    const left = { ...settings };
    const take = (name) => {
      const value = left[name];
      delete left[name];
      return value;
    };
    const fields = { Steps: "steps-count", "CFG scale": "scale", Seed: "seed" };
    const notes = [];
    at("prompt").value = prompt;
    at("negative").value = negative;
    for (const [name, id] of Object.entries(fields)) at(id).value = take(name) ?? at(id).value;
    const size = /^(\d{1,5})x(\d{1,5})$/.exec(take("Size") ?? "");
    if (size) [at("width").value, at("height").value] = size.slice(1);
    const [label, schedule] = [take("Sampler"), take("Schedule type")];
    const sampler = this.samplerCalled(label, schedule);
    if (sampler) at("sampler").value = sampler;
    else notes.push("Its sampler does not exist here.");
    const drawn = sampler?.endsWith("_karras") ? "Karras" : undefined;
    if (sampler && schedule && schedule !== drawn && !PLAIN_SCHEDULES.includes(schedule)) left["Schedule type"] = schedule;
    if (settings.Model && settings.Model !== this.models.model) {
      notes.push(`It was drawn with the model ${settings.Model}, and this is ${this.models.model}.`);
    }
    const hires_scale = take("Hires upscale");
    const ours = "Hires strength" in left || hires_scale === undefined; // AUTOMATIC1111 has another name for it
    const hires_strength = take(ours ? "Hires strength" : "Denoising strength");
    const hires_latents = take("Hires upscaler")?.startsWith("Latent");
    const freeu = take("FreeU")?.split(" ");
    this.writeMore({ clip_skip: take("Clip skip"), hires_scale, hires_strength, hires_latents, freeu });
    const strength = take("Denoising strength");
    this.keepsSize = Boolean(size && strength !== undefined);
    if (strength !== undefined) {
      at("strength").value = strength;
      at("strength").dispatchEvent(new Event("input"));
      notes.push("It was drawn from another picture, which is not in its file: put that into “Start from a picture”.");
    }
    for (const name of IGNORED) delete left[name];
    const names = Object.keys(left);
    if (names.length) notes.push(`Not used: ${names.slice(0, 8).join(", ")}.`);
    this.tokens();
    return notes;
  }

  samplerCalled(label = "", schedule = "") {
    const wanted = schedule === "Karras" && !label.endsWith(" Karras") ? [`${label} Karras`, label] : [label];
    const same = (a, b) => a.toLowerCase() === b.toLowerCase();
    const found = wanted.map((one) => this.samplers.find(({ name, label }) => same(label, one) || same(name, one)));
    return found.find(Boolean)?.name;
  }

  // The seed of the last picture, to draw it again.
  offer(seed) {
    at("fill-seed").hidden = false;
    at("fill-seed").dataset.seed = seed;
    at("fill-seed").textContent = `Use the last one, ${seed}`;
  }

  later() {
    clearTimeout(this.timer);
    this.timer = setTimeout(() => this.tokens(), PAUSE);
  }

  // Shows the prompt as the text encoder gets it. An answer that a later question has overtaken is dropped.
  async tokens() {
    const number = ++this.asked;
    let answer;
    try {
      answer = await call("POST", "/api/tokens", { prompt: at("prompt").value });
    } catch (error) {
      if (number === this.asked) say("prompt-notes", error.message);
      return;
    }
    if (number !== this.asked) return;
    let index = 0;
    const chunks = answer.chunks.map((chunk) => chunk.map((token) => piece(token, index++)));
    at("tokens").replaceChildren(...chunks.flatMap((chunk, i) => (i ? [make("br"), ...chunk] : chunk)));
    const { count, room } = answer;
    at("count").textContent = count <= room ? `${count} of ${room} tokens` : `${count} tokens, in ${chunks.length} parts`;
    say("prompt-notes", [...answer.notes, unknown(answer.unknown), withLoras(answer.loras)].filter(Boolean).join(" "));
  }
}

// "1.5 1.6 0.9 0.2" -> four numbers, or null for nothing. Throws an Error with a sentence for anything else.
export function factors(text) {
  const numbers = text.split(/[\s,;]+/).filter(Boolean).map(Number);
  if (!numbers.length) return null;
  if (numbers.length !== 4 || !numbers.every(Number.isFinite)) {
    throw new Error("FreeU should be four numbers, such as 1.5 1.6 0.9 0.2, or empty.");
  }
  return numbers;
}

// Opens what is folded around an element.
function unfold(element) {
  for (let fold = element.closest("details"); fold; fold = fold.parentElement.closest("details")) fold.open = true;
}

function piece(token, index) {
  const weight = token.weight === 1 ? "" : ` × ${Number(token.weight.toPrecision(3))}`;
  const element = make("span", { className: `piece hue-${index % HUES}`, title: `token ${token.id}${weight}` });
  element.append(make("bdi", { textContent: token.text }));
  if (weight) element.append(make("small", { textContent: weight }));
  element.classList.toggle("joined", token.joined);
  return element;
}

const unknown = (words) => (words.length ? `The tiny model never saw: ${words.join(", ")}. It ignores such words.` : "");
const withLoras = (loras) => loras.map(({ name, strength }) => `The LoRA ${name} has the strength ${strength}.`).join(" ");
