// Small helpers for the elements of the page and for images.

export const at = (id) => document.getElementById(id);

// An element with its properties and children. Text is always text: nothing of a prompt is ever read as HTML.
export function make(tag, properties = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
}

// A sentence for the reader in an element with role="alert"; without one, it is hidden.
export function say(id, sentence = "") {
  at(id).textContent = sentence;
  at(id).hidden = !sentence;
}

export const numberIn = (input) => (input.value.trim() === "" ? null : Number(input.value));

const SAFE = Number.MAX_SAFE_INTEGER; // a larger seed would silently become another one in JavaScript

// The seed in a field, or null if it is empty. Throws an Error with a sentence for what is not a seed.
export function seedIn(input) {
  const seed = numberIn(input);
  if (seed !== null && !(Number.isSafeInteger(seed) && seed >= 0)) {
    throw new Error(`The seed should be a whole number from 0 to ${SAFE}, or empty for a new one.`);
  }
  return seed;
}

// A File -> its data URL. Throws an Error with a sentence for what is not a picture.
export async function readPicture(file) {
  if (!/^image\/(png|jpeg|webp)$/.test(file.type)) {
    throw new Error(`A picture should be a PNG, JPEG or WebP file, not ${file.name || "this"}.`);
  }
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(new Error(`${file.name} could not be read.`));
    reader.readAsDataURL(file);
  });
}

// A data URL -> a loaded image. Throws an Error with a sentence if it is damaged.
export async function loadImage(url) {
  const image = new Image();
  image.src = url;
  try {
    await image.decode();
  } catch {
    throw new Error("This picture is damaged and cannot be shown.");
  }
  return image;
}

// Whether what is dragged may be a picture. Text is left to the browser, so that words can be dragged within a prompt.
export const dragsPicture = ({ dataTransfer }) => ["Files", "text/uri-list"].some((kind) => dataTransfer.types.includes(kind));

// What was dropped: a File, or the data URL of a picture that was dragged from this page, or null.
export function dropped(event) {
  const [file] = event.dataTransfer.files;
  const url = event.dataTransfer.getData("text/uri-list");
  return url.startsWith("data:image/") ? url : (file ?? null);
}

export const pictureOf = async (what) => (typeof what === "string" ? what : readPicture(what));

// Saves a data URL as a file.
export function download(url, name) {
  const bytes = Uint8Array.from(atob(url.slice(url.indexOf(",") + 1)), (letter) => letter.charCodeAt(0));
  const address = URL.createObjectURL(new Blob([bytes], { type: "image/png" }));
  make("a", { href: address, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(address), 1000);
}
