// One prompt, answered side by side by the tasks and versions that are chosen.

import { stream } from "./api.js";
import { $, make, rounded, problem, show } from "./dom.js";

const MAX_CHOSEN = 12;
const ROUTES = {
  chat: ["/v1/chat/completions", (prompt) => ({ messages: [{ role: "user", content: prompt }] }), (choice) => choice.delta.content],
  text: ["/v1/completions", (prompt) => ({ prompt }), (choice) => choice.text],
};

export class Answers {
  #chosen = [];
  #running = new Set();
  #base = "";

  constructor() {
    $("ask").addEventListener("submit", (event) => {
      event.preventDefault();
      this.#ask();
    });
    $("prompt").addEventListener("keydown", (event) => {
      if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) $("ask").requestSubmit();
    });
    $("add").addEventListener("keydown", (event) => {
      if (event.key === "Enter" || event.key === ",") {
        event.preventDefault();
        this.#addTyped();
      } else if (event.key === "Backspace" && !event.target.value) {
        this.drop(this.#chosen.at(-1));
      }
    });
    $("add").addEventListener("change", () => this.#addTyped());
    $("stop-all").addEventListener("click", () => this.#running.forEach((answer) => answer.stop()));
  }

  // What there is to choose: the base model's name, and those of tasks and versions.
  offer(base, tasks, names) {
    $("names").replaceChildren(...[base, ...names].filter(Boolean).map((value) => make("option", { value })));
    if (!this.#chosen.length) [base, ...tasks.slice(0, 2)].filter(Boolean).forEach((name) => this.choose(name));
    this.#base = base;
  }

  choose(name) {
    if (!name || this.#chosen.includes(name)) return;
    if (this.#chosen.length === MAX_CHOSEN) {
      problem($("add-problem"), new Error(`At most ${MAX_CHOSEN} can be asked at once.`));
      return;
    }
    this.#chosen.push(name);
    this.#draw();
  }

  drop(name) {
    this.#chosen = this.#chosen.filter((each) => each !== name);
    this.#draw();
  }

  #addTyped() {
    const name = $("add").value.trim();
    $("add").value = "";
    problem($("add-problem"), null);
    this.choose(name);
  }

  #draw() {
    const items = this.#chosen.map((name) => {
      const remove = make("button", { type: "button", textContent: "×", ariaLabel: `Leave out ${name}` });
      remove.addEventListener("click", () => {
        this.drop(name);
        $("add").focus();
      });
      return make("li", {}, make("span", { textContent: name }), remove);
    });
    $("chosen").replaceChildren(...items);
  }

  #ask() {
    this.#addTyped();
    const prompt = $("prompt").value;
    if (!prompt) {
      $("prompt").focus();
      return;
    }
    if (!this.#chosen.length) {
      problem($("add-problem"), new Error("Choose at least one task to ask."));
      $("add").focus();
      return;
    }
    this.#running.forEach((answer) => answer.stop());
    const [path, body, textOf] = ROUTES[new FormData($("ask")).get("form")];
    const options = { stream: true, stream_options: { include_usage: true, continuous_usage_stats: true } };
    for (const [id, field] of [["max-tokens", "max_tokens"], ["temperature", "temperature"]]) {
      if ($(id).value !== "") options[field] = $(id).valueAsNumber;
    }
    const answers = this.#chosen.map((name) => new Answer(name, name === this.#base));
    $("answers").replaceChildren(...answers.map((answer) => answer.element));
    for (const answer of answers) this.#run(answer, path, { model: answer.name, ...body(prompt), ...options }, textOf);
  }

  async #run(answer, path, body, textOf) {
    this.#running.add(answer);
    show($("stop-all"));
    await answer.run(path, body, textOf);
    this.#running.delete(answer);
    show($("stop-all"), this.#running.size > 0);
  }
}

class Answer {
  #abort = new AbortController();
  #beginMs = 0;
  #firstMs = 0;
  #lastMs = 0;
  #numTokens = 0;

  constructor(name, isBase) {
    this.name = name;
    this.title = make("h3", { textContent: name });
    this.version = make("span", { className: "badge", textContent: isBase ? "base" : "" });
    this.text = make("div", { className: "text", tabIndex: 0, ariaLabel: `Answer of ${name}` });
    this.text.setAttribute("role", "group");
    this.state = make("p", { className: "figures", textContent: "Waiting …" });
    this.button = make("button", { type: "button", textContent: "Stop", ariaLabel: `Stop ${name}` });
    this.button.addEventListener("click", () => this.stop());
    const head = make("header", {}, this.title, this.version, make("span", { className: "space" }), this.button);
    this.element = make("article", { data: { state: "waiting" } }, head, this.text, this.state);
  }

  stop() {
    this.#abort.abort();
  }

  async run(path, body, textOf) {
    this.#beginMs = performance.now();
    try {
      const { version, events } = await stream(path, body, this.#abort.signal);
      if (version) this.version.textContent = `v${version.split("@").at(-1)}`;
      let reason = "";
      for await (const event of events) {
        for (const choice of event.choices) {
          this.#add(textOf(choice) ?? "");
          reason = choice.finish_reason ?? reason;
        }
        this.#count(event.usage);
      }
      this.#end("done", reason === "length" ? "token limit" : "");
    } catch (error) {
      if (error.name === "AbortError") this.#end("stopped", "stopped");
      else this.#fail(error);
    }
  }

  #add(text) {
    if (!text) return;
    this.element.dataset.state = "running";
    const isAtEnd = this.text.scrollHeight - this.text.scrollTop - this.text.clientHeight < 24;
    this.text.append(text);
    if (isAtEnd) this.text.scrollTop = this.text.scrollHeight;
  }

  #count(usage) {
    if (!usage || usage.completion_tokens === this.#numTokens) return;
    this.#lastMs = performance.now();
    this.#firstMs ||= this.#lastMs;
    this.#numTokens = usage.completion_tokens;
    this.state.textContent = this.#figures();
  }

  #figures() {
    const seconds = (this.#lastMs - this.#firstMs) / 1000;
    const figures = [`${this.#numTokens} token${this.#numTokens === 1 ? "" : "s"}`];
    if (this.#numTokens > 1 && seconds > 0) figures.push(`${rounded((this.#numTokens - 1) / seconds)} tokens/s`);
    if (this.#firstMs) figures.push(`first after ${Math.round(this.#firstMs - this.#beginMs)} ms`);
    return figures.join(" · ");
  }

  #end(state, word) {
    this.element.dataset.state = state;
    if (this.#firstMs) this.state.textContent = [this.#figures(), word].filter(Boolean).join(" · ");
    else this.state.textContent = word || "An empty answer";
    this.#offerCopy();
    this.#say(state === "done" ? "has answered" : "was stopped");
  }

  #fail(error) {
    this.element.dataset.state = "failed";
    const message = error.status ? error.message : "The server does not answer.";
    this.state.textContent = message;
    this.#offerCopy();
    this.#say(`failed: ${message}`);
  }

  #offerCopy() {
    const copy = make("button", { type: "button", textContent: "Copy", ariaLabel: `Copy the answer of ${this.name}` });
    copy.addEventListener("click", async () => {
      await navigator.clipboard?.writeText(this.text.textContent);
      copy.textContent = "Copied";
    });
    if (this.text.textContent && navigator.clipboard) this.button.replaceWith(copy);
    else this.button.remove();
  }

  #say(what) {
    $("said").textContent = `${this.name} ${what}`;
  }
}
