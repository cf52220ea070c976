// An interactive time line: bands of lanes on one time axis. Wheel or + and - zoom, dragging or the
// arrow keys move, pointing at a piece says what it is. The data is in the element #data.
"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const canvas = document.getElementById("lanes"), tip = document.getElementById("tip");
  const pen = canvas.getContext("2d");
  const LEFT = 70, RIGHT = 16, HEAD = 34, LANE = 26, FOOT = 30;
  const [STAGE, STEP, KIND, START, END, NAME, TIP] = [0, 1, 2, 3, 4, 5, 6];
  let from = 0, to = data.end, width = 0;

  const lanes = [];  // {band, stage, top, pieces in the order of time}
  let height = 0;
  for (const band of data.bands) {
    band.top = height;
    height += HEAD;
    for (let stage = 0; stage < band.stages; stage++, height += LANE) {
      const pieces = band.pieces.filter(p => p[STAGE] === stage).sort((a, b) => a[START] - b[START]);
      lanes.push({band, stage, top: height, pieces});
    }
  }
  height += FOOT;

  const color = name => getComputedStyle(document.documentElement).getPropertyValue("--" + name);
  const scale = () => (width - LEFT - RIGHT) / (to - from);
  const short = value => String(+value.toPrecision(6));

  function draw() {
    const sharp = window.devicePixelRatio || 1;
    width = canvas.clientWidth;
    canvas.width = width * sharp;
    canvas.height = height * sharp;
    canvas.style.height = height + "px";
    pen.setTransform(sharp, 0, 0, sharp, 0, 0);
    pen.clearRect(0, 0, width, height);
    pen.textBaseline = "middle";
    for (const band of data.bands) {
      text(band.title, 12, band.top + 20, "ink", "left", "600 14px system-ui, sans-serif");
      pen.font = "600 14px system-ui, sans-serif";
      const room = width - RIGHT - pen.measureText(band.title).width - 40;
      pen.font = "12.5px system-ui, sans-serif";
      const fits = pen.measureText(band.note).width < room;
      text(fits ? band.note : band.note.split("; ").pop(), width - RIGHT, band.top + 20, "faint", "right");
    }
    for (const lane of lanes) drawLane(lane);
    drawAxis();
  }

  function text(words, x, y, name, align, font = "12.5px system-ui, sans-serif") {
    pen.font = font;
    pen.textAlign = align;
    pen.fillStyle = color(name);
    pen.fillText(words, x, y);
  }

  function drawLane(lane) {
    text("stage " + lane.stage, LEFT - 8, lane.top + LANE / 2, "faint", "right", "11.5px system-ui, sans-serif");
    pen.fillStyle = color("track");
    const last = lane.band.end, x1 = Math.min(place(last), width - RIGHT);
    if (x1 > LEFT) pen.fillRect(LEFT, lane.top + 2, x1 - LEFT, LANE - 4);
    pen.save();
    pen.beginPath();
    pen.rect(LEFT, lane.top, width - LEFT - RIGHT, LANE);
    pen.clip();
    pen.font = "11px system-ui, sans-serif";
    pen.textAlign = "center";
    for (const piece of lane.pieces) {
      if (piece[END] < from || piece[START] > to) continue;
      const x = place(piece[START]), long = place(piece[END]) - x;
      const [, fill, ink] = data.kinds[piece[KIND]];
      pen.globalAlpha = piece[STEP] % 2 ? 0.62 : 1;
      pen.fillStyle = fill;
      pen.fillRect(x, lane.top + 2, Math.max(long - (long > 3 ? 1 : 0), 0.5), LANE - 4);
      pen.globalAlpha = 1;
      if (long > 3 + 6 * piece[NAME].length) {
        pen.fillStyle = ink;
        pen.fillText(piece[NAME], x + long / 2, lane.top + LANE / 2 + 1);
      }
    }
    pen.restore();
  }

  function place(time) { return LEFT + (time - from) * scale(); }

  function drawAxis() {
    const rough = (to - from) / Math.max(2, width / 110);
    const power = 10 ** Math.floor(Math.log10(rough));
    const step = [1, 2, 5, 10].map(m => m * power).find(s => s >= rough * 0.999);
    const y = height - FOOT + 4;
    for (let n = Math.ceil(from / step - 1e-9); n * step <= to + 1e-9 * step; n++) {
      const x = place(n * step);
      pen.fillStyle = color("edge");
      pen.fillRect(x, y, 1, 5);
      text(short(n * step), x, y + 14, "faint", "center", "11px system-ui, sans-serif");
    }
  }

  function zoom(factor, at) {
    const span = Math.min(Math.max((to - from) * factor, data.end * 1e-5), data.end);
    const share = (at - from) / (to - from);
    move(at - share * span, span);
  }

  function move(start, span = to - from) {
    from = Math.min(Math.max(start, 0), data.end - span);
    to = from + span;
    draw();
  }

  function find(x, y) {
    const lane = lanes.find(l => y >= l.top && y < l.top + LANE);
    if (!lane || x < LEFT || x > width - RIGHT) return null;
    const time = from + (x - LEFT) / scale();
    const at = lane.pieces.findIndex(p => p[END] > time);
    const piece = lane.pieces[at];
    const where = lane.band.title + " \u00b7 stage " + lane.stage + " \u00b7 ";
    if (piece && piece[START] <= time) {
      const span = short(piece[START]) + " to " + short(piece[END]) + " (" + short(piece[END] - piece[START]) + ")";
      return where + "step " + (piece[STEP] + 1) + " \u00b7 " + data.tips[piece[TIP]] + " \u00b7 " + span;
    }
    if (time > lane.band.end) return null;
    const begins = at > 0 ? lane.pieces[at - 1][END] : at < 0 ? lane.pieces.at(-1)[END] : 0;
    const ends = piece ? piece[START] : lane.band.end;
    return where + "idle \u00b7 " + short(begins) + " to " + short(ends) + " (" + short(ends - begins) + ")";
  }

  let grabbed = null;
  canvas.addEventListener("mousemove", event => {
    if (grabbed !== null) move(grabbed.from - (event.offsetX - grabbed.x) / scale());
    const found = find(event.offsetX, event.offsetY);
    tip.textContent = found || "";
    tip.hidden = !found;
    tip.style.left = Math.min(event.pageX + 14, document.documentElement.clientWidth - tip.offsetWidth - 8) + "px";
    tip.style.top = event.pageY + 16 + "px";
  });
  canvas.addEventListener("mousedown", event => { grabbed = {x: event.offsetX, from}; });
  window.addEventListener("mouseup", () => { grabbed = null; });
  canvas.addEventListener("mouseleave", () => { tip.hidden = true; });
  canvas.addEventListener("wheel", event => {
    event.preventDefault();
    zoom(event.deltaY > 0 ? 1.25 : 0.8, from + (event.offsetX - LEFT) / scale());
  }, {passive: false});
  const actions = {
    in: () => zoom(0.5, (from + to) / 2),
    out: () => zoom(2, (from + to) / 2),
    back: () => move(from - (to - from) / 4),
    on: () => move(from + (to - from) / 4),
    whole: () => move(0, data.end),
  };
  const keys = {"+": "in", "=": "in", "-": "out", ArrowLeft: "back", ArrowRight: "on", "0": "whole"};
  window.addEventListener("keydown", event => {
    if (event.key in keys) { event.preventDefault(); actions[keys[event.key]](); }
  });
  for (const button of document.querySelectorAll("button[data-do]"))
    button.addEventListener("click", () => actions[button.dataset.do]());
  window.addEventListener("resize", draw);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
  draw();
})();
