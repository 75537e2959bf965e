// The numbers of the moment, and counts by task, all read from /metrics.

import { metrics } from "./api.js";
import { $, rounded } from "./dom.js";

const EVERY_MS = 2000;
const RETRY_MS = 1000; // while there is no answer
const NUM_POINTS = 40;
const GENERATED = "manyhats_generated_tokens_total";
const STEPS = "manyhats_batch_adapters_count";
const ADAPTERS = "manyhats_batch_adapters_sum";
const REQUESTS = "manyhats_requests_total";
const REGISTRATIONS = "manyhats_adapter_registrations_total";
const GAUGES = {
  manyhats_requests_running: ["live-running", String],
  manyhats_requests_waiting: ["live-waiting", String],
  manyhats_kv_cache_usage_ratio: ["live-cache", (ratio) => `${Math.round(ratio * 100)} %`],
};
const NAMES = [GENERATED, STEPS, ADAPTERS, REQUESTS, REGISTRATIONS, ...Object.keys(GAUGES)];

// Reads every two seconds while the page is seen; `onCounts` gets requests by task and registrations by result.
export function follow(onCounts, onReached) {
  let last = null;
  const rates = [];

  async function read() {
    if (document.hidden) return;
    try {
      const samples = await metrics(NAMES);
      const now = { at: performance.now() };
      for (const name of [GENERATED, STEPS, ADAPTERS]) now[name] = sum(samples, name);
      showGauges(samples);
      if (last) {
        rates.push(((now[GENERATED] - last[GENERATED]) * 1000) / (now.at - last.at));
        rates.splice(0, rates.length - NUM_POINTS);
        const numSteps = now[STEPS] - last[STEPS];
        $("live-rate").textContent = rounded(rates.at(-1));
        $("live-adapters").textContent = numSteps ? rounded((now[ADAPTERS] - last[ADAPTERS]) / numSteps) : "0";
        draw(rates);
      }
      last = now;
      onCounts(byTask(samples), results(samples));
      onReached(null);
    } catch (error) {
      last = null;
      for (const id of ["live-rate", "live-adapters", ...Object.values(GAUGES).map(([id]) => id)]) $(id).textContent = "–";
      onReached(error);
    }
  }

  async function turn() {
    await read();
    setTimeout(turn, last ? EVERY_MS : RETRY_MS);
  }
  document.addEventListener("visibilitychange", read);
  turn();
}

function sum(samples, name) {
  return samples.reduce((total, sample) => (sample.name === name ? total + sample.value : total), 0);
}

function showGauges(samples) {
  for (const [name, [id, format]] of Object.entries(GAUGES)) {
    const found = samples.find((sample) => sample.name === name);
    $(id).textContent = found ? format(found.value) : "–";
  }
}

const ASKING = new Set(["Generate", "GenerateStream", "Score", "ChatCompletions", "Completions", "Responses", "Classify"]);

function byTask(samples) {
  const counts = new Map();
  for (const { name, labels, value } of samples) {
    if (name === REQUESTS && ASKING.has(labels.method)) counts.set(labels.task, (counts.get(labels.task) ?? 0) + value);
  }
  return counts;
}

function results(samples) {
  return samples
    .filter(({ name, value }) => name === REGISTRATIONS && value > 0)
    .map(({ labels, value }) => ({ result: labels.result, reason: labels.reason, count: value }))
    .sort((a, b) => b.count - a.count);
}

function draw(rates) {
  const top = Math.max(...rates, 1);
  const points = rates.map((rate, i) => `${(((NUM_POINTS - rates.length + i) / (NUM_POINTS - 1)) * 120).toFixed(1)} ${(26 - (rate / top) * 24).toFixed(1)}`);
  const line = points.join("L");
  const [area, path] = $("live-spark").children;
  path.setAttribute("d", `M${line}`);
  area.setAttribute("d", `M${points[0].split(" ")[0]} 28L${line}L120 28Z`);
}
