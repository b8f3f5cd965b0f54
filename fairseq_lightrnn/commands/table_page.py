"""A page to look at a word table in a browser: one self-contained HTML file, no network needed."""

from __future__ import annotations

import html
import io
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from fairseq_lightrnn.core.table import WordTable
from fairseq_lightrnn.files import open_bytes, whole_file

__all__ = ["read_dictionary", "write_table_page"]

# The symbols that fairseq puts before the words of every dictionary file.
SPECIAL_SYMBOLS = ("<s>", "<pad>", "</s>", "<unk>")
DEFAULT_MAX_WORDS = 1_000_000


def write_table_page(
    path: str | Path,
    table: WordTable,
    symbols: Sequence[str],
    counts: Sequence[int] | np.ndarray | None,
    *,
    title: str = "Word table",
    max_words: int = DEFAULT_MAX_WORDS,
) -> None:
    """Writes an HTML page that shows each row of a table as a group of words by frequency.

    The page draws a few words of a row and the rest on demand, so that a large vocabulary does not
    stall the browser. Words can be searched for; a chosen word shows who shares its row and its
    column.

    Args:
        path: file to write.
        table: the word table, V words.
        symbols: the V words in order of their ids.
        counts: how often each of the V words occurs in the training text; None if nobody knows.
        title: heading of the page.
        max_words: of a larger vocabulary only this many of the most frequent words are on the page.

    Raises:
        ValueError: symbols or counts are not one for each word, or ``max_words`` is below 1.
    """
    known = counts is not None
    counts = np.asarray(np.zeros(len(symbols)) if counts is None else counts, dtype=np.int64)
    if len(symbols) != table.num_words or counts.shape != (table.num_words,):
        raise ValueError(
            f"the table has {table.num_words} words, but {len(symbols)} symbols and counts of "
            f"shape {counts.shape} were given: one of each is needed for every word"
        )
    if max_words < 1:
        raise ValueError(f"max_words is {max_words}: at least 1 word must be shown")
    data = {**_page_data(table, symbols, counts, max_words), "counted": known}
    # "<" is escaped so that no word can end the script element that holds the data.
    payload = json.dumps(data, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")
    page = _PAGE.replace("@TITLE@", html.escape(title)).replace("@DATA@", payload)
    with whole_file(path) as file:
        file.write(page.encode("utf-8", "replace").decode("utf-8"))


def _page_data(
    table: WordTable, symbols: Sequence[str], counts: np.ndarray, max_words: int
) -> dict[str, object]:
    """What the page's script reads: the words row by row, in each row the most frequent first."""
    shown = np.argsort(-counts, kind="stable")[:max_words]
    row_of = table.coordinates[:, 0]
    order = shown[np.argsort(row_of[shown], kind="stable")]
    num_rows = table.shape[0]
    starts = np.searchsorted(row_of[order], np.arange(num_rows + 1))
    return {
        "shape": list(table.shape),
        "vocabulary": table.num_words,
        "tokens": int(counts.sum()),
        "digest": table.digest(),
        "words": [symbols[word] for word in order.tolist()],
        "counts": counts[order].tolist(),
        # The coordinates after the first as one number; in a row of its own each is unique.
        "rest": (table.cells[order] % (table.num_cells // num_rows)).tolist(),
        "starts": starts.tolist(),
        "rowCounts": np.bincount(row_of, weights=counts, minlength=num_rows).tolist(),
        "rowSizes": np.bincount(row_of, minlength=num_rows).tolist(),
    }


def read_dictionary(path: str | Path) -> tuple[list[str], np.ndarray]:
    """Reads a fairseq ``dict.txt``.

    Returns:
        The V words in order of their ids, special symbols first, and their counts (0 for the
        special symbols, which the file does not count).

    Raises:
        ValueError: the file is missing, a line is not "word count", or a word stands there twice.
    """
    symbols, counts = list(SPECIAL_SYMBOLS), [0] * len(SPECIAL_SYMBOLS)
    known = set(symbols)
    with open_bytes(path, "dictionary file") as file:
        content = file.read()
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: no dictionary, its bytes are not UTF-8 ({error})") from None
    for number, line in enumerate(io.StringIO(text, newline=None), start=1):
        entry = line.rstrip()
        overwrite = entry.endswith(" #fairseq:overwrite")
        if overwrite:
            entry = entry.removesuffix(" #fairseq:overwrite")
        word, space, count = entry.rpartition(" ")
        try:
            counts.append(int(count))
        except ValueError:
            space = ""
        if not space:
            raise ValueError(f"{path}: line {number} is {line.rstrip()!r}, not 'word count'")
        if word in known and not overwrite:
            raise ValueError(f"{path}: line {number} holds {word!r} a second time")
        known.add(word)
        symbols.append(word)
    return symbols, np.array(counts)


_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>@TITLE@</title>
<style>
:root { color-scheme: light dark; --line: #8884; --soft: #8881; --mark: #2a7ae2; --dim: #777; }
body { font: 15px/1.5 system-ui, sans-serif; margin: 0 auto; max-width: 75rem;
  padding: 0 1rem 4rem; }
h1 { font-size: 1.5rem; margin: 1.2rem 0 .2rem; }
h2 { font-size: 1rem; margin: .6rem 0 .2rem; }
p { margin: .2rem 0; }
.dim { color: var(--dim); }
#bar { position: sticky; top: 0; background: Canvas; padding: .6rem 0; z-index: 1;
  border-bottom: 1px solid var(--line); }
#bar input, #bar select, button { font: inherit; }
#bar input { width: min(24rem, 60vw); padding: .25rem .5rem; }
#found, #chosen { max-height: 8rem; overflow-y: auto; }
#chosen { max-height: 11rem; }
#chosen:not(:empty) { border: 1px solid var(--line); border-radius: .4rem; padding: .3rem .8rem;
  margin-top: .5rem; }
.row { display: grid; grid-template-columns: 8.5rem 1fr; gap: .8rem; padding: .5rem .3rem;
  border-bottom: 1px solid var(--line); content-visibility: auto;
  contain-intrinsic-size: auto 5rem; }
.row.here { background: var(--soft); }
.word { background: none; border: 0; padding: 0; margin: 0 .75em 0 0; color: inherit;
  cursor: pointer; display: inline-block; overflow-wrap: anywhere; text-align: left; }
.word:hover, .word:focus-visible { text-decoration: underline; }
.word.big { font-weight: 600; }
.word.small { opacity: .75; }
.word.mark { color: var(--mark); font-weight: 700; }
.more { border: 1px solid var(--line); border-radius: 1rem; background: var(--soft);
  color: inherit; padding: 0 .6rem; cursor: pointer; font-size: .85em; }
</style>
</head>
<body>
<h1>@TITLE@</h1>
<p id="about"></p>
<p class="dim">Words of one row share their row vector, words of one column share their column
vector. <span id="counted">In every row the most frequent words come first.</span> Choose a word to
see its row and its column.</p>
<div id="bar">
<label>Find a word <input id="query" type="search" autocomplete="off" spellcheck="false"></label>
<label>Rows in order of <select id="order">
<option value="frequency">how much of the text they cover</option>
<option value="number">their number</option></select></label>
<div id="found"></div>
<div id="chosen"></div>
</div>
<main id="rows"></main>
<p><button class="more" id="more" hidden></button></p>
<noscript>This page needs JavaScript (its own only; it loads nothing).</noscript>
<script id="data" type="application/json">@DATA@</script>
<script>
"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const { words, counts, rest, starts, shape } = data;
const lower = words.map(word => word.toLowerCase());
const number = value => value.toLocaleString("en");
const byId = id => document.getElementById(id);
const rowCount = shape[0];
const ROWS_AT_ONCE = 500, FOUND = 100, MATES = 300;
const perRow = Math.max(8, Math.min(40, Math.floor(30000 / Math.min(rowCount, ROWS_AT_ONCE))));
const [bigFrom, smallBelow] = frequencyLimits();
let order = [], drawn = 0, chosen = -1;

function frequencyLimits() {
  const sorted = Float64Array.from(counts).sort();
  const at = share => sorted[Math.min(sorted.length - 1, Math.floor(share * sorted.length))];
  return [at(0.97), at(0.5)];
}

function element(tag, text, className) {
  const made = document.createElement(tag);
  if (text !== undefined) made.textContent = text;
  if (className) made.className = className;
  return made;
}

function rowOf(index) {
  let low = 0, high = rowCount;
  while (high - low > 1) {
    const middle = (low + high) >> 1;
    if (starts[middle] <= index) low = middle; else high = middle;
  }
  return low;
}

function place(index) {
  const later = [];
  let left = rest[index];
  for (let i = shape.length - 1; i > 0; i--) {
    later.unshift(left % shape[i]);
    left = Math.floor(left / shape[i]);
  }
  const names = shape.length > 2 ? "coordinates" : "column";
  return `row ${rowOf(index)}` + (later.length ? `, ${names} ${later.join(", ")}` : "");
}

function wordButton(index) {
  const button = element("button", words[index], "word");
  if (counts[index] >= bigFrom) button.classList.add("big");
  else if (counts[index] < smallBelow) button.classList.add("small");
  if (index === chosen) button.classList.add("mark");
  button.dataset.index = index;
  return button;
}

function addWords(parent, indices, limit) {
  const some = document.createDocumentFragment();
  for (const index of indices.slice(0, limit)) some.append(wordButton(index), " ");
  const left = indices.length - limit;
  if (left > 0) {
    const more = element("button", `${number(left)} more`, "more");
    more.onclick = () => { more.remove(); addWords(parent, indices.slice(limit), 2000); };
    some.append(more);
  }
  parent.append(some);
}

function range(from, to) {
  return Array.from({ length: to - from }, (_, i) => from + i);
}

function drawRow(row) {
  const section = element("section", undefined, "row");
  section.id = `row-${row}`;
  const head = element("div", `row ${row}`);
  const share = 100 * data.rowCounts[row] / data.tokens;
  head.append(element("div", `${number(data.rowSizes[row])} words`, "dim"));
  if (data.tokens) head.append(element("div", `${share.toFixed(2)} % of the text`, "dim"));
  const body = element("div");
  addWords(body, range(starts[row], starts[row + 1]), perRow);
  section.append(head, body);
  return section;
}

function drawMore() {
  const upTo = Math.min(rowCount, drawn + ROWS_AT_ONCE);
  const some = document.createDocumentFragment();
  for (; drawn < upTo; drawn++) some.append(drawRow(order[drawn]));
  byId("rows").append(some);
  byId("more").hidden = drawn === rowCount;
  byId("more").textContent = `${number(rowCount - drawn)} more rows`;
}

function drawAll() {
  order = range(0, rowCount);
  if (byId("order").value === "frequency") {
    order.sort((a, b) => data.rowCounts[b] - data.rowCounts[a] || a - b);
  }
  byId("rows").replaceChildren();
  drawn = 0;
  drawMore();
}

function search() {
  const query = byId("query").value.trim().toLowerCase();
  const found = byId("found");
  found.replaceChildren();
  if (!query) return;
  const ranks = [[], [], []];
  for (let i = 0; i < lower.length; i++) {
    const at = lower[i].indexOf(query);
    if (at >= 0) ranks[at > 0 ? 2 : lower[i].length > query.length ? 1 : 0].push(i);
  }
  const matches = ranks.flatMap(rank => rank.sort((a, b) => counts[b] - counts[a] || a - b));
  const count = matches.length === 1 ? "1 word" : `${number(matches.length)} words`;
  found.append(element("span", matches.length ? `${count}: ` : "no such word", "dim"));
  addWords(found, matches, FOUND);
}

function choose(index) {
  document.querySelectorAll(".word.mark").forEach(button => button.classList.remove("mark"));
  chosen = index;
  document.querySelectorAll(`.word[data-index="${index}"]`)
    .forEach(button => button.classList.add("mark"));
  const row = rowOf(index);
  const panel = byId("chosen");
  panel.replaceChildren();
  const head = element("p");
  const times = counts[index] === 1 ? "once" : `${number(counts[index])} times`;
  const told = data.counted ? `${times} in the training text, ` : "";
  head.append(element("b", words[index]), `: ${told}${place(index)} `);
  const go = element("button", "go to its row", "more");
  go.onclick = () => {
    while (!byId(`row-${row}`)) drawMore();
    document.querySelectorAll(".row.here").forEach(section => section.classList.remove("here"));
    byId(`row-${row}`).classList.add("here");
    byId(`row-${row}`).scrollIntoView({ block: "center" });
  };
  const close = element("button", "close", "more");
  close.onclick = () => panel.replaceChildren();
  head.append(go, " ", close);
  panel.append(head);
  const mates = [["Same row", range(starts[row], starts[row + 1])]];
  if (shape.length > 1) {
    const column = [];
    for (let i = 0; i < rest.length; i++) if (rest[i] === rest[index]) column.push(i);
    mates.push([shape.length > 2 ? "Same other coordinates" : "Same column", column]);
  }
  for (const [title, indices] of mates) {
    const others = indices.filter(i => i !== index).sort((a, b) => counts[b] - counts[a] || a - b);
    const list = element("div");
    addWords(list, others, MATES);
    panel.append(element("h2", `${title} (${number(others.length)} others)`), list);
  }
}

document.addEventListener("click", event => {
  const index = event.target.dataset && event.target.dataset.index;
  if (index !== undefined) choose(Number(index));
});
let waiting;
byId("query").addEventListener("input", () => {
  clearTimeout(waiting);
  waiting = setTimeout(search, 120);
});
byId("query").addEventListener("keydown", event => {
  if (event.key !== "Enter") return;
  search();
  const first = byId("found").querySelector(".word");
  if (first) choose(Number(first.dataset.index));
});
byId("order").addEventListener("change", drawAll);
byId("more").addEventListener("click", drawMore);
const cells = shape.reduce((a, b) => a * b, 1);
const hidden = data.vocabulary - words.length;
byId("about").textContent = `${number(data.vocabulary)} words in a table of ${shape.join(" × ")} = `
  + `${number(cells)} cells (${number(cells - data.vocabulary)} empty), table ${data.digest}.`
  + (hidden ? ` Shown are the ${data.counted ? "most frequent" : "first"} `
    + `${number(words.length)} words.` : "");
byId("counted").hidden = !data.counted;
drawAll();
</script>
</body>
</html>
"""
