// The page: who is calling, what there is, and the notice on top when something is wrong.

import { Answers } from "./answers.js";
import { Refusal, call, token } from "./api.js";
import { $, make, problem, show } from "./dom.js";
import { follow } from "./live.js";
import { Tasks } from "./tasks.js";
import { uploads } from "./upload.js";

const RETRY_MS = 3000;
const STAY_MS = 5000;

const answers = new Answers();
const tasks = new Tasks({ onAsk: ask, onChanged: changed, onProblem: (error) => note(error.message, STAY_MS) });
let base = "";
let isManager = false;
let isStarted = false;
let isLost = false; // the server has been seen, and does not answer now
let noteTimer = 0;

// Shows a line on top: for some time, or until there is another.
function note(text, stayMs = 0) {
  clearTimeout(noteTimer);
  $("notice").textContent = text;
  show($("notice"), Boolean(text));
  if (stayMs) noteTimer = setTimeout(() => note(""), stayMs);
}

function ask(name) {
  answers.choose(name);
  $("prompt").focus();
}

async function changed(text) {
  await readTasks();
  note(text, STAY_MS);
}

async function readTasks() {
  await tasks.read();
  const { tasks: active, all } = tasks.names;
  answers.offer(base, active, all);
}

async function start() {
  try {
    const [server, caller, models] = await Promise.all([call("/v1/server"), call("/v1/caller"), call("/v1/models")]);
    // Only who may use the base sees it among the models.
    base = models.data.some((model) => model.id === server.baseModel) ? server.baseModel : "";
    introduce(server, caller);
    await readTasks();
    // Not before: a task that is typed while there is nothing to offer would stand in for those that are offered.
    for (const control of [$("run"), $("add")]) control.disabled = !caller.roles.includes("generate");
    isStarted = true;
    note("");
  } catch (error) {
    isStarted = false;
    if (error.status === 401) {
      $("token-change").textContent = "Enter a token";
      show($("token-change"));
      tasks.say("The tasks are shown to those who have a token.");
      askForToken(token.get() ? error : null);
      return;
    }
    note(error instanceof Refusal ? `${error.message} Trying again …` : String(error));
    if (!(error instanceof Refusal)) throw error;
    if (error.status === 0 || error.status >= 429) setTimeout(start, RETRY_MS);
  }
}

function introduce(server, caller) {
  const context = server.maxContextLength.toLocaleString("en");
  const about = [server.baseModel, server.quantization, server.device, `${context} tokens of context`];
  $("server").textContent = about.join(" · ");
  $("server").title = `manyhats ${server.version}, ${server.baseDigest}`;
  document.title = `manyhats: ${server.baseModel}`;
  const mayManage = caller.roles.includes("manage");
  const mayGenerate = caller.roles.includes("generate");
  const may = [mayGenerate ? "may ask" : "may not ask", mayManage ? "may manage" : "may not manage"];
  $("caller").textContent = caller.name ? `${caller.name}: ${may.join(", ")}` : "";
  $("token-change").textContent = "Change token";
  show($("token-change"), Boolean(token.get()));
  tasks.mayManage = mayManage;
  isManager = mayManage;
  $("prompt").disabled = !mayGenerate;
  $("prompt").placeholder = mayGenerate ? "Ask several tasks the same thing" : "This token may not ask.";
}

function showResults(results) {
  show($("registrations"), isManager);
  const items = results.map(({ result, reason, count }) =>
    make("li", { data: { result } }, make("span", { textContent: reason ? `${result}: ${reason}` : result }), make("b", { textContent: String(count) })),
  );
  $("results").replaceChildren(...(items.length ? items : [make("li", { className: "quiet", textContent: "None yet" })]));
}

function askForToken(error) {
  problem($("token-problem"), error);
  $("token").value = "";
  if (!$("token-dialog").open) $("token-dialog").showModal();
}

$("token-change").addEventListener("click", () => askForToken(null));
$("token-form").addEventListener("submit", (event) => {
  event.preventDefault();
  token.set($("token").value.trim());
  $("token-dialog").close();
  start();
});

uploads(changed);
follow(
  (counts, results) => {
    tasks.counts = counts;
    showResults(results);
  },
  (error) => {
    if (!isStarted) return; // `start` tells of it, and tries again
    if (error) note(`${error.message} Trying again …`);
    else if (isLost) start();
    isLost = Boolean(error);
  },
);
start();
