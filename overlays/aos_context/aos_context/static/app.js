/* The page: forms that call the HTTP API. What users and agents have written comes into it as text, never as HTML. */

const byId = (id) => document.getElementById(id);
const VERSION = "2.1";
const ACTOR = "web"; // who stands in the ledger for what is done here
const LEDGER_SHOWN = 20;
const HITS_SHOWN = 10;
const BATCHES_READ = 1000; // batches that wait, the last ones
let shown = null; // {runId, ws}: the run that is shown, and its working set as it was read
let opening = 0; // counts the runs that were chosen: what is answered for one that was chosen before is dropped
let listing = 0; // the same for the list of runs
let listed = 100; // so many runs are listed, if there are so many
const RUNS_MORE = 100; // so many more are asked for at a time
const RUNS_READ = 1000; // so many the service gives at most in an answer

class Refused extends Error {
  constructor(status, body) {
    super(body.error ?? `HTTP ${status}`);
    this.status = status;
    this.body = body;
  }
}

async function ask(path, options = {}) {
  let response;
  try {
    response = await fetch(path, options);
  } catch {
    throw new Refused(0, { error: "The service does not answer.", hint: "Is it still running?" });
  }
  const document = await response.json().catch(() => ({ error: `HTTP ${response.status}, and no JSON` }));
  if (!response.ok) throw new Refused(response.status, document);
  return document;
}

const post = (path, body) => ask(path, {
  method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify({ ...body, actor: ACTOR }),
});

const runPath = (runId, rest) => `/runs/${encodeURIComponent(runId)}/${rest}`;

/* Elements */

function element(name, text, attributes = {}) {
  const made = document.createElement(name);
  made.textContent = text ?? "";
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  return made;
}

function fill(list, items, toElement, empty) {
  const made = items.map(toElement);
  list.replaceChildren(...(made.length || !empty ? made : [element("li", empty, { class: "quiet" })]));
}

/* `about` are texts and elements, with a dot between. */
function entry(about, text) {
  const made = element("li"), title = element("span", "", { class: "quiet" });
  title.append(...about.flatMap((one, index) => (index ? [" · ", one] : [one])));
  made.append(title, element("p", text));
  return made;
}

/* "2026-01-18 00:00:00Z" of what the service writes; it is all UTC. */
function moment(text) {
  return element("time", text.replace(/[Tt]/, " ").replace(/\.\d+/, ""), { datetime: text });
}

function say(words) {
  byId("fault").hidden = true;
  byId("status").textContent = words;
}

function showRefusal(error) {
  if (!(error instanceof Refused)) throw error;
  byId("status").textContent = "";
  const faults = error.body.faults ?? [];
  byId("fault-words").textContent = faults.length > 1 ? `${error.body.artifact}: this is not as it has to be:` : error.message;
  fill(byId("fault-list"), faults.length > 1 ? faults : [], (one) => element("li", `${one.path}: ${one.message}`));
  byId("fault-hint").textContent = error.body.hint ?? "";
  byId("fault").hidden = false;
}

byId("fault-close").addEventListener("click", () => { byId("fault").hidden = true; });

/* The button of a form waits while its request is on the way, so that nothing is sent twice. */
async function once(button, work) {
  if (button.disabled) return;
  button.disabled = true;
  try {
    await work();
  } catch (error) {
    showRefusal(error);
  } finally {
    button.disabled = false;
  }
}

function onSubmit(id, work) {
  const form = byId(id);
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    once(form.querySelector("button[type=submit]"), () => work(Object.fromEntries(new FormData(form)), form));
  });
}

const linesOf = (text) => text.split("\n").map((line) => line.trim()).filter(Boolean);

/* What is shown */

/* The runs that changed last, and whether there are more. */
async function readRuns(wanted) {
  const runs = [];
  let next = null;
  do {
    const query = new URLSearchParams({ limit: Math.min(wanted - runs.length, RUNS_READ) });
    if (next !== null) query.set("after", next);
    const page = await ask(`/runs?${query}`);
    runs.push(...page.runs);
    next = page.next;
  } while (next !== null && runs.length < wanted);
  return { runs, isMore: next !== null };
}

