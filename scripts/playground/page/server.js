// Speaks to the server: questions, pictures with their events, and whether it is there at all. README.md lists both.

const TAB = Math.random().toString(36).slice(2); // this tab takes its own turn in the queue
const EVENTS = ["queued", "started", "step", "predicted", "done", "failed", "cancelled"];
const ENDS = ["done", "failed", "cancelled"];
const LOST = "The server was started again, and this picture is lost: please draw it again.";
const LABELS = { // what the page calls the fields of a request
  n_inference_steps: "Steps", cfg_scale: "Scale", uncond_prompt: "Negative prompt", clip_skip: "Clip skip", freeu: "FreeU",
  hires_scale: "Enlarge", hires_strength: "Its strength", input_image: "The picture to start from", mask_image: "The mask",
};
const STATUS_SECONDS = 2;

// The JSON of an answer. Throws an Error with a sentence for the reader.
export async function call(method, path, body) {
  let answer;
  try {
    const headers = body === undefined ? {} : { "Content-Type": "application/json" };
    answer = await fetch(path, { method, headers, body: body && JSON.stringify(body) });
  } catch {
    throw new Error("The server does not answer. Is it still running?");
  }
  const data = await answer.json().catch(() => ({}));
  if (!answer.ok) throw new Error(typeof data.detail === "string" ? data.detail : `The server answered ${answer.status}.`);
  return data;
}

// A picture that was asked for. `hear(event, data)` gets "accepted" and then the events of the server, the last one of
// ENDS. What cannot be asked for is an event "failed" too, so that there is one place for every sentence.
export class Picture {
  constructor(work, hear, part) {
    this.hear = hear;
    this.over = false;
    this.begin({ ...work, client: TAB + part, supersedes: "queued" });
  }

  async begin(work) {
    try {
      const answer = await call("POST", "/api/jobs", work);
      this.id = answer.id;
      if (this.over) return this.drop();
      this.hear("accepted", answer);
      this.events = new EventSource(`/api/jobs/${this.id}/events`);
    } catch (error) {
      return this.take("failed", { sentence: error.message });
    }
    for (const name of EVENTS) this.events.addEventListener(name, (event) => this.take(name, JSON.parse(event.data)));
    this.events.onerror = () => {
      if (this.events.readyState === EventSource.CLOSED) this.take("failed", { sentence: LOST });
    };
  }

  take(event, data) {
    if (this.over) return;
    if (event === "failed") data = { sentence: labelled(data.sentence) };
    if (ENDS.includes(event)) {
      this.over = true;
      this.events?.close();
    }
    this.hear(event, data);
  }

  cancel() {
    if (this.over) return;
    this.take("cancelled", {});
    this.drop();
  }

  drop() {
    if (this.id) call("DELETE", `/api/jobs/${this.id}`).catch(() => {});
  }
}

// A sentence with the page's names of the fields in it.
function labelled(sentence) {
  const label = (name, place) => (place ? LABELS[name]?.toLowerCase() : LABELS[name]) ?? name;
  return sentence.replace(/^\w+|\b[a-z]+(?:_[a-z]+)+\b/g, label);
}

// Asks for the state of the server every two seconds. `hear(status, problem)` gets null and a sentence while there is
// none; `back()` is called when it answers again, or with another worker than before.
export async function watchServer(hear, back) {
  let before = null;
  for (;;) {
    let [status, problem] = [null, ""];
    try {
      status = await call("GET", "/api/status");
    } catch (error) {
      problem = error.message;
    }
    hear(status, problem);
    const worker = status?.worker === "ready" ? status.started : null;
    if (worker !== null && before !== worker) {
      try {
        await back();
        before = worker;
      } catch {
        // it went away again: the next round tries once more
      }
    }
    if (status === null) before = null;
    await new Promise((resolve) => setTimeout(resolve, 1000 * STATUS_SECONDS));
  }
}
