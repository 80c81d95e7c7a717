// The library as a picture: an area for every document, and in it the area of its memory.

const SVG = "http://www.w3.org/2000/svg";
const MOST = 90;

export function shape(name, attributes, ...children) {
  const element = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  element.append(...children);
  return element;
}

function words(name, text, attributes = {}) {
  const element = shape(name, attributes);
  element.textContent = text;
  return element;
}

/** Lay values out in a rectangle, each with its area, as nearly square as may be (squarified treemap). */
export function squarified(values, width, height) {
  const total = values.reduce((sum, value) => sum + value, 0) || 1;
  const areas = values.map((value) => (value / total) * width * height);
  const places = [];
  let [x, y, w, h, start] = [0, 0, width, height, 0];
  while (start < areas.length) {
    const side = Math.min(w, h);
    let [end, sum, worst] = [start, 0, Infinity];
    while (end < areas.length) {
      const next = sum + areas[end];
      const ratio = Math.max((side * side * areas[start]) / (next * next), (next * next) / (side * side * areas[end]));
      if (ratio > worst) break;
      [sum, worst, end] = [next, ratio, end + 1];
    }
    const thick = sum / side;
    let along = 0;
    for (const area of areas.slice(start, end)) {
      const long = area / thick;
      places.push(w >= h ? { x, y: y + along, w: thick, h: long } : { x: x + along, y, w: long, h: thick });
      along += long;
    }
    if (w >= h) [x, w] = [x + thick, w - thick];
    else [y, h] = [y + thick, h - thick];
    start = end;
  }
  return places;
}

/** Draw documents into an `svg` element; `read` holds the uris of those that were read last. */
export function draw(svg, documents, read) {
  const { width, height } = svg.getBoundingClientRect();
  if (!width || !height) return;
  svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
  svg.replaceChildren();
  const shown = documents.filter((each) => each.tokens > 0).sort((a, b) => b.tokens - a.tokens);
  const rest = shown.splice(MOST);
  if (rest.length) {
    const sum = (key) => rest.reduce((total, each) => total + each[key], 0);
    shown.push({ name: `${rest.length} more`, uri: "", tokens: sum("tokens"), slots: sum("slots") });
    shown.sort((a, b) => b.tokens - a.tokens);
  }
  svg.setAttribute("aria-label", `${documents.length} documents by size; the table below lists them`);
  const front = [];
  squarified(shown.map((each) => each.tokens), width, height).forEach((place, index) => {
    const each = shown[index];
    const group = shape("g", { class: read.has(each.uri) ? "read" : "" });
    const ratio = each.slots ? ` (${(each.tokens / each.slots).toFixed(1)} tokens per slot)` : "";
    group.append(words("title", `${each.name}: ${each.tokens} tokens, ${each.slots} slots${ratio}`));
    group.append(shape("rect", { class: "tile", x: place.x, y: place.y, width: place.w, height: place.h }));
    const scale = Math.sqrt(Math.min(1, each.slots / each.tokens));
    const [w, h] = [place.w * scale, place.h * scale];
    group.append(shape("rect", { class: "memory", x: place.x + 1, y: place.y + place.h - h - 1, width: w, height: h }));
    const room = Math.floor((place.w - 12) / 7.2);
    if (room >= 7 && place.h - h > 24) {
      const label = each.name.length > room ? `${each.name.slice(0, room - 1)}…` : each.name;
      group.append(words("text", label, { x: place.x + 7, y: place.y + 18 }));
    }
    if (read.has(each.uri)) front.push(group);
    else svg.append(group);
  });
  svg.append(...front);
}
