// The pictures of an answer: the browser lays the label map over the photo, so opacity and words need no new picture.
// Gradio gives: element, props (value: what Desk.answer returns), watch, server (the Desk's functions).
const one = (selector) => element.querySelector(selector);
const all = (selector) => [...element.querySelectorAll(selector)];
const percent = (share) => (share > 0 && share < 0.0005 ? "<0.1 %" : `${(100 * share).toFixed(1)} %`);
const REST = 70; // milliseconds that the pointer rests before its pixel is asked for
const TOUCH = window.matchMedia("(hover: none)").matches;
const HINT = TOUCH
  ? "Tap the picture to read a pixel's labels."
  : "Point at the picture, or move the cross with the arrow keys, to read a pixel's labels.";

let found = null; // the answer shown
let heat = -1; // index of the label whose heat map is shown
let place = null; // [x, y], the pixel that was asked for last
let pinned = false; // by a click: the pointer no longer moves the cross
let timer = 0;

function make(tag, className, text) {
  const node = document.createElement(tag);
  node.className = className;
  if (text !== undefined) node.textContent = text;
  return node;
}

function swatch(colour) {
  const node = make("i", "swatch");
  node.style.background = colour;
  return node;
}

async function ask(name, request) {
  try {
    const reply = await server[name]({ key: found.key, ...request });
    if (!reply || reply.error) throw new Error(reply?.error || "the server did not answer");
    return reply;
  } catch (error) {
    one(".pixel").replaceChildren(make("span", "at", `Sorry: ${error.message}`));
    return null;
  }
}

function show() {
  const value = props.value;
  one(".empty").hidden = Boolean(value);
  one(".result").hidden = !value;
  if (!value) return;
  const another = found?.key !== value.key;
  found = value;
  const [width, height] = value.size;
  // Very long photos are squeezed a little, to stay visible.
  one(".stages").style.setProperty("--ratio", Math.min(6, Math.max(1 / 4, width / height)));
  one("img.map").src = value.map;
  if (another) {
    place = null; pinned = false; heat = -1;
    showPhoto(value.key);
  }
  const name = heat >= 0 ? element.dataset.heat : null;
  heat = value.labels.findIndex((label) => label.name === name);
  drawLegend();
  drawLines(value.map);
  if (heat >= 0 && value.whole) showHeat(heat); else showTint();
  one(".notes").replaceChildren(...value.notes.map((note) => make("li", "", note)));
  one(".ran").textContent = ran(value);
  if (another && window.innerWidth < 700) element.scrollIntoView({ behavior: "smooth" });
  if (place) readPixel(); else { moveCross(); one(".pixel").replaceChildren(make("span", "at", HINT)); }
}

async function showPhoto(key) {
  for (const image of all("img.photo")) image.removeAttribute("src");
  const reply = await ask("photo", {});
  if (reply && found.key === key) for (const image of all("img.photo")) image.src = reply.url;
}

function ran(value) {
  const stages = Object.entries(value.stages).map(([stage, time]) => `${stage} ${time.toFixed(1)}`).join(", ");
  const kept = value.kept ? " The photo's embeddings were kept: the network did not run." : "";
  const again = value.whole ? "" : " In windows nothing is kept: other words run the network again, and there are no " +
    "heat maps.";
  return `${value.ran}. Milliseconds: ${stages}.${kept}${again}`;
}

function drawLegend() {
  const order = found.labels.map((label, index) => ({ ...label, index })).sort((a, b) => b.share - a.share);
  one(".legend").replaceChildren(...order.map((label) => {
    const button = make("button", label.share > 0 ? "" : "absent");
    button.type = "button";
    button.dataset.index = label.index;
    button.setAttribute("aria-pressed", label.index === heat);
    button.append(swatch(label.colour), make("span", "name", label.name), make("span", "share", percent(label.share)));
    return button;
  }));
}

function showTint() {
  heat = -1;
  one("img.tint").src = found.map;
  one(".lines").hidden = false;
  one(".caption").textContent = found.whole ? "overlay (choose a label below to see its heat map)" : "overlay";
  pressed();
}

async function showHeat(index) {
  const reply = await ask("heat", { index });
  if (!reply) return showTint();
  heat = index;
  element.dataset.heat = found.labels[index].name;
  one("img.tint").src = reply.map;
  one(".lines").hidden = true;
  one(".caption").textContent =
    `heat map of “${found.labels[index].name}”: ` +
    `cosine ${reply.low.toFixed(2)} (dark) to ${reply.high.toFixed(2)} (bright)`;
  pressed();
}

