"use strict";
// The page of a Headrace server. What comes from the server becomes text (textContent) or numbers, never markup.

const $ = (id) => document.getElementById(id);
const KEY = "headrace.key";
const POLL_MS = 1000;
const SHOWN_STEPS = 160;
const SHOWN_ROWS = 24;

function element(tag, className, text) {
  const made = document.createElement(tag);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text;
  return made;
}

function tell(text, bad = false) {
  if ($("state").textContent !== text) $("state").textContent = text;
  $("state").classList.toggle("bad", bad);
}

// -- requests

async function call(path, options = {}) {
  const headers = { ...(options.body ? { "Content-Type": "application/json" } : {}) };
  const key = sessionStorage.getItem(KEY);
  if (key) headers.Authorization = `Bearer ${key}`;
  const response = await fetch(path, { ...options, headers });
  if (response.status === 401) {
    $("key-form").hidden = false;
    tell("a key is needed", true);
  }
  if (!response.ok) {
    const body = await response.json().catch(() => null);
    const error = new Error(body?.error?.message || `the server answered ${response.status}`);
    error.status = response.status;
    throw error;
  }
  return response;
}

async function connect() {
  try {
    const { data } = await (await call("/v1/models")).json();
    const chosen = $("model").value;
    $("model").replaceChildren(...data.map((model) => {
      const option = element("option", "", model.id);
      option.value = model.id;
      option.selected = model.id === chosen;
      return option;
    }));
    $("key-form").hidden = true;
    const states = data.map((model) => model.state || "ready");
    tell(states.every((state) => state === "ready") ? "ready" : states.join(", "));
  } catch (error) {
    tell(error.status ? error.message : "the server cannot be reached", true);
  }
}

$("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  sessionStorage.setItem(KEY, $("key").value.trim());
  $("key").value = "";
  connect();
});

// -- tabs

const tabs = [$("tab-chat"), $("tab-live")];

function show(tab, focus = false) {
  for (const one of tabs) {
    const chosen = one === tab;
    one.setAttribute("aria-selected", String(chosen));
    one.tabIndex = chosen ? 0 : -1;
    $(one.getAttribute("aria-controls")).hidden = !chosen;
  }
  if (focus) tab.focus();
  history.replaceState(null, "", `#${tab.getAttribute("aria-controls")}`);
  if (tab === tabs[1]) poll();
}

for (const [index, tab] of tabs.entries()) {
  tab.addEventListener("click", () => show(tab));
  tab.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (step) show(tabs[(index + step + tabs.length) % tabs.length], true);
  });
}

// -- chat

let conversation = [];
let running = null;

function add(role, text) {
  $("messages").querySelector(".empty")?.remove();
  const message = element("div", `message ${role}`, text);
  $("messages").append(message);
  message.scrollIntoView({ block: "end" });
  return message;
}

function chatBody() {
  const system = $("system").value.trim();
  const body = {
    model: $("model").value || undefined,
    messages: [...(system ? [{ role: "system", content: system }] : []), ...conversation],
    temperature: Number($("temperature").value),
    max_tokens: Number($("max-tokens").value),
    stream: true,
    stream_options: { include_usage: true },
  };
  if ($("seed").value !== "") body.seed = Number($("seed").value);
  return JSON.stringify(body);
}

async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines) {
      if (line.startsWith("data: {")) yield JSON.parse(line.slice(6));
    }
  }
}

async function answer() {
  const message = add("assistant", "");
  message.classList.add("busy");
  running = new AbortController();
  $("send").hidden = true;
  $("stop").hidden = false;
  let text = "", usage = null, timings = null, failure = "";
  const began = performance.now();
  try {
    const response = await call("/v1/chat/completions", { method: "POST", body: chatBody(), signal: running.signal });
    for await (const chunk of events(response)) {
      if (chunk.error) throw new Error(chunk.error.message);
      usage = chunk.usage || usage;
      timings = chunk.timings || timings;
      const piece = chunk.choices?.[0]?.delta?.content;
      if (!piece) continue;
      text += piece;
      const log = $("messages");
      const follow = log.scrollHeight - log.scrollTop - log.clientHeight < 80;
      message.textContent = text;
      if (follow) log.scrollTop = log.scrollHeight;
    }
  } catch (error) {
    failure = error.name === "AbortError" ? "stopped" : error.message;
  }
  message.classList.remove("busy");
  running = null;
  $("send").hidden = false;
  $("stop").hidden = true;
  if (text) conversation.push({ role: "assistant", content: text });
  else {
    message.remove();
    $("prompt").value = conversation.pop()?.content || "";  // so that it can be sent again
  }
  const note = element("p", failure && failure !== "stopped" ? "facts bad" : "facts");
  note.textContent = [failure, facts(usage, timings, performance.now() - began)].filter(Boolean).join(" · ");
  $("messages").append(note);
  $("messages").scrollTop = $("messages").scrollHeight;
  $("prompt").focus();
}

