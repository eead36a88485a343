// The page: its controls, and what it shows of an answer.

import { Camera } from "./camera.js";
import { Classifier } from "./classifier.js";
import { drawTokens, patchesOfTokens } from "./drawing.js";
import { normalize, readPixels, resize } from "./pixels.js";

const SHOWN_CLASSES = 5;
const DRAWING_SIDE = 720; // pixels of the longer side
const LARGEST_SIDE = 2048; // of an image in memory

const $ = (id) => document.getElementById(id);
const camera = new Camera();
const classifiers = new Map(); // name of a model -> promise of it
const milliseconds = new Map(); // name of a model -> time of the last image
const current = { site: null, image: null, values: null, answer: null, patch: null };
let newest = 0; // number of the last question; older answers are not shown

// ---- what it shows ----

function showError(error) {
  $("error").textContent = error.message;
  $("error").hidden = false;
}

function percent(share) {
  return `${(100 * share).toFixed(1)} %`;
}

function showBars(list, bars) {
  list.replaceChildren(
    ...bars.map(({ name, value, share }) => {
      const item = document.createElement("li");
      item.append(Object.assign(document.createElement("span"), { textContent: name }));
      item.append(Object.assign(document.createElement("span"), { textContent: value }));
      item.style.setProperty("--share", share);
      return item;
    }),
  );
}

function showClasses() {
  const { labels } = current.site;
  const ranked = [...current.answer.probabilities.entries()].sort((a, b) => b[1] - a[1]).slice(0, SHOWN_CLASSES);
  showBars(
    $("classes"),
    ranked.map(([index, share]) => ({ name: labels[index], value: percent(share), share })),
  );
  $("status").textContent = `${current.image.name}: ${labels[ranked[0][0]]}, ${percent(ranked[0][1])}`;
}

function showTokens() {
  const all = current.site.tokens_before_fusion;
  showBars(
    $("tokens"),
    current.site.models[modelName()].tokens.map((tokens, index) => ({
      name: `Layer ${index + 1}`,
      value: `${tokens} of ${all}`,
      share: tokens / all,
    })),
  );
}

function showTimes() {
  const words = { fused: "with fusion", unfused: "without" };
  const known = Object.keys(words).filter((name) => milliseconds.has(name));
  const times = known.map((name) => `${milliseconds.get(name).toFixed(1)} ms ${words[name]}`);
  $("times").textContent = `Time per image on one thread of this device: ${times.join(", ")}.`;
}

function showDrawing() {
  const layer = Number($("layer").value);
  const tokens = layer > 0 ? current.answer.tokens[layer - 1] : null;
  $("layer-name").textContent = layer > 0 ? `layer ${layer}` : "nothing";
  [...$("tokens").children].forEach((item, index) => item.setAttribute("aria-current", index === layer - 1));
  const canvas = $("drawing");
  const { source, name } = current.image;
  const scale = DRAWING_SIDE / Math.max(source.width, source.height);
  canvas.width = Math.max(1, Math.round(source.width * scale));
  canvas.height = Math.max(1, Math.round(source.height * scale));
  canvas.style.setProperty("--aspect", canvas.width / canvas.height);
  canvas.setAttribute("aria-label", layer > 0 ? `${name}, its tokens at layer ${layer}` : name);
  drawTokens(canvas, source, tokens, current.site.grid, current.patch);
  $("picture").hidden = false;
  showPatch(tokens);
}

function showPatch(tokens) {
  if (tokens === null || current.patch === null) {
    $("patch").textContent = "";
    return;
  }
  const columns = current.site.grid[1];
  const together = patchesOfTokens(tokens).get(tokens[current.patch]).length;
  const place = `Row ${Math.floor(current.patch / columns) + 1}, column ${(current.patch % columns) + 1}`;
  $("patch").textContent = `${place}: ${together === 1 ? "a token of its own" : `one of ${together} patches that are one token`}.`;
}

// ---- what it asks ----

function modelName() {
  return $("fusion").checked && current.site.models.fused ? "fused" : "unfused";
}

function classifier(name) {
  if (!classifiers.has(name)) {
    const loading = Classifier.load(current.site.models[name].file, current.site.class_index);
    classifiers.set(name, loading);
    loading.catch(() => classifiers.delete(name)); // the next question tries again
  }
  return classifiers.get(name);
}

let passes = Promise.resolve(); // one at a time, so that times are those of one pass

/** Ask the model of the switch about the current image, and show its answer. */
async function ask(isTimed = true) {
  if (current.image === null) {
    return;
  }
  const question = ++newest;
  const name = modelName();
  const { height, width } = current.site.image;
  $("error").hidden = true;
  const pass = passes.then(async () => {
    if (question !== newest) {
      return;
    }
    const answer = await (await classifier(name)).answer(current.values, height, width, isTimed);
    if (question === newest) {
      current.answer = answer;
      milliseconds.set(name, answer.milliseconds);
      showClasses();
      showTokens();
      showTimes();
      showDrawing();
    }
  });
  passes = pass.catch(() => {});
  await pass.catch(showError);
}

/** @param source anything with width and height that a canvas can draw. */
async function takeImage(source, name, isTimed = true) {
  const { height, width, resample } = current.site.image;
  const pixels = resize(readPixels(source, source.width, source.height), height, width, resample);
  current.image = { source, name };
  current.values = normalize(pixels, current.site.image);
  await ask(isTimed);
}

