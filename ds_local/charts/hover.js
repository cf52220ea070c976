// Values of the curves under the pointer. The data of every chart is in the element #data, in the
// units of its drawing.
"use strict";
(() => {
  const tip = document.getElementById("tip");
  for (const chart of JSON.parse(document.getElementById("data").textContent)) {
    const svg = document.querySelector("#" + chart.id + " svg");
    const line = document.createElementNS("http://www.w3.org/2000/svg", "line");
    line.setAttribute("class", "strong");
    line.setAttribute("y1", chart.top);
    line.setAttribute("y2", chart.bottom);
    line.setAttribute("visibility", "hidden");
    svg.append(line);
    const share = value => (100 * value).toPrecision(3) + " %";
    const short = value => value === null ? "-" : chart.percent ? share(value) : String(+value.toPrecision(5));
    svg.addEventListener("mousemove", event => {
      const box = svg.getBoundingClientRect();
      const at = (event.clientX - box.left) * chart.width / box.width;
      const x = chart.from + (at - chart.left) / (chart.right - chart.left) * (chart.to - chart.from);
      if (at < chart.left || at > chart.right) return hide();
      const near = chart.curves.map(curve => curve.points.reduce(
        (best, p) => Math.abs(p[0] - x) < Math.abs(best[0] - x) ? p : best));
      const first = near.reduce((best, p) => Math.abs(p[0] - x) < Math.abs(best[0] - x) ? p : best);
      const place = chart.left + (first[0] - chart.from) / (chart.to - chart.from || 1) * (chart.right - chart.left);
      line.setAttribute("x1", place);
      line.setAttribute("x2", place);
      line.setAttribute("visibility", "visible");
      const lines = near.map((p, n) => (chart.curves[n].name + "  " + short(p[1])).trim());
      tip.textContent = [chart.x + " " + (+first[0].toPrecision(7)).toLocaleString("en"), ...lines].join("\n");
      tip.hidden = false;
      const right = document.documentElement.clientWidth - tip.offsetWidth - 8;
      tip.style.left = Math.min(event.pageX + 14, right) + "px";
      tip.style.top = event.pageY + 16 + "px";
    });
    const hide = () => { tip.hidden = true; line.setAttribute("visibility", "hidden"); };
    svg.addEventListener("mouseleave", hide);
  }
})();