function facts(usage, timings, milliseconds) {
  if (!usage) return "";
  const parts = [`${usage.completion_tokens} tokens in ${(milliseconds / 1000).toFixed(1)} s`];
  if (timings?.decode_ms > 0 && usage.completion_tokens > 1) {
    parts.push(`${((usage.completion_tokens - 1) / timings.decode_ms * 1000).toFixed(0)} tokens/s`);
  }
  if (timings?.first_token_ms) parts.push(`first after ${timings.first_token_ms.toFixed(0)} ms`);
  if (timings?.cached_tokens) parts.push(`${timings.cached_tokens} of ${usage.prompt_tokens} prompt tokens cached`);
  return parts.join(" · ");
}

$("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  const text = $("prompt").value.trim();
  if (!text || running) return;
  conversation.push({ role: "user", content: text });
  $("prompt").value = "";
  add("user", text);
  answer();
});
$("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    $("ask").requestSubmit();
  }
});
$("stop").addEventListener("click", () => running?.abort());
$("clear").addEventListener("click", () => {
  running?.abort();
  conversation = [];
  $("messages").replaceChildren();
  $("prompt").focus();
});

// -- live view. A step is [number, model, started, ended, prefill rows, decode rows, prefill chunks, decode chunks,
// running, waiting, pages held, pages]; times are the server's clock, in seconds.

const [NUMBER, MODEL, STARTED, ENDED, PREFILL, DECODE, , , RUNNING, WAITING, HELD, PAGES] = Array(12).keys();
let since = 0, steps = [], seconds = [], before = null, timer = null, paused = false, asking = false;

function poll() {
  if (timer === null && !$("live").hidden) timer = setTimeout(look, 0);
}

async function look() {
  timer = null;
  if ($("live").hidden || document.hidden) return;
  if (!paused && !asking) {
    asking = true;
    try {
      const model = $("model").value;
      const state = await (await call(`/live?since=${since}&model=${encodeURIComponent(model)}`)).json();
      take(state, model);
      if (state.pages) drawPages(state.pages);
      $("live-note").textContent = "";
    } catch (error) {
      $("live-note").textContent = error.status ? error.message : "the server cannot be reached";
    }
    asking = false;
  }
  if (timer === null) timer = setTimeout(look, POLL_MS);
}

document.addEventListener("visibilitychange", poll);
$("pause").addEventListener("click", () => {
  paused = !paused;
  $("pause").setAttribute("aria-pressed", String(paused));
  $("pause").textContent = paused ? "Go on" : "Pause";
});

function take(state, model) {
  if (state.step < since) steps = [];  // another server
  since = state.step;
  steps = [...steps, ...state.steps].slice(-600);
  const own = steps.filter((step) => step[MODEL] === model);
  const last = own[own.length - 1];
  tell(state.state, state.state !== "ready");
  const idle = state.live === 0;  // no step tells of the end of the last request
  const now = { at: state.now, generated: state.generated, model };
  const rate = before?.model === model ? Math.max(0, now.generated - before.generated) / (now.at - before.at) : 0;
  before = now;
  seconds = [...seconds, { rate, waiting: idle || !last ? 0 : last[WAITING] }].slice(-60);
  const recent = own.filter((step) => step[ENDED] > state.now - 2);
  const prompts = recent.reduce((sum, step) => sum + step[PREFILL], 0) / 2;
  const times = recent.map((step) => (step[ENDED] - step[STARTED]) * 1000).sort((a, b) => a - b);
  $("t-gen").textContent = rate.toFixed(0);
  $("t-prompt").textContent = prompts.toFixed(0);
  $("t-running").textContent = idle || !last ? 0 : last[RUNNING];
  $("t-waiting").textContent = idle || !last ? 0 : last[WAITING];
  $("t-kv").textContent = last ? `${(idle ? 0 : 100 * last[HELD] / last[PAGES]).toFixed(0)}%` : "–";
  $("t-step").textContent = times.length ? times[times.length >> 1].toFixed(1) : "–";
  drawRate();
  drawSteps(own.slice(-SHOWN_STEPS));
  drawStages(state);
  drawRequests(choose(state.requests.filter((one) => one.model === model).reverse()), state.now);
}