/* Says how many are listed, or -1 where the list was asked for again meanwhile. */
async function showRuns() {
  const mine = ++listing;
  const { runs, isMore } = await readRuns(listed);
  if (mine !== listing) return -1;
  byId("runs-more").hidden = !isMore;
  byId("no-runs").hidden = runs.length > 0;
  fill(byId("runs"), runs, (one) => {
    const made = element("li");
    const button = element("button", "", { type: "button", "data-run": one.run_id });
    button.append(element("strong", one.objective ?? one.error), element("br"));
    button.append(element("span", `${one.run_id} · ${one.status ?? one.code}`, { class: "quiet" }));
    button.setAttribute("aria-current", String(shown?.runId === one.run_id));
    button.addEventListener("click", () => once(button, () => openRun(one.run_id)));
    made.append(button);
    return made;
  });
  return runs.length;
}

byId("runs-more").addEventListener("click", (event) => once(event.currentTarget, async () => {
  const before = listed;
  listed += RUNS_MORE;
  const count = await showRuns();
  if (count < 0) return;
  byId("runs").children[before]?.querySelector("button").focus();
  say(`${count} runs are listed.`);
}));

/* Whether the run is shown now, which it is not if another one was chosen meanwhile. */
async function openRun(runId) {
  const mine = ++opening;
  let ws;
  try {
    ws = await ask(runPath(runId, "ws"));
  } catch (error) {
    if (mine === opening) throw error;
  }
  if (mine !== opening) return false;
  const isOther = shown?.runId !== runId;
  if (isOther) clear();
  shown = { runId, ws };
  showWorkingSet();
  await Promise.all([showRuns(), showEpisodes(shown), showLedger(shown), showWaiting(shown)]);
  if (mine !== opening) return false;
  say(`Run ${runId} is open.`);
  if (isOther) {
    byId("run").focus({ preventScroll: true });
    byId("run").scrollIntoView();
  }
  return true;
}

/* Opens the run that `made` has made, unless another one was chosen while it was made. */
async function openMade(made, words) {
  const before = opening;
  const answer = await made();
  if (before !== opening) await showRuns();
  if (before !== opening || (await openRun(answer.run_id))) say(words(answer));
}

/* Nothing that was typed for one run, or answered for it, is there for another. */
function clear() {
  for (const id of ["hits", "proposed", "packs", "episodes", "ledger"]) byId(id).replaceChildren();
  for (const id of ["patch", "propose", "milestone", "search"]) byId(id).reset();
  for (const id of ["brief-text", "patch-stale"]) byId(id).hidden = true;
  showBatches([]);
}

/* A form's answer belongs to the run that was shown when it was sent: `run` is that, and may be shown no more. */
const isShown = (run) => shown?.runId === run.runId;

const sayOf = (run, words) => say(isShown(run) ? words : `Run ${run.runId}: ${words}`);

async function readAgain(run) {
  const ws = await ask(runPath(run.runId, "ws"));
  if (!isShown(run) || ws._update_seq < shown.ws._update_seq) return;
  shown.ws = ws;
  showWorkingSet();
}

function showWorkingSet() {
  const { ws } = shown;
  byId("run").hidden = false;
  byId("no-run").hidden = true;
  byId("run-title").textContent = ws.objective;
  byId("patch-seq").textContent = ws._update_seq;
  byId("ws-json").textContent = JSON.stringify(ws, null, 2);
  const facts = {
    "Run": ws.run_id, "_update_seq": ws._update_seq, "Status": ws.status, "Stage": ws.current_stage,
    "Next action": ws.next_action, "Acceptance criteria": ws.acceptance_criteria.join("\n"),
    "Constraints": ws.constraints.join("\n"), "Changed": moment(ws.updated_at).textContent,
  };
  const rows = Object.entries(facts).filter(([, value]) => value !== "");
  byId("ws-facts").replaceChildren(...rows.flatMap(([name, value]) => [element("dt", name), element("dd", value)]));
  const piece = (one) => entry([one.id, `priority ${one.priority}`, moment(one.timestamp)], one.content);
  fill(byId("ws-pinned"), ws.pinned_context, piece, "none");
  fill(byId("ws-sliding"), ws.sliding_context, piece, "none");
}

