"use strict";

// Follows the stack: asks the admin server for /state once a second, and sends prompts through it.

const EVERY = 1000; // ms between two looks
const SHOW_DEATH = 3000; // ms for which a replaced service stays red, so that the eye catches it
const KINDS = ["free", "cached", "used", "shared"];
const $ = (id) => document.getElementById(id);

const percent = (share) => `${Math.round(share * 100)} %`;
const whole = (number) => Math.round(number).toLocaleString("en");

function duration(seconds) {
  if (!seconds) return "–";
  if (seconds < 0.001) return `${Math.round(seconds * 1e6)} µs`;
  return seconds < 1 ? `${(seconds * 1e3).toPrecision(3)} ms` : `${seconds.toFixed(2)} s`;
}

function element(name, text = "", className = "") {
  const made = document.createElement(name);
  made.textContent = text;
  made.className = className;
  return made;
}

// ---------------------------------------------------------------- the picture

const history = [];

function showFigures({ now, minute, totals }) {
  const texts = {
    throughput: whole(now.throughput),
    ttft: duration(minute.time_to_first_token),
    tpot: duration(minute.time_per_output_token),
    waiting: whole(totals.requests_waiting),
    running: whole(totals.requests_running),
    preempted: whole(totals.preemptions),
    finished: whole(totals.requests_finished),
    hits: totals.prefix_queries ? percent(totals.prefix_hits / totals.prefix_queries) : "–",
    plans: `${whole(totals.plans_in_flight)}, depth ${whole(totals.depth)}`,
    busy: now.busy_share ? percent(now.busy_share) : "–",
    utilization: percent(now.gpu_utilization),
    memory: percent(now.memory_usage),
  };
  for (const [id, text] of Object.entries(texts)) $(id).textContent = text;
  history.push(now.throughput);
  if (history.length > 120) history.shift();
  const top = Math.max(1, ...history);
  const points = history.map((value, i) => `${120 - history.length + i + 1},${(29 - (27 * value) / top).toFixed(1)}`);
  $("history").firstElementChild.setAttribute("points", points.join(" "));
  $("peak").textContent = `Tokens per second in the last two minutes, at most ${whole(Math.max(...history))}`;
}

const known = new Map(); // name → {pid, diedAt}

function showServices(services) {
  const at = performance.now();
  const rows = services.map((service) => {
    const before = known.get(service.name);
    let diedAt = before ? before.diedAt : -Infinity;
    if (service.state === "gone" || (before && before.pid !== service.pid)) diedAt = at;
    known.set(service.name, { pid: service.pid, diedAt });
    const gone = at - diedAt < SHOW_DEATH;
    const state = gone ? "gone" : service.state === "ready" ? "ready" : "between";
    const row = element("tr", "", gone ? "gone" : "");
    row.dataset.name = service.name;
    row.append(
      element("td", service.name),
      element("td", gone && service.state !== "gone" ? `died · ${service.state}` : service.state, `state ${state}`),
      element("td", service.pid, "number"),
      element("td", service.epoch ?? "", "number"),
      element("td", service.round_trip ? duration(service.round_trip) : "", "number"),
      element("td", service.plans_in_flight ?? "", "number"),
      element("td", service.memory_bytes ? `${whole(service.memory_bytes / 2 ** 20)} MiB` : "", "number"),
    );
    return row;
  });
  $("services").replaceChildren(...rows);
}

function showEvents(events) {
  $("events").replaceChildren(...events.map(({ time, text }) => element("li", `${new Date(time * 1000).toLocaleTimeString()}  ${text}`)));
}

let shownBlocks = [];

function showBlocks(workers) {
  shownBlocks = workers;
  const style = getComputedStyle(document.documentElement);
  const colours = KINDS.map((kind) => style.getPropertyValue(`--${kind}`));
  const figures = workers.map(({ worker, stride, cells }) => {
    const counts = [0, 0, 0, 0];
    for (const cell of cells) counts[cell] += 1;
    const figure = element("figure");
    const shares = KINDS.map((kind, i) => `${whole(counts[i] * stride)} ${kind}`).join(", ");
    figure.append(element("figcaption", `${worker}: ${shares}${stride > 1 ? ` (about; a square stands for ${stride} blocks)` : ""}`));
    const canvas = element("canvas");
    const scale = window.devicePixelRatio || 1;
    const width = Math.max(200, $("blocks").clientWidth);
    const size = cells.length > 400 ? 9 : 12;
    const columns = Math.floor(width / size);
    const height = Math.ceil(cells.length / columns) * size;
    canvas.width = width * scale;
    canvas.height = height * scale;
    canvas.style.height = `${height}px`;
    canvas.setAttribute("role", "img");
    canvas.setAttribute("aria-label", `Blocks of ${worker}: ${shares}`);
    const draw = canvas.getContext("2d");
    draw.scale(scale, scale);
    for (let i = 0; i < cells.length; i += 1) {
      draw.fillStyle = colours[cells[i]];
      draw.fillRect((i % columns) * size, Math.floor(i / columns) * size, size - 1.5, size - 1.5);
    }
    figure.append(canvas);
    return figure;
  });
  $("blocks").replaceChildren(...(figures.length ? figures : [element("p", "no worker is ready", "legend")]));
}