function colour(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
}

function surface(canvas, height) {
  const scale = window.devicePixelRatio || 1;
  const width = canvas.clientWidth;
  if (height) canvas.style.height = `${height}px`;
  canvas.width = Math.round(width * scale);
  canvas.height = Math.round(canvas.clientHeight * scale);
  const context = canvas.getContext("2d");
  context.scale(scale, scale);
  context.font = "11px system-ui, sans-serif";
  return [context, width, canvas.clientHeight];
}

function axis(context, most, unit) {
  context.fillStyle = colour("soft");
  context.textAlign = "left";
  context.fillText(`${most.toFixed(0)} ${unit}`, 2, 11);
}

function drawRate() {
  const [context, width, height] = surface($("c-rate"));
  const most = Math.max(1, ...seconds.map((one) => one.rate));
  const waits = Math.max(1, ...seconds.map((one) => one.waiting));
  const x = (i) => width - (seconds.length - 1 - i) * (width / 59);
  const bar = width / 59;
  context.fillStyle = colour("wait");
  seconds.forEach((one, i) => {
    const tall = (height - 18) * one.waiting / waits / 2;
    context.fillRect(x(i) - bar, height - tall, bar, tall);
  });
  context.strokeStyle = colour("decode");
  context.lineWidth = 2;
  context.beginPath();
  seconds.forEach((one, i) => context.lineTo(x(i), height - 2 - (height - 18) * one.rate / most));
  context.stroke();
  axis(context, most, "tokens/s");
  const now = seconds[seconds.length - 1];
  $("c-rate").setAttribute("aria-label",
    `${now.rate.toFixed(0)} tokens per second now, at most ${most.toFixed(0)} in the last minute; ${now.waiting} waiting`);
}

function drawSteps(shown) {
  const [context, width, height] = surface($("c-steps"));
  const most = Math.max(1, ...shown.map((step) => step[PREFILL] + step[DECODE]));
  const bar = width / SHOWN_STEPS;
  const tall = (rows) => (height - 18) * Math.sqrt(rows / most);  // so that a few rows are seen beside hundreds
  shown.forEach((step, i) => {
    const left = width - (shown.length - i) * bar;
    const decode = tall(step[DECODE]), prefill = tall(step[PREFILL] + step[DECODE]) - decode;
    context.fillStyle = colour("decode");
    context.fillRect(left, height - decode, Math.max(1, bar - 1), decode);
    context.fillStyle = colour("prefill");
    context.fillRect(left, height - decode - prefill, Math.max(1, bar - 1), prefill);
  });
  axis(context, most, "rows (square-root scale)");
  const last = shown[shown.length - 1];
  const note = last ? `last, number ${last[NUMBER]}: ${last[PREFILL]} prefill and ${last[DECODE]} decode rows in ` +
    `${((last[ENDED] - last[STARTED]) * 1000).toFixed(1)} ms` : "no steps yet";
  $("step-note").textContent = `· ${note}`;
  $("c-steps").setAttribute("aria-label", `The last ${shown.length} steps; ${note}`);
}

function drawPages(pools) {
  const cells = pools.map((pool) => pool.cells).join("");
  const canvas = $("c-pages");
  const columns = Math.max(16, Math.floor(canvas.clientWidth / (cells.length > 512 ? 9 : 13)));
  const side = canvas.clientWidth / columns;
  const [context] = surface(canvas, Math.ceil(cells.length / columns) * side + 1);
  const colours = ["free", "kept", "held", "shared"].map(colour);
  for (let i = 0; i < cells.length; i++) {
    context.fillStyle = colours[Number(cells[i])];
    context.fillRect((i % columns) * side, Math.floor(i / columns) * side, side - 1, side - 1);
  }
  const total = [0, 1, 2, 3].map((state) => pools.reduce((sum, pool) => sum + pool.states[state], 0));
  const per = Math.max(...pools.map((pool) => pool.per_cell));
  $("page-note").textContent = `· ${total[2] + total[3]} held (${total[3]} shared), ${total[1]} kept, ${total[0]} free` +
    (per > 1 ? ` · a cell is ${per} pages` : "");
  canvas.setAttribute("aria-label", `KV pages: ${$("page-note").textContent.slice(2)}`);
}

// -- stages of a split model. A span is [step, stage, replica, rank, prefill, hidden states received, started, ended], a
// mark [time, kind, stage, replica, why].

let busyBefore = new Map();