async function takeFile(blob, name) {
  stopCamera();
  let source;
  try {
    source = await createImageBitmap(blob);
  } catch {
    showError(new Error(`${name}: this is no image that the browser can read`));
    return;
  }
  const scale = LARGEST_SIDE / Math.max(source.width, source.height);
  if (scale < 1) {
    const resizeWidth = Math.max(1, Math.round(source.width * scale));
    source = await createImageBitmap(source, { resizeWidth, resizeQuality: "high" });
  }
  await takeImage(source, name);
}

async function takeExample(path) {
  try {
    const response = await fetch(path);
    if (!response.ok) {
      throw new Error(`${path}: this file of the page cannot be loaded (${response.status})`);
    }
    await takeFile(await response.blob(), path.split("/").at(-1));
  } catch (error) {
    showError(error);
  }
}

function stopCamera() {
  camera.stop();
  $("camera").setAttribute("aria-pressed", "false");
  $("camera").textContent = "Use the camera";
}

async function switchCamera() {
  if (camera.isOn) {
    stopCamera();
    return;
  }
  try {
    await camera.start();
  } catch (error) {
    showError(error);
    return;
  }
  $("camera").setAttribute("aria-pressed", "true");
  $("camera").textContent = "Stop the camera";
  while (camera.isOn) {
    const frame = await camera.frame();
    if (camera.isOn) {
      await takeImage(frame, "Camera", false);
      await new Promise(requestAnimationFrame); // lets the page answer to its controls
    }
  }
}

// ---- its controls ----

function movePatch(event) {
  const moves = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };
  const [rows, columns] = current.site.grid;
  if (event.key === "Escape") {
    current.patch = null;
  } else if (event.key in moves) {
    const patch = current.patch ?? -1;
    const [down, right] = current.patch === null ? [0, 0] : moves[event.key];
    const row = Math.min(rows - 1, Math.max(0, Math.floor(Math.max(patch, 0) / columns) + down));
    const column = Math.min(columns - 1, Math.max(0, (Math.max(patch, 0) % columns) + right));
    current.patch = row * columns + column;
  } else {
    return;
  }
  event.preventDefault();
  showDrawing();
}

function pointAtPatch(event) {
  const [rows, columns] = current.site.grid;
  const { width, height } = $("drawing").getBoundingClientRect();
  const row = Math.min(rows - 1, Math.max(0, Math.floor((event.offsetY / height) * rows)));
  const column = Math.min(columns - 1, Math.max(0, Math.floor((event.offsetX / width) * columns)));
  if (current.patch !== row * columns + column) {
    current.patch = row * columns + column;
    showDrawing();
  }
}

function connectDropping() {
  const area = $("drop");
  addEventListener("dragover", (event) => {
    event.preventDefault();
    area.classList.add("over");
  });
  addEventListener("dragleave", () => area.classList.remove("over"));
  addEventListener("drop", (event) => {
    event.preventDefault();
    area.classList.remove("over");
    const [file] = event.dataTransfer.files;
    if (file) {
      takeFile(file, file.name);
    }
  });
}

function connectControls() {
  const { models, examples } = current.site;
  $("layer").max = models.unfused.tokens.length;
  $("layer").value = $("layer").max;
  $("fusion").checked = "fused" in models;
  $("fusion").disabled = !("fused" in models);
  $("file").addEventListener("change", () => {
    const [file] = $("file").files;
    $("file").value = ""; // so that the same file can be chosen again
    if (file) {
      takeFile(file, file.name);
    }
  });
  $("camera").addEventListener("click", switchCamera);
  $("fusion").addEventListener("change", () => ask(!camera.isOn));
  $("layer").addEventListener("input", () => current.answer && showDrawing());
  $("drawing").addEventListener("pointermove", pointAtPatch);
  $("drawing").addEventListener("pointerdown", pointAtPatch);
  $("drawing").addEventListener("keydown", movePatch);
  connectDropping();
  for (const path of examples) {
    const button = Object.assign(document.createElement("button"), { type: "button" });
    button.append(Object.assign(document.createElement("img"), { src: path, alt: path.split("/").at(-1) }));
    button.addEventListener("click", () => takeExample(path));
    $("examples").append(button);
  }
}

async function keepForLater() {
  if (!navigator.serviceWorker) {
    return; // browsers allow it only on pages with https, and on this device's own
  }
  try {
    await navigator.serviceWorker.register("service_worker.js");
    await navigator.serviceWorker.ready;
    $("offline").hidden = false;
  } catch (error) {
    showError(new Error(`service_worker.js: this page will not open without a network (${error.message})`));
  }
}

async function start() {
  const response = await fetch("site.json", { cache: "no-cache" });
  if (!response.ok) {
    throw new Error(`site.json: this file of the page cannot be loaded (${response.status})`);
  }
  current.site = await response.json();
  document.title = $("title").textContent = current.site.title;
  connectControls();
  await classifier(modelName());
  $("status").textContent = "Ready: choose an image.";
  $("main").inert = false;
  if (current.site.examples.length > 0) {
    await takeExample(current.site.examples[0]);
  }
  await keepForLater();
}

start().catch((error) => {
  $("status").hidden = true;
  showError(error);
});
