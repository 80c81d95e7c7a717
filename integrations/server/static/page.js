// The page: asking, the library, adding documents. Whatever comes from users, models or documents is put in as text.

import { Refused, call, send, stream, useKey } from "./api.js";
import { draw, shape } from "./picture.js";

const at = (selector, within = document) => within.querySelector(selector);
const number = new Intl.NumberFormat("en");
const size = (bytes) => {
  const unit = bytes < 1e6 ? ["kB", 1e3] : bytes < 1e9 ? ["MB", 1e6] : ["GB", 1e9];
  return `${(bytes / unit[1]).toFixed(1)} ${unit[0]}`;
};
const seconds = (value) => (value < 10 ? `${value.toFixed(3)} s` : `${value.toFixed(1)} s`);
const counted = (count, noun) => `${number.format(count)} ${noun}${count === 1 ? "" : "s"}`;

function made(name, text = "", className = "") {
  const element = document.createElement(name);
  element.textContent = text;
  if (className) element.className = className;
  return element;
}

let model = null;
let listing = [];
let read = new Set();
let running = null;

// --- asking

at("#ask").addEventListener("submit", async (event) => {
  event.preventDefault();
  const question = at("#question").value.trim();
  if (!question || running) return;
  running = new AbortController();
  at("#send").hidden = true;
  at("#stop").hidden = false;
  at("#panes").hidden = at("#fairness").hidden = false;
  at("#sources").hidden = true;
  const panes = [...document.querySelectorAll(".pane")];
  panes.forEach((pane, index) => clear(pane, index ? "Waits for the other one …" : "Reading …"));
  const widest = { amount: 1 };
  for (const pane of panes) {
    if (running.signal.aborted) clear(pane, "Stopped.");
    else await answer(pane, question, widest, panes);
  }
  running = null;
  at("#send").hidden = false;
  at("#stop").hidden = true;
  at("#question").focus();
});

at("#stop").addEventListener("click", () => running?.abort());

function clear(pane, waiting) {
  const text = at(".answer", pane);
  text.textContent = waiting;
  text.className = "answer waiting";
  at(".problem", pane).textContent = "";
  at(".first", pane).textContent = at(".prompt", pane).textContent = "–";
  at(".bar", pane).replaceChildren();
  delete pane.dataset.tokens;
}

async function answer(pane, question, widest, panes) {
  const text = at(".answer", pane);
  const body = {
    model,
    messages: [{ role: "user", content: question }],
    mode: pane.dataset.mode,
    k: Number(at("#k").value) || 4,
    max_tokens: Number(at("#tokens").value) || 64,
  };
  text.textContent = "Reading …";
  let begun = false;
  try {
    for await (const part of stream(body, running.signal)) {
      const piece = part.choices[0]?.delta?.content ?? "";
      if (piece && !begun) text.textContent = "";
      begun ||= Boolean(piece);
      if (begun) text.className = "answer writing";
      if (piece) text.append(piece);
      const about = part.ctxdocs ?? part.usage?.ctxdocs;
      if (about) show(pane, about, panes, widest);
    }
    if (!begun) text.textContent = "(The model says nothing.)";
    text.className = begun ? "answer" : "answer waiting";
  } catch (error) {
    text.className = "answer";
    if (!begun) text.textContent = "";
    if (error.name === "AbortError") text.append(begun ? " … (stopped)" : "Stopped.");
    else at(".problem", pane).textContent = explained(error);
  }
}

function show(pane, about, panes, widest) {
  const { prompt_tokens: tokens, memory_slots: slots, sources } = about;
  at(".first", pane).textContent = seconds(about.time_to_first_token);
  at(".prompt", pane).textContent = slots
    ? `${counted(tokens, "token")} + ${counted(slots, "slot")}`
    : counted(tokens, "token");
  Object.assign(pane.dataset, { tokens, slots });
  widest.amount = Math.max(widest.amount, tokens + slots);
  panes.filter((each) => each.dataset.tokens).forEach((each) => bar(each, widest.amount));
  if (pane.dataset.mode === "memory" || at("#sources").hidden) showSources(sources);
}

/** Text tokens and memory slots on the scale of the longest prompt. */
function bar(pane, widest) {
  const [tokens, slots] = [Number(pane.dataset.tokens), Number(pane.dataset.slots)];
  const label = `${counted(tokens, "text token")}, ${counted(slots, "memory slot")}`;
  const svg = shape("svg", { viewBox: "0 0 100 16", preserveAspectRatio: "none", role: "img", "aria-label": label });
  const rect = (kind, from, amount) => shape("rect", { class: kind, x: (100 * from) / widest, width: (100 * amount) / widest, height: 16 });
  svg.append(rect("track", 0, widest), rect("slots", 0, slots), rect("tokens", slots, tokens));
  at(".bar", pane).replaceChildren(svg);
}

function showSources(sources) {
  read = new Set(sources.map((source) => source.document));
  paint();
  at("#sources").hidden = !sources.length;
  at("#sources ol").replaceChildren(
    ...sources.map((source, index) => {
      const details = made("details");
      const name = source.document.split("/").pop();
      const numbers = `chunk ${source.chunk}, ${counted(source.slots, "slot")} for ${counted(source.tokens, "token")}`;
      const summary = made("summary", `${index + 1}. ${name} `);
      summary.append(made("span", numbers, "note"));
      details.append(summary, made("div", source.text, "text"));
      const item = made("li");
      item.append(details);
      return item;
    }),
  );
}

// --- the library