function drawStages(state) {
  $("stages").hidden = !state.stages;
  if (!state.stages) return;
  const busyNow = new Map();
  $("replicas").tBodies[0].replaceChildren(...state.stages.flatMap((stage) => stage.replicas.flatMap((one) => {
    const name = `${stage.stage}.${one.replica}`, old = busyBefore.get(name), seconds = state.at - (old?.at ?? state.at);
    const measured = seconds >= 0.5 ? Math.max(0, (one.busy - old.busy) / seconds / one.pids.length) : old?.share;
    busyNow.set(name, seconds >= 0.5 || !old ? { at: state.at, busy: one.busy, share: measured } : old);
    const row = element("tr"), head = element("th", "", name), condition = element("td", one.state === "ready" ? "" : "bad", one.state);
    head.scope = "row";
    head.append(element("small", "", `layers ${stage.layers.join("–")}${one.host ? ` on ${one.host}` : ""}`));
    const share = measured === undefined ? "–" : `${(100 * Math.min(1, measured)).toFixed(0)}%`;
    row.append(head, condition, ...[one.sequences, share, `${one.pages_held}/${one.pages}`, one.restarts]
      .map((text) => element("td", "", String(text))));
    if (one.lost_for === null || one.lost_for > 60) return [row];
    const again = element("tr"), told = element("td", "fate", `lost ${one.lost_for.toFixed(0)} s ago: ${one.why}`);
    told.colSpan = 6;
    again.append(told);
    return [row, again];
  })));
  busyBefore = busyNow;
  if (state.lanes) drawLanes(state.stages, state.lanes, state.now);
}

function drawLanes(stages, lanes, now) {
  const ranks = [...new Set([
    ...stages.flatMap((stage) => stage.replicas.flatMap((one) => one.pids.map((_, rank) => [stage.stage, one.replica, rank]))),
    ...lanes.spans.map(([, stage, replica, rank]) => [stage, replica, rank]),  // also of those that have left
  ].map((rank) => rank.join(".")))];
  ranks.sort((a, b) => a.localeCompare(b, "en", { numeric: true }));
  const tall = 26, left = 44;
  const [context, width, height] = surface($("c-lanes"), ranks.length * tall + 14);
  const fate = lanes.marks.filter(([, kind]) => kind === "lost" || kind === "joined");
  const shown = lanes.spans.slice(-ranks.length * width / 10);  // so that a step has room; all, where something befell
  const oldest = fate.length ? 0 : Math.min(now - 0.2, ...shown.map(([, , , , , , started]) => started));
  const span = Math.min(lanes.seconds, now - oldest);
  const x = (time) => left + (width - left) * (1 - (now - time) / span);
  const top = new Map(ranks.map((rank, i) => [rank, i * tall]));
  context.textAlign = "left";
  for (const [rank, y] of top) {
    context.fillStyle = colour("ground");
    context.fillRect(left, y + 2, width - left, tall - 4);
    context.fillStyle = colour("soft");
    context.fillText(rank.endsWith(".0") ? rank.slice(0, -2) : rank, 2, y + 15);
  }
  context.save();
  context.beginPath();
  context.rect(left, 0, width - left, height);
  context.clip();
  const ends = new Map();
  for (const [step, stage, replica, rank, prefill, , started, ended] of lanes.spans) {
    const y = top.get(`${stage}.${replica}.${rank}`);
    context.globalAlpha = step % 2 ? 1 : 0.6;  // so that neighbours are told apart
    context.fillStyle = colour(prefill ? "prefill" : "decode");
    context.fillRect(x(started), y + 4, Math.max(0.5, x(ended) - x(started)), tall - 8);
    if (!rank) ends.set(`${step}.${stage}`, [x(ended), y + tall / 2]);
  }
  context.globalAlpha = 0.55;
  context.strokeStyle = colour("text");
  context.lineWidth = 0.6;
  context.beginPath();
  for (const [step, stage, replica, rank, , hidden] of lanes.spans) {
    const from = ends.get(`${step}.${stage - 1}`);
    if (!from || rank) continue;
    context.moveTo(...from);
    context.lineTo(Math.max(from[0], x(hidden)), top.get(`${stage}.${replica}.0`) + tall / 2);
  }
  context.stroke();
  context.globalAlpha = 1;
  for (const [time, kind, stage, replica] of fate) {
    const y = top.get(`${stage}.${replica}.0`);
    if (y === undefined) continue;
    context.fillStyle = colour(kind === "lost" ? "lost" : "kept");
    context.fillRect(x(time) - 1.5, y, 3, tall);
  }
  context.restore();
  context.fillStyle = colour("soft");
  context.textAlign = "left";
  context.fillText(`${span.toFixed(1)} s ago`, left, height - 2);
  context.textAlign = "right";
  context.fillText("now", width - 2, height - 2);
  const lost = fate.filter(([, kind]) => kind === "lost").length;
  const steps = new Set(lanes.spans.map(([step]) => step)).size;
  $("lane-note").textContent = `· ${steps} steps in ${lanes.seconds.toFixed(0)} s${lost ? `, ${lost} lost` : ""}`;
  $("c-lanes").setAttribute("aria-label", `Steps on ${ranks.length} ranks ${$("lane-note").textContent}`);
}

