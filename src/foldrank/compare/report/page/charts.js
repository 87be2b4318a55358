"use strict";
// Draws the figures in the colours of the page, again whenever these change, with a legend of check boxes.
const figures = JSON.parse(document.getElementById("figures").textContent);
const chosen = {};
const hidden = {};

function colour(name) {
  const [key, soft] = name.slice(1).split("-");
  const style = getComputedStyle(document.documentElement);
  const value = style.getPropertyValue(key === "ink" ? "--ink" : `--series-${key}`).trim();
  return soft ? `${value}2e` : value;
}

function coloured(value) {
  if (typeof value === "string") return /^@/.test(value) ? colour(value) : value;
  if (Array.isArray(value)) return value.map(coloured);
  if (value && typeof value === "object") {
    return Object.fromEntries(Object.entries(value).map(([key, entry]) => [key, coloured(entry)]));
  }
  return value;
}

function axis(own, style) {
  const line = style.getPropertyValue("--line").trim();
  return { gridcolor: line, linecolor: line, zerolinecolor: style.getPropertyValue("--quiet").trim(),
    automargin: true, fixedrange: false, ...own };
}

const height = (figure) => figure.layout.height ?? 380;

function draw(id) {
  const figure = coloured(figures[id][chosen[id] ?? 0]);
  const style = getComputedStyle(document.documentElement);
  const data = figure.data.map((trace) => ({ ...trace, type: "scatter", visible: !hidden[id]?.has(trace.name) }));
  const layout = {
    ...figure.layout, height: height(figure),
    xaxis: axis(figure.layout.xaxis, style), yaxis: axis(figure.layout.yaxis, style),
    font: { family: getComputedStyle(document.body).fontFamily, size: 12, color: style.getPropertyValue("--quiet").trim() },
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
    margin: { l: 8, r: 16, t: 12, b: 8 }, showlegend: false, hovermode: "closest",
    // A finger that drags scrolls the page.
    dragmode: matchMedia("(pointer: coarse)").matches ? false : "zoom",
  };
  return Plotly.react(id, data, layout, { responsive: true, displayModeBar: false });
}

const SVG = "http://www.w3.org/2000/svg";
const DASHES = { dash: "6 3", dot: "2 2" };
const SHAPES = {
  circle: "M14 2a4 4 0 1 1 0 8a4 4 0 1 1 0-8z", square: "M10 2h8v8h-8z", diamond: "M14 1l5 5l-5 5l-5-5z",
  "triangle-up": "M14 1l5 9h-10z", "triangle-down": "M14 11l5-9h-10z", cross: "M12 2h4v2h3v4h-3v2h-4v-2h-3v-4h3z",
  star: "M14 0l1.8 4h4.2l-3.4 2.7l1.3 4.3l-3.9-2.6l-3.9 2.6l1.3-4.3l-3.4-2.7h4.2z",
  hexagon: "M14 1l4.5 2.5v5l-4.5 2.5l-4.5-2.5v-5z",
};

function swatch(trace) {
  const picture = document.createElementNS(SVG, "svg");
  const parts = [["path", { d: SHAPES[(trace.marker?.symbol ?? "circle").replace("-open", "")] ?? SHAPES.diamond }]];
  if (trace.line) parts.unshift(["line", { x1: 0, x2: 28, y1: 6, y2: 6, "stroke-width": 2, "stroke-dasharray": DASHES[trace.line.dash] ?? "" }]);
  for (const [key, value] of Object.entries({ width: 28, height: 12, "aria-hidden": "true" })) picture.setAttribute(key, value);
  for (const [tag, attributes] of parts) {
    const part = document.createElementNS(SVG, tag);
    for (const [key, value] of Object.entries(attributes)) part.setAttribute(key, value);
    const paint = (trace.marker ?? trace.line).color.replace("@", "var(--series-") + ")";
    part.style.stroke = paint;
    if (tag === "path") part.style.fill = trace.marker?.symbol?.endsWith("-open") ? "none" : paint;
    picture.append(part);
  }
  return picture;
}

function legend(id) {
  const box = document.getElementById(id).closest("figure").querySelector(".legend");
  const traces = new Map(figures[id].flatMap((view) => view.data).filter((trace) => trace.meta !== "band").map((trace) => [trace.name, trace]));
  hidden[id] = new Set();
  for (const [name, trace] of traces) {
    const label = document.createElement("label");
    const tick = Object.assign(document.createElement("input"), { type: "checkbox", checked: true });
    tick.addEventListener("change", () => {
      hidden[id][tick.checked ? "delete" : "add"](name);
      draw(id);
    });
    label.append(tick, swatch(trace), name);
    box.append(label);
  }
}

// A chart is drawn when it comes near the window: a study can have a hundred.
const drawn = new Set();
const near = new IntersectionObserver((entries) => {
  for (const { target, isIntersecting } of entries) {
    if (isIntersecting) {
      near.unobserve(target);
      drawn.add(target.id);
      draw(target.id);
    }
  }
}, { rootMargin: "800px" });

for (const id of Object.keys(figures)) {
  legend(id);
  const plot = document.getElementById(id);
  const figure = plot.closest("figure");
  plot.style.minHeight = `${height(figures[id][0])}px`;
  figure.querySelector(".controls").hidden = false;
  figure.querySelector("select")?.addEventListener("change", (event) => {
    chosen[id] = Number(event.target.value);
    draw(id);
  });
  near.observe(plot);
}
const again = () => drawn.forEach(draw);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", again);
// Paper is white, and shows everything.
addEventListener("beforeprint", () => {
  document.documentElement.dataset.print = "yes";
  Object.keys(figures).forEach((id) => drawn.add(id));
  again();
});
addEventListener("afterprint", () => { delete document.documentElement.dataset.print; again(); });
