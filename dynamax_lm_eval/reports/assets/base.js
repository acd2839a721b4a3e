// What all parts of the page use: the data, elements, numbers as texts, colours as the theme has them.
const byId = (id) => document.getElementById(id);
// Base64 of gzip, as page.packed makes it.
async function unpack(id) {
  const bytes = Uint8Array.from(atob(byId(id).textContent.trim()), (letter) => letter.charCodeAt(0));
  return new Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"))).text();
}

const data = JSON.parse(await unpack("data"));

const element = (name, attributes = {}, ...children) => {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (key === "style") for (const [property, text] of Object.entries(value)) made.style.setProperty(property, text);
    else if (value !== undefined && value !== false) made.setAttribute(key, value === true ? "" : value);
  }
  made.append(...children.filter((child) => child !== null && child !== undefined));
  return made;
};
const drawing = (name, attributes, ...children) => {
  const made = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children);
  return made;
};
const fill = (select, pairs, value) => {
  select.replaceChildren(...pairs.map(([key, text]) => element("option", { value: key }, text)));
  if (value !== undefined) select.value = value;
};

const known = (value) => value !== null && value !== undefined;
const number = (value, digits = 3) => (known(value) ? value.toFixed(digits).replace("-", "−") : "");
const range = (low, high, digits = 3) => (known(low) && known(high) ? `[${number(low, digits)}, ${number(high, digits)}]` : "");
const times = (value) => (known(value) ? `${number(value)}×` : "");
const percent = (value) => (known(value) ? `${(100 * value).toFixed(0)} %` : "");
const plural = (count, word) => `${count} ${word}${count === 1 ? "" : "s"}`;
const titleOf = (point) => (point.family === "full" ? "full model" : `${point.line}, ${point.setting}`);

const systemIsDark = window.matchMedia("(prefers-color-scheme: dark)");
const isDark = () => (byId("theme").value === "auto" ? systemIsDark.matches : byId("theme").value === "dark");
// Plotly wants colours, not names of them.
const colour = (name) => {
  const probe = element("span", { style: { color: `var(--${name})` } });
  document.body.append(probe);
  const found = getComputedStyle(probe).color;
  probe.remove();
  return found;
};

// Lines are told apart by colour, dash and marker; markers are drawn in a box of 12 by 12 around 0.
const markers = [
  ["circle", "M-5,0a5,5 0 1,0 10,0a5,5 0 1,0 -10,0Z"], ["square", "M-4.5,-4.5H4.5V4.5H-4.5Z"], ["triangle-up", "M0,-5.5L5.5,4.5H-5.5Z"],
  ["diamond", "M0,-6L6,0L0,6L-6,0Z"], ["triangle-down", "M0,5.5L5.5,-4.5H-5.5Z"],
  ["cross", "M-2,-5.5H2V-2H5.5V2H2V5.5H-2V2H-5.5V-2H-2Z"], ["x", "M-5,-3L-3,-5L0,-2L3,-5L5,-3L2,0L5,3L3,5L0,2L-3,5L-5,3L-2,0Z"],
  ["triangle-left", "M-5.5,0L4.5,5.5V-5.5Z"], ["triangle-right", "M5.5,0L-4.5,5.5V-5.5Z"], ["hexagon", "M-5.5,0L-2.7,4.8H2.7L5.5,0L2.7,-4.8H-2.7Z"],
  ["pentagon", "M0,-5.5L5.2,-1.7L3.2,4.5H-3.2L-5.2,-1.7Z"],
];
const star = "M0,-7L1.8,-2.2L6.8,-2.2L2.8,1L4.2,5.8L0,3L-4.2,5.8L-2.8,1L-6.8,-2.2L-1.8,-2.2Z";
const dashes = [["solid", ""], ["dash", "7 4"], ["dashdot", "7 3 2 3"], ["dot", "2 3"], ["longdash", "11 4"], ["longdashdot", "11 3 2 3"]];
function styleOf(line) {
  const i = task().lines.indexOf(line), [light, dark] = data.colours[(i < 0 ? 0 : i) % data.colours.length];
  const [symbol, path] = markers[(i < 0 ? 0 : i) % markers.length], [dash, array] = dashes[(i < 0 ? 0 : i) % dashes.length];
  return { colour: isDark() ? dark : light, both: `light-dark(${light}, ${dark})`, symbol, path, dash, array };
}
function markOf(point) {
  const style = styleOf(point.line), isFull = point.family === "full";
  const path = drawing("path", { d: isFull ? star : style.path, "stroke-width": 1.5 });
  const ink = isFull ? "var(--ink)" : style.both;
  path.style.stroke = ink;
  path.style.fill = point.valid ? ink : "none";
  return drawing("svg", { class: "mark", viewBox: "-7 -7 14 14", "aria-hidden": "true" }, path);
}
