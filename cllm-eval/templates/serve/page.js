"use strict";
// One prompt, decoded by both models at once. What a model writes is only ever shown as text.

const element = id => document.getElementById(id);
const [form, status, columns] = ["form", "status", "columns"].map(element);
const NUM_GROUPS = 4;
let race = null;

function say(text, isError = false) {
  status.textContent = text;
  status.classList.toggle("error", isError);
}

function headers() {
  const key = element("key").value;
  return { "Content-Type": "application/json", ...(key && { Authorization: `Bearer ${key}` }) };
}

// The response, or an error with the server's message.
async function request(path, options) {
  const response = await fetch(path, { ...options, headers: headers() });
  if (response.ok) return response;
  if (response.status === 401) element("key-field").hidden = false;
  const body = await response.json().catch(() => null);
  throw new Error(body?.error?.message ?? `the server answered ${response.status}`);
}

// The objects of a stream of server-sent events.
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) throw new Error("the server ended the answer too early");
    const parts = (rest + value).split("\n\n");
    rest = parts.pop();
    for (const part of parts) {
      if (!part.startsWith("data: ")) continue;
      const data = part.slice("data: ".length);
      if (data === "[DONE]") return;
      const event = JSON.parse(data);
      if (event.error) throw new Error(event.error.message);
      yield event;
    }
  }
}

// A model with its part of the page.
class Column {
  constructor(model) {
    this.model = model;
    this.root = element("column").content.firstElementChild.cloneNode(true);
    this.show("strategy", model.strategy);
    this.show("model", model.id);
    this.part("answer").setAttribute("aria-label", `Answer of ${model.id}, ${model.strategy}`);
    columns.append(this.root);
    this.reset();
  }

  part(name) {
    return this.root.querySelector(`.${name}`);
  }

  show(name, text) {
    this.part(name).textContent = text;
  }

  reset() {
    [this.tokens, this.forwards, this.seconds] = [0, 0, 0];
    this.part("answer").replaceChildren();
    this.verdict("");
    this.count();
  }

  count() {
    const { tokens, forwards, seconds } = this;
    this.show("tokens", tokens);
    this.show("speed", seconds > 0 ? (tokens / seconds).toFixed(0) : "–");
    this.show("per-forward", forwards > 0 ? (tokens / forwards).toFixed(2) : "–");
    this.show("time", seconds > 0 ? `${seconds.toFixed(2)} s` : "–");
  }

  verdict(text, isFirst = false) {
    this.show("verdict", text);
    this.part("verdict").classList.toggle("first", isFirst);
  }

  add(text, decoded) {
    if (decoded) {
      this.tokens += decoded.tokens;
      this.forwards += 1;
      this.seconds = decoded.seconds;
    }
    if (text) {
      const answer = this.part("answer");
      const isAtEnd = answer.scrollHeight - answer.scrollTop - answer.clientHeight < 40;
      const span = document.createElement("span");
      span.textContent = text;
      if (decoded?.tokens > 1) span.className = `group-${this.forwards % NUM_GROUPS}`;
      answer.append(span);
      if (isAtEnd) answer.scrollTop = answer.scrollHeight;
    }
    this.count();
  }

  async decode(prompt, options, signal) {
    const { id: model, chat } = this.model;
    const input = chat ? { messages: [{ role: "user", content: prompt }] } : { prompt };
    const body = JSON.stringify({ model, ...input, ...options, stream: true });
    const path = chat ? "v1/chat/completions" : "v1/completions";
    for await (const event of events(await request(path, { method: "POST", body, signal }))) {
      const [choice] = event.choices;
      this.add(choice?.delta?.content ?? choice?.text, event.decoded);
    }
    this.verdict(`ended after ${this.seconds.toFixed(2)} s`);
  }
}

// Says which of two was faster, and how much later the other ended.
function judge(all) {
  if (all.length < 2) return;
  const [first, last] = [...all].sort((one, other) => one.seconds - other.seconds);
  first.verdict("first", true);
  last.verdict(`${last.seconds.toFixed(2)} s: ${(last.seconds / first.seconds).toFixed(2)}× as long`);
}

function summary(all) {
  const figures = all.map(({ model, tokens, seconds }) =>
    `${model.strategy}: ${tokens} tokens in ${seconds.toFixed(2)} s`).join("; ");
  const texts = new Set(all.map(column => column.part("answer").textContent));
  return figures + (all.length < 2 ? "" : texts.size === 1 ? "; same text" : "; different texts");
}

async function run(all) {
  race?.abort();
  const current = race = new AbortController();
  const options = { max_tokens: element("max-tokens").valueAsNumber, temperature: element("temperature").valueAsNumber };
  if (options.temperature > 0) options.seed = Math.floor(Math.random() * 2 ** 31);
  all.forEach(column => column.reset());
  element("stop").disabled = false;
  say("Decoding …");
  try {
    await Promise.all(all.map(column => column.decode(element("prompt").value, options, current.signal)));
    judge(all);
    say(summary(all));
  } catch (error) {
    if (current !== race) return;
    const isStopped = current.signal.aborted;
    current.abort();
    say(isStopped ? "Stopped." : error.message, !isStopped);
  }
  element("stop").disabled = true;
}

// The model that decodes autoregressively is on the left.
async function load() {
  const { data } = await (await request("v1/models")).json();
  const all = data.reverse().map(model => new Column(model));
  say("Ready.");
  return all;
}

const themes = ["system", "light", "dark"];
element("theme").addEventListener("click", ({ target }) => {
  const root = document.documentElement;
  const next = themes[(themes.indexOf(root.dataset.theme ?? "system") + 1) % themes.length];
  root.dataset.theme = next;
  target.textContent = `Theme: ${next}`;
});

let loading = load();
loading.catch(error => say(error.message, true));
form.addEventListener("submit", async event => {
  event.preventDefault();
  // With a key, a list that was refused may be loaded now.
  loading = loading.catch(load);
  try {
    await run(await loading);
  } catch (error) {
    say(error.message, true);
  }
});
element("stop").addEventListener("click", () => race?.abort());
document.addEventListener("keydown", event => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) form.requestSubmit();
  if (event.key === "Escape") race?.abort();
});