async function showEpisodes(run) {
  const { episodes } = await ask(runPath(run.runId, "episodes"));
  if (!isShown(run)) return;
  fill(byId("episodes"), episodes, (one) => {
    const made = entry([String(one.number), moment(one.created_at)], one.reason);
    made.append(element("pre", one.summary));
    return made;
  }, "none yet");
}

async function showLedger(run) {
  const { events } = await ask(runPath(run.runId, `ledger?limit=${LEDGER_SHOWN}`));
  if (!isShown(run)) return;
  fill(byId("ledger"), events.toReversed(), (one) => {
    const by = one.actor === null ? [] : [`by ${one.actor}`];
    return entry([String(one.seq), moment(one.timestamp), ...by], one.event_type);
  });
}

/* The batches that a milestone of the run can commit, whoever has proposed them. The one that was chosen stays chosen as
   long as it waits. */
async function showWaiting(run) {
  const { batches } = await ask(runPath(run.runId, `memory/waiting?limit=${BATCHES_READ}`));
  if (isShown(run)) showBatches(batches);
}

function showBatches(waiting) {
  const select = byId("milestone-batch");
  const chosen = select.value;
  const options = waiting.map((one) => element("option", `${wordsOf(one)} (${one.batch_id})`, { value: one.batch_id }));
  select.replaceChildren(element("option", "none", { value: "" }), ...options);
  select.value = waits(chosen) ? chosen : "";
  byId("waiting").textContent = waiting.length === 0 ? "No batch of memory waits."
    : `${waiting.length} ${waiting.length === 1 ? "batch waits" : "batches wait"}. A milestone commits one.`;
}

const waits = (batchId) => [...byId("milestone-batch").options].some((one) => one.value === batchId);

function wordsOf(batch) {
  if (batch.first === null) return "proposed";
  const { op, content, target_id: target, writer } = batch.first;
  const what = op === "add" ? content : `${op} ${target}${content ? `: ${content}` : ""}`;
  const more = batch.changes > 1 ? `, and ${batch.changes - 1} more` : "";
  return `${what.slice(0, 80)}${more}, by ${writer}`;
}

/* What is done */

onSubmit("boot", (given, form) => openMade(async () => {
  const booted = await post("/runs/boot", {
    objective: given.objective,
    acceptance_criteria: linesOf(given.acceptance_criteria),
    constraints: linesOf(given.constraints),
  });
  form.reset();
  return booted;
}, (booted) => `Run ${booted.run_id} was booted.`));

function patchOf(given, ws) {
  if (given.json.trim()) {
    try {
      return JSON.parse(given.json);
    } catch (error) {
      throw new Refused(0, { error: `The patch is not JSON: ${error.message}` });
    }
  }
  const patch = { _schema_version: VERSION, expected_seq: ws._update_seq };
  const set = {};
  for (const name of ["status", "current_stage", "next_action"]) if (given[name]) set[name] = given[name];
  if (Object.keys(set).length) patch.set = set;
  if (given.content.trim()) {
    const where = given.pinned ? "pinned_context" : "sliding_context";
    const timestamp = new Date().toISOString();
    const id = `c-${timestamp.replace(/[^0-9]/g, "")}-${Math.random().toString(16).slice(2, 8)}`;
    patch.add = { [where]: [{ id, content: given.content, timestamp, priority: Number(given.priority) }] };
  }
  if (!patch.set && !patch.add) throw new Refused(0, { error: "Nothing is filled in: say what is to change." });
  return patch;
}