async function refresh() {
  const documents = [];
  let page;
  do {
    const after = documents.length ? `&after=${documents.at(-1).id}` : "";
    page = await (await call(`/v1/documents?limit=1000${after}`)).json();
    documents.push(...page.data);
  } while (page.has_more && documents.length < 5000);
  listing = documents;
  const { documents: count, chunks, tokens, slots, memory_bytes: bytes } = page.library;
  const totals = [
    ["Documents", number.format(count)],
    ["Chunks", number.format(chunks)],
    ["Text", counted(tokens, "token")],
    ["Memories", counted(slots, "slot")],
    ["Ratio", slots ? `${(tokens / slots).toFixed(1)} tokens per slot` : "–"],
    ["Size of the memories", size(bytes)],
  ];
  at("#totals").replaceChildren(
    ...totals.map(([term, value]) => {
      const pair = made("div");
      pair.append(made("dt", term), made("dd", value));
      return pair;
    }),
  );
  at("#documents").replaceChildren(...documents.map(row));
  paint();
  return page.uploads;
}

function row(document_) {
  const { name, uri, tokens, slots, bytes, id } = document_;
  const ratio = slots ? (tokens / slots).toFixed(1) : "–";
  const line = made("tr");
  const first = made("td", name);
  first.title = uri;
  const remove = made("button", "Remove");
  remove.type = "button";
  remove.setAttribute("aria-label", `Remove ${name}`);
  remove.addEventListener("click", async () => {
    if (!confirm(`Remove ${name} from the library?`)) return;
    remove.disabled = true;
    try {
      await call(`/v1/documents/${id}`, { method: "DELETE" });
      await refresh();
    } catch (error) {
      remove.disabled = false;
      alert(explained(error));
    }
  });
  const last = made("td");
  last.append(remove);
  line.append(first, ...[number.format(tokens), number.format(slots), ratio, size(bytes)].map((each) => made("td", each)), last);
  return line;
}

function paint() {
  draw(at("#picture"), listing, read);
}

let painting = 0;
addEventListener("resize", () => {
  cancelAnimationFrame(painting);
  painting = requestAnimationFrame(paint);
});

// --- adding documents

const drop = at("#drop");
for (const kind of ["dragenter", "dragover"]) {
  drop.addEventListener(kind, (event) => {
    event.preventDefault();
    drop.classList.add("over");
  });
}
for (const kind of ["dragleave", "drop"]) drop.addEventListener(kind, () => drop.classList.remove("over"));
drop.addEventListener("drop", (event) => {
  event.preventDefault();
  addAll(event.dataTransfer.files);
});
// A file that misses the place must not replace the page.
for (const kind of ["dragover", "drop"]) addEventListener(kind, (event) => event.preventDefault());
at("#file").addEventListener("change", (event) => {
  addAll(event.target.files);
  event.target.value = "";
});

async function addAll(files) {
  for (const file of [...files]) await add(file);
}

function uploadLine(name) {
  const line = made("li");
  const state = made("span", "sending …", "note");
  const progress = made("progress");
  progress.max = 1;
  progress.setAttribute("aria-label", name);
  line.append(made("span", name, "name"), state, progress);
  at("#uploads").prepend(line);
  return { line, state, progress };
}

function failed({ line, state, progress }, message) {
  state.textContent = "not added";
  progress.remove();
  line.append(made("span", message, "problem"));
}

async function add(file) {
  const shown = uploadLine(file.name);
  try {
    const upload = await send(file, (part) => (shown.progress.value = part / 2));
    follow(upload.id, shown);
  } catch (error) {
    failed(shown, explained(error));
  }
}

/** Watch an upload until it is in the library; its first half was the way here. */
async function follow(id, shown) {
  for (;;) {
    let upload;
    try {
      upload = await (await call(`/v1/documents/${id}`)).json();
    } catch (error) {
      return failed(shown, explained(error));
    }
    shown.progress.value = 0.5 + upload.progress / 2;
    if (upload.status === "done") {
      shown.state.textContent = `in the library, ${counted(upload.chunks, "chunk")}`;
      shown.progress.remove();
      return refresh();
    }
    if (upload.status === "failed" || upload.status === "cancelled") return failed(shown, upload.error ?? "given up");
    shown.state.textContent =
      upload.status === "waiting" ? "waiting …" : `compressing, ${counted(upload.chunks, "chunk")} done …`;
    await new Promise((resolve) => setTimeout(resolve, 400));
  }
}

// --- beginning

function explained(error) {
  if (error instanceof Refused && error.status === 401) askForKey(error.message);
  return error instanceof TypeError ? "the server cannot be reached" : error.message;
}

function askForKey(message) {
  document.body.classList.add("locked");
  at("#key-form").hidden = false;
  at("#key-problem").textContent = sessionStorage.getItem("ctxdocs-key") ? message : "";
  at("#key").focus();
}

at("#key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  useKey(at("#key").value.trim());
  at("#key").value = "";
  begin();
});

async function begin() {
  try {
    const [answers] = (await (await call("/v1/models")).json()).data;
    model = answers.id;
    at("#about").textContent = `${model} (${answers.ctxdocs.method})`;
    at("#modest").hidden = answers.ctxdocs.checkpoint !== "bundled";
    at("#key-form").hidden = true;
    document.body.classList.remove("locked");
    const { access, max_new_tokens: tokens, max_sources: k } = answers.ctxdocs;
    at("#uploading").hidden = access !== "write";
    document.body.classList.toggle("read-only", access !== "write");
    at("#tokens").max = tokens;
    at("#k").max = k;
    for (const upload of await refresh()) {
      if (upload.status === "waiting" || upload.status === "compressing") follow(upload.id, uploadLine(upload.name));
    }
    at("#question").focus({ preventScroll: true });
  } catch (error) {
    at("#about").textContent = error.status === 401 ? "" : explained(error);
    if (error.status === 401) askForKey(error.message);
  }
}

begin();
