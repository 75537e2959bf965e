// The tasks and their versions: what they are, and activating and deleting them.

import { call } from "./api.js";
import { $, make, problem, short, show } from "./dom.js";

const PAGE_SIZE = 500;
const DEFAULT = "default.";
const WHERE = { DEVICE: "device", HOST: "host", DISK: "disk" };
const METHODS = { LORA: "LoRA", DORA: "DoRA", ADALORA: "AdaLoRA", VERA: "VeRA", IA3: "IA3", P_TUNING: "P-tuning" };

const word = (name, prefix) => name.slice(prefix.length);
const nameOf = (adapter) => `${adapter.taskId}@${adapter.version}`;
const isActive = (adapter) => adapter.state === "ADAPTER_STATE_ACTIVE";
const pathOf = (name) => `/v1/tasks/${encodeURIComponent(name)}`;

export class Tasks {
  #adapters = [];
  #next = "";
  #counts = new Map();
  #opened = new Set();
  #mayManage = false;
  #deleting = null;

  // onAsk(name): ask this one; onChanged(): tasks are others now; onProblem(error).
  constructor({ onAsk, onChanged, onProblem }) {
    this.onAsk = onAsk;
    this.onChanged = onChanged;
    this.onProblem = onProblem;
    $("filter").addEventListener("input", () => this.#draw());
    $("tasks-more").addEventListener("click", () => this.#more().catch(onProblem));
    $("delete-cancel").addEventListener("click", () => $("delete-dialog").close());
    $("delete-form").addEventListener("submit", (event) => {
      event.preventDefault();
      this.#delete();
    });
  }

  set mayManage(may) {
    this.#mayManage = may;
    show($("upload-open"), may);
    this.#draw();
  }

  set counts(counts) {
    this.#counts = counts;
    for (const cell of document.querySelectorAll("#tasks [data-requests]")) cell.textContent = this.#count(cell.dataset.requests);
  }

  // Names of the tasks that have an active version, and of all versions.
  get names() {
    const tasks = this.#adapters.filter(isActive).map((each) => each.taskId);
    return { tasks, all: [...tasks, ...this.#adapters.map(nameOf)] };
  }

  async read() {
    [this.#adapters, this.#next] = [[], ""];
    try {
      await this.#more();
    } catch (error) {
      this.say(error.message);
      throw error;
    }
  }

  // Says something in place of the table.
  say(text) {
    show($("tasks"), false);
    $("tasks-state").textContent = text;
    show($("tasks-state"));
  }

  async #more() {
    const answer = await call(`/v1/tasks?pageSize=${PAGE_SIZE}&pageToken=${encodeURIComponent(this.#next)}`);
    this.#adapters.push(...answer.adapters);
    this.#next = answer.nextPageToken;
    this.#draw();
  }

  #count(taskId) {
    return short(this.#counts.get(taskId) ?? 0);
  }

  #draw() {
    const groups = Map.groupBy ? Map.groupBy(this.#adapters, (each) => each.taskId) : grouped(this.#adapters);
    const wanted = $("filter").value.trim().toLowerCase();
    const bodies = [...groups].filter(([taskId]) => taskId.includes(wanted)).map(([, versions]) => this.#group(versions));
    $("tasks").replaceChildren($("tasks").tHead, ...bodies);
    const num = groups.size;
    $("tasks-count").textContent = num ? `${num}${this.#next ? " or more" : ""}` : "";
    show($("filter"), num > 8);
    show($("tasks-more"), Boolean(this.#next));
    show($("tasks"), bodies.length > 0);
    show($("tasks-state"), bodies.length === 0);
    $("tasks-state").textContent = num ? "No task has that in its name." : this.#emptyText();
  }

  #emptyText() {
    const how = this.#mayManage ? "Upload an adapter, or register one: manyhats adapters register TASK PATH" : "";
    return `No tasks yet: the base model answers alone. ${how}`;
  }

  #group(versions) {
    const { taskId } = versions[0];
    const main = versions.find(isActive) ?? versions.at(-1);
    const others = versions.filter((each) => each !== main).reverse();
    const isOpen = this.#opened.has(taskId);
    const rows = [this.#row(main, { isMain: true, numOthers: others.length, isOpen })];
    if (isOpen) rows.push(...others.map((each) => this.#row(each, { isMain: false })));
    return make("tbody", {}, ...rows);
  }

  #row(adapter, { isMain, numOthers = 0, isOpen = false }) {
    const name = make("th", { scope: "row", className: "name" });
    if (isMain) name.append(make("span", { className: "task", textContent: adapter.taskId }));
    name.append(make("span", { className: "badge", textContent: `v${adapter.version}` }), ...stateOf(adapter));
    if (numOthers) name.append(this.#toggle(adapter.taskId, numOthers, isOpen));
    const requests = isMain ? make("td", { className: "number", textContent: this.#count(adapter.taskId), data: { label: "Requests", requests: adapter.taskId } }) : make("td");
    const method = word(adapter.method, "ADAPTER_METHOD_");
    const where = WHERE[word(adapter.residency, "ADAPTER_RESIDENCY_")] ?? "disk";
    return make(
      "tr",
      { className: isMain ? "main-row" : "" },
      name,
      make("td", { textContent: METHODS[method] ?? method.toLowerCase().replaceAll("_", " "), data: { label: "Method" } }),
      make("td", { data: { label: "Memory" } }, make("span", { className: "where", textContent: adapter.pinned ? `${where}, pinned` : where, data: { where } })),
      requests,
      make("td", { className: "defaults", data: { label: "Defaults" } }, ...labelsOf(adapter)),
      make("td", { className: "actions" }, ...this.#actions(adapter, isMain && numOthers + 1)),
    );
  }

  #toggle(taskId, numOthers, isOpen) {
    const text = isOpen ? "fewer" : `${numOthers} more`;
    const toggle = make("button", { type: "button", className: "plain", textContent: text, ariaExpanded: String(isOpen), ariaLabel: `Other versions of ${taskId}: ${text}` });
    toggle.addEventListener("click", () => {
      if (!this.#opened.delete(taskId)) this.#opened.add(taskId);
      this.#draw();
      document.querySelector(`[data-toggle="${CSS.escape(taskId)}"]`)?.focus();
    });
    toggle.dataset.toggle = taskId;
    return toggle;
  }

  // `numVersions` of a task's first row, 0 of the others.
  #actions(adapter, numVersions) {
    const name = nameOf(adapter);
    const ask = action("Ask", `Ask ${name} too`, () => this.onAsk(isActive(adapter) ? adapter.taskId : name));
    if (!this.#mayManage) return [ask];
    const activate = isActive(adapter) ? null : action("Activate", `Activate ${name}`, () => this.#activate(name));
    const whole = numVersions ? adapter.taskId : name;
    const remove = action("Delete", `Delete ${whole}`, () => this.#askToDelete(whole, numVersions));
    remove.classList.add("quiet-button");
    return [ask, activate, remove].filter(Boolean);
  }

  async #activate(name) {
    try {
      await call(`${pathOf(name)}/activate`, { method: "POST" });
      await this.onChanged(`${name} is active.`);
    } catch (error) {
      this.onProblem(error);
    }
  }

  #askToDelete(name, numVersions) {
    this.#deleting = { name, force: false };
    $("delete-title").textContent = `Delete ${name}?`;
    $("delete-text").textContent = numVersions > 1 ? `All ${numVersions} versions are deleted. This cannot be undone.` : "This cannot be undone.";
    $("delete-confirm").textContent = "Delete";
    problem($("delete-problem"), null);
    $("delete-dialog").showModal();
    $("delete-cancel").focus();
  }

  async #delete() {
    const { name, force } = this.#deleting;
    try {
      await call(`${pathOf(name)}?force=${force}`, { method: "DELETE" });
      $("delete-dialog").close();
      await this.onChanged(`${name} is deleted.`);
    } catch (error) {
      problem($("delete-problem"), error);
      if (error.code !== "adapter_in_use") return;
      this.#deleting.force = true;
      $("delete-confirm").textContent = "Delete anyway";
    }
  }
}

function grouped(adapters) {
  const groups = new Map();
  for (const each of adapters) groups.set(each.taskId, [...(groups.get(each.taskId) ?? []), each]);
  return groups;
}

function action(text, label, act) {
  const button = make("button", { type: "button", className: "small", textContent: text, ariaLabel: label });
  button.addEventListener("click", act);
  return button;
}

function stateOf(adapter) {
  const state = word(adapter.state, "ADAPTER_STATE_").toLowerCase();
  if (state === "active") return [];
  return [make("span", { className: "badge faint", textContent: state, title: adapter.stateReason })];
}

function labelsOf(adapter) {
  const labels = Object.entries(adapter.labels).sort(([a], [b]) => a.localeCompare(b, "en", { numeric: true }));
  const defaults = labels.filter(([key]) => key.startsWith(DEFAULT)).map(([key, value]) => [key.slice(DEFAULT.length), value, ""]);
  const others = labels.filter(([key]) => !key.startsWith(DEFAULT)).map(([key, value]) => [key, value, "faint"]);
  return [...defaults, ...others].map(([key, value, tone]) => make("span", { className: `label ${tone}` }, make("span", { className: "key", textContent: key }), " ", make("span", { textContent: value })));
}