onSubmit("patch", async (given, form) => {
  const run = shown;
  byId("patch-stale").hidden = true;
  try {
    const applied = await post(runPath(run.runId, "step/update"), { patch: patchOf(given, run.ws) });
    if (isShown(run)) form.reset();
    await Promise.all([readAgain(run), showLedger(run), showRuns()]);
    const evicted = applied.evicted.length ? ` Evicted: ${applied.evicted.join(", ")}.` : "";
    sayOf(run, `The patch was applied; the working set is at ${applied.update_seq}.${evicted}`);
  } catch (error) {
    if (error.status !== 409) throw error;
    const { expected_seq: expected, current_seq: now } = error.body;
    await Promise.all([readAgain(run), showLedger(run)]);
    if (isShown(run)) {
      byId("patch-stale-words").textContent =
        `Someone else has changed the working set meanwhile: it was at ${expected}, and is at ${now}.`;
      byId("patch-stale").hidden = false;
    }
    sayOf(run, "Nothing was changed.");
  }
});

byId("ws-again").addEventListener("click", (event) => once(event.currentTarget, () => openRun(shown.runId)));

onSubmit("search", async (given) => {
  const run = shown;
  const query = new URLSearchParams({ q: given.q, status: given.status, top_k: HITS_SHOWN });
  if (given.scope) query.set("scope", given.scope);
  const { hits } = await ask(runPath(run.runId, `memory/search?${query}`));
  if (!isShown(run)) return;
  fill(byId("hits"), hits, toHit, "nothing of this is remembered");
  const kind = given.q.trim() ? "best" : "newest";
  say(hits.length < HITS_SHOWN ? `${hits.length} found.` : `The ${kind} ${HITS_SHOWN} of what was found.`);
});

function toHit({ item }) {
  const about = [item.type, item.scope, `confidence ${item.confidence}`, `by ${item.writer}`];
  const made = entry(about, item.content);
  const foot = element("div", "", { class: "foot" });
  foot.append(element("code", item.id));
  if (item.status === "active") {
    const button = element("button", "Change", { type: "button", class: "plain", "aria-label": `Change ${item.id}` });
    button.addEventListener("click", () => takeUp(item));
    foot.append(button);
  }
  made.append(foot);
  return made;
}

/* Which fields a proposal has; the others are not sent. */
function showFields() {
  for (const field of byId("propose").querySelectorAll("[data-ops]")) {
    field.hidden = !field.dataset.ops.split(" ").includes(byId("propose-op").value);
    field.querySelector("input, select, textarea").disabled = field.hidden;
  }
}

byId("propose-op").addEventListener("change", showFields);
byId("propose").addEventListener("reset", () => queueMicrotask(showFields)); // its fields are reset after the event

/* A memory that was found, ready to be changed. */
function takeUp(item) {
  const op = byId("propose-op").value;
  byId("propose-op").value = op === "add" ? "update" : op;
  showFields();
  const values = { target: item.id, content: item.content, confidence: item.confidence };
  for (const [name, value] of Object.entries(values)) byId(`propose-${name}`).value = value;
  byId("propose").scrollIntoView({ block: "nearest" });
  byId("propose-op").focus({ preventScroll: true });
}

function changeOf(given) {
  const mcr = { _schema_version: VERSION, ...given };
  if ("confidence" in given) mcr.confidence = Number(given.confidence);
  if (given.op === "add" || given.op === "supersede") mcr.source_refs = [];
  return mcr;
}

