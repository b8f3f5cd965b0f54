import { Model, Typing } from "./model.mjs";

const COUNT = 6;
const SHOWN = 60;
const by = (id) => document.getElementById(id);
const percent = new Intl.NumberFormat("en", { style: "percent", maximumSignificantDigits: 2 });

let model;
let typing;
let asked = 0; // questions so far; only the last one's answer is shown
let busy = Promise.resolve();

function suggest() {
  const mine = ++asked;
  busy = busy.then(async () => {
    if (mine !== asked) return;
    const begun = performance.now();
    const { words, opened, typed } = await typing.ask(by("text").value, COUNT);
    const milliseconds = performance.now() - begun;
    if (mine !== asked) return;
    by("suggestions").replaceChildren(...words.map(({ word, probability }) => {
      const button = document.createElement("button");
      button.type = "button";
      button.style.setProperty("--share", probability / Math.max(words[0].probability, 1e-9));
      const name = document.createElement("span");
      name.textContent = word;
      const share = document.createElement("small");
      share.textContent = probability < 1e-4 ? "< 0.01%" : percent.format(probability);
      button.append(name, share);
      button.addEventListener("click", () => accept(word));
      return button;
    }));
    by("latency").value = `${milliseconds.toFixed(1)} ms`;
    by("opened").value = String(opened);
    by("state").textContent = words.length ? "" : `No word begins with “${typed}”.`;
  }).catch(failed);
}

function failed(error) {
  by("suggestions").replaceChildren();
  by("state").textContent = String(error.message ?? error);
}

function accept(word) {
  // More may have been typed since the word was suggested.
  by("text").value = `${by("text").value.replace(/\S*$/, "")}${word} `;
  by("text").focus();
  suggest();
}

function look() {
  const word = by("word").value.trim();
  const number = model.vocabulary.find(word);
  const known = number !== null;
  by("unknown").textContent = known || !word ? "" : `“${word}” is not in the vocabulary.`;
  by("neighbours").hidden = !known;
  if (!known) return;
  const { coordinates, row, column } = model.neighbours(number);
  by("cell").textContent = coordinates.join(" · ");
  for (const [id, words] of [["row", row], ["column", column]]) {
    by(id).replaceChildren(...words.slice(0, SHOWN).map((name) => {
      const item = document.createElement("li");
      item.textContent = name;
      return item;
    }));
  }
}

function show(tab) {
  for (const one of document.querySelectorAll("[role=tab]")) {
    const chosen = one === tab;
    one.setAttribute("aria-selected", String(chosen));
    one.tabIndex = chosen ? 0 : -1;
    by(one.getAttribute("aria-controls")).hidden = !chosen;
  }
}

const tabs = [...document.querySelectorAll("[role=tab]")];
for (const tab of tabs) {
  tab.addEventListener("click", () => show(tab));
  tab.addEventListener("keydown", (event) => {
    if (!["ArrowLeft", "ArrowRight"].includes(event.key)) return;
    const other = tabs[(tabs.indexOf(tab) + 1) % tabs.length];
    other.focus();
    show(other);
  });
}

try {
  const begun = performance.now();
  model = await Model.load();
  typing = new Typing(model);
  await typing.begin();
  const bytes = Object.values(model.description.files).reduce((sum, one) => sum + one.bytes, 0);
  by("about").textContent =
    `${model.vocabulary.length.toLocaleString("en")} words in ` +
    `${(bytes / 1e6).toFixed(2)} MB, ready after ${((performance.now() - begun) / 1000).toFixed(1)} s. ` +
    "Nothing that you type leaves this page.";
  by("text").addEventListener("input", suggest);
  by("word").addEventListener("input", look);
  by("text").disabled = false;
  by("text").focus();
  by("state").textContent = "";
  suggest();
  document.documentElement.dataset.ready = "yes";
} catch (error) {
  failed(error);
  document.documentElement.dataset.ready = "failed";
}
