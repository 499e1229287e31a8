"use strict";
const $ = (id) => document.getElementById(id);
$("form").addEventListener("submit", async (event) => {
  event.preventDefault();
  const answer = await fetch("/api/jobs", {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify({ prompt: $("prompt").value }),
  });
  const job = await answer.json();
  if (!answer.ok) return ($("state").textContent = job.detail);
  const events = new EventSource(`/api/jobs/${job.id}/events`);
  const on = (name, act) => events.addEventListener(name, (message) => act(JSON.parse(message.data)));
  on("queued", (data) => ($("state").textContent = `waiting, number ${data.position}`));
  on("step", (data) => {
    $("state").textContent = `step ${data.index + 1} of ${data.steps}`;
    $("picture").src = data.images.denoised;
  });
  on("done", (data) => { events.close(); $("picture").src = data.images[0]; $("state").textContent = `${data.seconds} s`; });
  on("failed", (data) => { events.close(); $("state").textContent = data.sentence; });
  on("cancelled", () => events.close());
});