// A canvas keeps its colours and its width: it is drawn anew when either changes.
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => showBlocks(shownBlocks));
addEventListener("resize", () => showBlocks(shownBlocks));

async function look() {
  try {
    const answer = await fetch("state", { signal: AbortSignal.timeout(5000), cache: "no-store" });
    if (!answer.ok) throw new Error(`status ${answer.status}`);
    const state = await answer.json();
    $("contact").textContent = new Date(state.time * 1000).toLocaleTimeString();
    $("contact").className = "";
    showFigures(state);
    showServices(state.services);
    showEvents(state.events);
    showBlocks(state.blocks);
  } catch (error) {
    $("contact").textContent = `no contact with the admin server: ${error.message}`;
    $("contact").className = "lost";
  }
  setTimeout(look, EVERY);
}

// ---------------------------------------------------------------- a prompt

let running = null;

function showLatencies(gaps) {
  const shown = gaps.slice(-100);
  const top = Math.max(1, ...shown);
  const bars = shown.map((gap, i) => {
    const bar = document.createElementNS("http://www.w3.org/2000/svg", "rect");
    const height = Math.max(0.5, (24 * gap) / top);
    for (const [name, value] of Object.entries({ x: i, y: 24 - height, width: 0.8, height })) bar.setAttribute(name, value);
    return bar;
  });
  $("latencies").replaceChildren(...bars);
}

async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const parts = (rest + value).split("\n\n");
    rest = parts.pop();
    for (const part of parts) {
      const data = part.split("\n").find((line) => line.startsWith("data: "));
      if (data) yield data.slice(6);
    }
  }
}

async function ask(signal) {
  const begun = performance.now();
  const gaps = [];
  let first = 0, last = begun, tokens = 0, ended = false;
  const timing = () => {
    const mean = gaps.length ? gaps.reduce((a, b) => a + b) / gaps.length : 0;
    const worst = gaps.length ? Math.max(...gaps) : 0;
    return `first token ${duration(first / 1e3)}, then ${duration(mean / 1e3)} each, longest ${duration(worst / 1e3)}; ${tokens} tokens in ${duration((last - begun) / 1e3)}`;
  };
  const answer = await fetch("prompt", {
    method: "POST",
    signal,
    headers: { "Content-Type": "application/json", ...($("key").value ? { "X-API-Key": $("key").value } : {}) },
    body: JSON.stringify({
      prompt: $("prompt").value,
      max_tokens: Number($("max-tokens").value),
      temperature: Number($("temperature").value),
      stream: true,
      stream_options: { include_usage: true },
    }),
  });
  if (!answer.ok) {
    const text = await answer.text();
    let message = text;
    try { message = JSON.parse(text).error.message; } catch { /* not JSON: shown as it is */ }
    throw new Error(`${answer.status}: ${message}`);
  }
  for await (const data of events(answer.body)) {
    if (data === "[DONE]") { ended = true; break; }
    const event = JSON.parse(data);
    if (event.error) throw new Error(event.error.message);
    if (event.usage) tokens = event.usage.completion_tokens;
    const text = (event.choices ?? []).map((choice) => choice.text ?? "").join("");
    if (!text) continue;
    const at = performance.now();
    if (first) gaps.push(at - last); else first = at - begun;
    last = at;
    if (!event.usage) tokens += 1;
    $("answer").append(text);
    $("timing").textContent = timing();
    showLatencies(gaps);
  }
  if (!ended) throw new Error("the stream broke off");
  $("timing").textContent = timing();
}

$("try").addEventListener("submit", async (event) => {
  event.preventDefault();
  running = new AbortController();
  $("send").disabled = true;
  $("stop").disabled = false;
  $("answer").textContent = "";
  $("timing").className = "";
  $("timing").textContent = "sent …";
  showLatencies([]);
  try {
    await ask(running.signal);
  } catch (error) {
    $("timing").className = "failed";
    $("timing").textContent = error.name === "AbortError" ? "stopped" : error.message;
  } finally {
    $("send").disabled = false;
    $("stop").disabled = true;
  }
});
$("stop").addEventListener("click", () => running?.abort());

look();