$("timeline").addEventListener("submit", async (event) => {
  event.preventDefault();
  const headers = { Authorization: `Bearer ${$("admin-key").value.trim()}` };
  try {
    const response = await fetch(`/admin/timeline?seconds=10&model=${encodeURIComponent($("model").value)}`, { headers });
    if (!response.ok) throw new Error((await response.json()).error.message);
    const link = element("a"), address = URL.createObjectURL(await response.blob());
    link.href = address;
    link.download = "timeline.json";
    link.click();
    setTimeout(() => URL.revokeObjectURL(address), 10_000);
    $("timeline-note").textContent = "Saved; open it in Perfetto.";
  } catch (error) {
    $("timeline-note").textContent = error.message;
  }
});

// Those that run, the next in the queue, and the latest that have ended.
function choose(rows) {
  const runs = rows.filter((one) => !one.ended && one.opened.length).slice(0, 16);
  const waits = rows.filter((one) => !one.ended && !one.opened.length).slice(-8);
  const ended = rows.filter((one) => one.ended).sort((a, b) => b.ended - a.ended);
  return [...runs, ...waits, ...ended].slice(0, SHOWN_ROWS);
}

// A request's parts as [class, start, end, what it is].
function partsOf(one, now) {
  const end = one.ended ?? now;
  const opened = one.opened[0];
  const parts = [["k-wait", one.began, opened ?? end, "queued"]];
  if (opened !== undefined) {
    if (one.first !== null) {  // also where steps were not seen one by one
      parts.push(["k-prefill faint", opened, one.first, "prefill"], ["k-decode faint", one.first, one.last, "decode"]);
    }
    let last = opened;
    for (const [kind, start, stop, tokens] of one.spans) {
      const again = one.opened.slice(1).find((at) => at > last && at <= start + 1e-6);
      if (again !== undefined) parts.push(["k-lost", last, start, "preempted"]);
      parts.push(kind === "p" ? ["k-prefill", start, stop, `prefill, ${tokens} tokens`]
        : ["k-decode", start, stop, `decode, ${tokens} tokens`]);
      last = stop;
    }
  }
  return parts;
}

function drawRequests(rows, now) {
  const from = Math.min(now - 1, ...rows.map((one) => one.began));
  const scale = 100 / Math.max(1e-3, Math.max(...rows.map((one) => one.ended ?? now), from + 1) - from);
  $("waterfall").replaceChildren(...rows.map((one) => {
    const row = element("div"), label = element("div", "label"), track = element("div", "track");
    row.setAttribute("role", "row");
    label.setAttribute("role", "rowheader");
    track.setAttribute("role", "cell");
    const seconds = (one.ended ?? now) - one.began;
    label.textContent = `${seconds.toFixed(2)} s · ${one.reason ?? (one.opened.length ? "running" : "queued")}`;
    const cached = one.cached ? `, ${one.cached} cached` : "";
    const lost = one.opened.length > 1 ? `, preempted ${one.opened.length - 1} ×` : "";
    label.append(element("small", "", `${one.prompt} prompt tokens${cached}${one.ended ? `, ${one.generated} new` : ""}${lost}`));
    const parts = partsOf(one, now);
    for (const [kind, start, stop, what] of parts) {
      const part = element("i", kind);
      part.style.left = `${(start - from) * scale}%`;
      part.style.width = `${Math.max(0, stop - start) * scale}%`;
      part.title = `${what}, ${((stop - start) * 1000).toFixed(1)} ms`;
      track.append(part);
    }
    track.setAttribute("aria-label", parts.map(([, start, stop, what]) => `${what} ${((stop - start) * 1000).toFixed(0)} ms`)
      .slice(0, 6).join("; "));
    row.append(label, track);
    return row;
  }));
  if (!rows.length) $("waterfall").append(element("p", "hint", "No requests yet."));
}

connect().then(() => show(location.hash === "#live" ? tabs[1] : tabs[0]));
setInterval(() => { if ($("live").hidden && !document.hidden && !running) connect(); }, 10000);