onSubmit("propose", async (given, form) => {
  const run = shown;
  const mcr = changeOf(given);
  const proposed = await post(runPath(run.runId, "memory/propose"), { mcrs: [mcr], writer: ACTOR });
  if (isShown(run)) form.reset();
  await Promise.all([showLedger(run), showWaiting(run)]);
  if (!isShown(run)) return sayOf(run, "A change of memory was proposed.");
  const canBe = proposed.staged > 0, before = proposed.duplicates.find((one) => one.batch_id)?.batch_id;
  const isKnown = !canBe || waits(before); // if another run has it, that run may commit it or not
  const made = entry([canBe ? `batch ${proposed.batch_id}` : "not new"], mcr.content ?? `${mcr.op} ${mcr.target_id}`);
  for (const one of proposed.duplicates) {
    const where = one.memory_id === null ? `it waits in ${one.batch_id}, too` : `as ${one.memory_id}`;
    made.append(element("p", `It is there already: ${where}`));
  }
  for (const one of proposed.conflicts) {
    made.append(element("p", `It may contradict ${one.memory_id}: ${one.content}`));
  }
  byId("proposed").append(made);
  if (canBe && !byId("milestone-batch").value) byId("milestone-batch").value = isKnown ? before : proposed.batch_id;
  const others = before ? " Another run has proposed it, too." : "";
  say(isKnown ? `Nothing new was proposed: it ${canBe ? "waits" : "is there"} already.`
    : `It was proposed. A milestone that names its batch commits it.${others}`);
});

onSubmit("milestone", async (given, form) => {
  const run = shown;
  const reached = await post(runPath(run.runId, "milestone"), {
    reason: given.reason,
    next_entry_point: given.next_entry_point || null,
    memory_batch_id: given.memory_batch_id || null,
  });
  if (isShown(run)) form.reset();
  await Promise.all([showEpisodes(run), showLedger(run), showWaiting(run), showRuns()]);
  const committed = reached.memory === null ? "" : ` Committed: ${reached.memory.items.length}.`;
  const left = isShown(run) ? byId("milestone-batch").options.length - 1 : 0;
  const waits = left ? ` Batches that still wait for a milestone each: ${left}.` : "";
  sayOf(run, `Episode ${reached.episode.number} was written.${committed}${waits}`);
});

byId("snapshot").addEventListener("click", (event) => once(event.currentTarget, async () => {
  const run = shown;
  const packed = await post(runPath(run.runId, "resume/snapshot"), { zip_pack: true });
  if (isShown(run)) {
    const made = entry([`pack ${packed.pack_id}`], packed.pack_path);
    const href = runPath(run.runId, `resume/pack_${packed.pack_id}.zip`);
    made.append(element("a", "Download", { href, download: `pack_${packed.pack_id}.zip` }));
    byId("packs").append(made);
    byId("load-path").value = packed.pack_path;
  }
  await showLedger(run);
  sayOf(run, `The run was packed: ${packed.pack_path}`);
}));

const goesOn = (loaded) => `Run ${loaded.run_id} goes on from ${loaded.from_run_id}.`;

onSubmit("load", (given, form) => openMade(async () => {
  const loaded = await post("/runs/resume/load", {
    pack_path: given.pack_path,
    new_run_id: given.new_run_id || null,
  });
  form.reset();
  return loaded;
}, goesOn));

onSubmit("upload", (given, form) => openMade(async () => {
  const query = new URLSearchParams({ actor: ACTOR });
  if (given.new_run_id) query.set("new_run_id", given.new_run_id);
  const headers = { "Content-Type": "application/zip" };
  const loaded = await ask(`/runs/resume/upload?${query}`, { method: "POST", headers, body: given.pack });
  form.reset();
  return loaded;
}, goesOn));

onSubmit("brief", async (given) => {
  const run = shown;
  const query = new URLSearchParams({ budget: given.budget });
  const { brief, tokens } = await ask(runPath(run.runId, `brief?${query}`));
  if (!isShown(run)) return;
  byId("brief-text").textContent = brief;
  byId("brief-text").hidden = false;
  say(`The brief has ${tokens} tokens.`);
});

showFields();
try {
  const { version, testing } = await ask("/health");
  byId("service").textContent = `Version ${version}${testing ? ", started for tests" : ""}`;
  await showRuns();
} catch (error) {
  showRefusal(error);
}