function pressed() {
  for (const button of all(".legend button")) {
    button.setAttribute("aria-pressed", Number(button.dataset.index) === heat);
  }
}

// White lines between regions, as the picture for download has them.
async function drawLines(source) {
  const image = new Image();
  image.src = source;
  await image.decode();
  if (source !== found.map) return;
  const canvas = one(".lines");
  const [width, height] = [(canvas.width = image.naturalWidth), (canvas.height = image.naturalHeight)];
  const context = canvas.getContext("2d", { willReadFrequently: true });
  context.drawImage(image, 0, 0);
  const data = context.getImageData(0, 0, width, height);
  const labels = new Uint32Array(data.data.buffer.slice(0));
  const lines = new Uint32Array(data.data.buffer);
  for (let row = 0, at = 0; row < height; row++) {
    for (let column = 0; column < width; column++, at++) {
      const edge = (column + 1 < width && labels[at] !== labels[at + 1]) ||
        (row + 1 < height && labels[at] !== labels[at + width]);
      lines[at] = edge ? 0xbfffffff : 0;
    }
  }
  context.putImageData(data, 0, 0);
}

function moveCross() {
  for (const cross of all(".cross")) {
    cross.style.display = place ? "block" : "none";
    if (!place) continue;
    cross.style.left = `${(100 * (place[0] + 0.5)) / found.size[0]}%`;
    cross.style.top = `${(100 * (place[1] + 0.5)) / found.size[1]}%`;
  }
}

async function readPixel() {
  moveCross();
  const [x, y] = place;
  const reply = await ask("pixel", { x, y });
  if (!reply || !place || place[0] !== x || place[1] !== y) return;
  const scores = reply.scores.map((score) => {
    const node = make("span", "");
    node.append(swatch(score.colour), make("span", "", score.name), make("span", "cosine", score.cosine.toFixed(3)));
    return node;
  });
  const where = make("span", "at", `pixel ${x}, ${y}${pinned && !TOUCH ? " (held; click to let go)" : ""}`);
  one(".pixel").replaceChildren(where, ...scores);
}

function pointAt(event) {
  const box = event.currentTarget.getBoundingClientRect();
  const inside = (share, length) => Math.min(length - 1, Math.max(0, Math.floor(share * length)));
  place = [
    inside((event.clientX - box.left) / box.width, found.size[0]),
    inside((event.clientY - box.top) / box.height, found.size[1]),
  ];
  moveCross();
}

for (const stage of all(".stage")) {
  stage.addEventListener("pointermove", (event) => {
    if (!found || pinned || event.pointerType === "touch") return;
    pointAt(event);
    clearTimeout(timer);
    timer = setTimeout(readPixel, REST);
  });
  stage.addEventListener("click", (event) => {
    if (!found) return;
    pinned = event.pointerType === "touch" || !pinned;
    pointAt(event);
    clearTimeout(timer);
    readPixel();
  });
}

one(".large .stage").addEventListener("keydown", (event) => {
  const step = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key];
  if (!step || !found) return;
  event.preventDefault();
  const far = event.shiftKey ? 0.1 : 0.01;
  place = (place || found.size.map((side) => side >> 1)).map((at, axis) => {
    const moved = at + step[axis] * Math.max(1, Math.round(far * found.size[axis]));
    return Math.min(found.size[axis] - 1, Math.max(0, moved));
  });
  pinned = true;
  moveCross();
  clearTimeout(timer);
  timer = setTimeout(readPixel, REST);
});

one(".legend").addEventListener("click", (event) => {
  const button = event.target.closest("button");
  if (!button) return;
  const index = Number(button.dataset.index);
  if (index === heat) showTint(); else showHeat(index);
});

function setOpacity() {
  const value = one(".opacity input").value;
  one(".opacity output").textContent = `${value} %`;
  one("img.tint").style.opacity = value / 100;
  one(".lines").style.opacity = value > 0 ? 1 : 0;
}
one(".opacity input").addEventListener("input", setOpacity);

one(".files").addEventListener("click", async (event) => {
  const kind = event.target.dataset.file;
  if (!kind) return;
  const reply = await ask("download", { kind, opacity: one(".opacity input").value / 100 });
  if (!reply) return;
  const link = make("a", "");
  link.href = reply.url;
  link.download = reply.name;
  link.click();
});

setOpacity();
watch("value", show);
show();
