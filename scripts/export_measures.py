"""What is measured of an exported language model, in a process of its own, with one thread."""

from __future__ import annotations

import functools
import http.server
import json
import os
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
from benchmark_inference import memory
from export_peers import BEST, Kenlm, LstmLm, Scored, known

__all__ = ["in_browser", "measure", "sizes", "some_lines"]

# Words of the test that ask for suggestions, and the seconds after which no more of them do.
_ASKED = 400
_ENOUGH = 60
_VOCABULARY = 100_000


class Ours:
    """Asks an exported model of the plugin."""

    def __init__(self, folder: Path) -> None:
        from fairseq_lightrnn.runtime.model import ExportedModel

        self.model = ExportedModel.load(folder)
        self.text = self.model.text()

    def log_prob(self, lines: list[str]) -> Scored:
        total, count, unknown = 0.0, 0, 0
        for one in self.model.score_lines(lines, carry_hidden_state=True):
            counted = known(one.tokens, one.ids, self.model.unknown)
            total += float(one.log_probs[counted].sum())
            count += int(counted.sum())
            unknown += int((~counted).sum())
        return Scored(total, count, unknown)

    def suggest(self, word: str) -> list[str]:
        self.text.add(word)
        return [name for name, _ in self.text.next_words(BEST)[0]]

    def complete(self, word: str) -> list[str]:
        self.text.add(word)
        return [name for name, _ in self.text.complete(word[:1], BEST)[0]]


def load(folder: Path) -> Any:
    """Loads an export, whose files tell what it is of."""
    if (folder / "model.trie").exists():
        return Kenlm(folder)
    return Ours(folder) if (folder / "first.onnx").exists() else LstmLm(folder)


def measure(folder: Path, text: Path, test_words: int) -> None:
    """Measures an export and prints what it found as JSON."""
    start = time.process_time()
    import onnxruntime  # noqa: F401

    imported = time.process_time()
    before = memory("VmRSS")
    model = load(folder)
    first = model.suggest("the")
    loaded = time.process_time()
    lines = some_lines(text, test_words)
    words = [word for line in lines for word in line.split()][:_ASKED]
    found = {kind: _milliseconds(getattr(model, kind), words) for kind in ("suggest", "complete")}
    asked = memory("VmHWM")
    model = load(folder)
    begun = time.process_time()
    scored = model.log_prob(lines)
    seconds = time.process_time() - begun
    print(json.dumps({
        "import_seconds": round(imported - start, 3), "load_seconds": round(loaded - imported, 3),
        "memory_mib": round(asked - before, 1),
        "scoring_memory_mib": round(memory("VmHWM") - before, 1),
        "suggest_ms": found["suggest"], "complete_ms": found["complete"],
        "words_per_second": round((scored.words + scored.unknown) / seconds),
        "test_words": scored.words, "unknown_words": scored.unknown,
        "perplexity": round(scored.perplexity, 3), "first": first,
    }))  # fmt: skip


def _milliseconds(ask: Any, words: list[str]) -> list[float]:
    """Returns the median and the 99th percentile of what a word takes."""
    times: list[float] = []
    for word in words:
        begun = time.process_time()
        ask(word)
        times.append(time.process_time() - begun)
        if sum(times) > _ENOUGH:
            break
    return _summary([1000 * one for one in times])


def _summary(times: list[float]) -> list[float]:
    return [round(float(np.percentile(times, part)), 3) for part in (50, 99)]


def some_lines(text: Path, words: int) -> list[str]:
    """Returns the first lines of a text that have so many words, ends of lines counted."""
    lines = []
    with open(text, encoding="utf-8") as file:
        for line in file:
            lines.append(line)
            words -= len(line.split()) + 1
            if words <= 0:
                break
    return lines


def sizes(folder: Path, data: Path) -> dict[str, int]:
    """Returns the bytes of an export and of its parts, and those of a vocabulary of 100,000."""
    from fairseq_lightrnn.runtime.folder import WORDS, pack, unpack
    from fairseq_lightrnn.runtime.vocabulary import front_code

    found = {"bytes": sum(path.stat().st_size for path in folder.iterdir())}
    if not (folder / WORDS).exists():
        return found
    arrays = unpack((folder / WORDS).read_bytes())
    found |= {
        "vocabulary_bytes": len(pack({name: arrays[name] for name in ("shared", "rest")})),
        "words_bytes": (folder / WORDS).stat().st_size,
    }
    lines = (data / "dict.txt").read_text(encoding="utf-8").splitlines()[:_VOCABULARY]
    if len(lines) == _VOCABULARY:
        _, shared, rest = front_code([line.rsplit(" ", 1)[0] for line in lines])
        found["vocabulary_of_100k_bytes"] = len(pack({"shared": shared, "rest": rest}))
    return found


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *arguments: Any) -> None:
        """Says nothing of requests."""


_LOAD = """(async () => {
  const { Model } = await import(new URL('model.mjs', location.href));
  const begun = performance.now();
  globalThis.model = await Model.load();
  globalThis.state = model.begin();
  for (const word of model.description.start) state = await model.read(state, word);
  return performance.now() - begun;
})()"""
_ASK = """(async () => {
  const times = [];
  for (const word of %s) {
    const start = performance.now();
    const number = model.vocabulary.find(word) ?? model.description.unknown;
    state = await model.read(state, number);
    await model.topWords(state, %d);
    times.push(performance.now() - start);
  }
  return times;
})()"""


def _cpu_seconds(process: int) -> float:
    """Returns the seconds of the processor of a process and of all that it started."""
    path = Path(f"/proc/{process}")
    fields = (path / "stat").read_text().rsplit(")", 1)[1].split()
    started = [one for task in path.glob("task/*/children") for one in task.read_text().split()]
    own = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return own + sum(_cpu_seconds(int(one)) for one in started)


def in_browser(folder: Path, text: Path) -> dict[str, Any]:
    """Measures an export in a headless Chromium, by the clock, and by the processor on average.

    Args:
        folder: of an export that is no page yet.
        text: of the words that ask for suggestions.
    """
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
    from browser import CHROMIUM, Browser

    from fairseq_lightrnn.export.page import page_files

    if CHROMIUM is None:
        raise SystemExit("--browser needs Chromium (apt-get install chromium)")
    words = " ".join(some_lines(text, _ASKED)).split()[:_ASKED]
    with tempfile.TemporaryDirectory() as scratch:
        page = Path(scratch) / "page"
        files = page_files() | {path.name: path.read_bytes() for path in folder.iterdir()}
        for name, content in files.items():
            (page / name).parent.mkdir(parents=True, exist_ok=True)
            (page / name).write_bytes(content)
        handler = functools.partial(_Quiet, directory=str(page))
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        browser = Browser(Path(scratch) / "profile")
        try:
            browser.call("Page.navigate", url=f"http://127.0.0.1:{server.server_port}/")
            browser.wait("document.documentElement?.dataset.ready")
            load = browser.evaluate(_LOAD)
            before = _cpu_seconds(os.getpid())
            times = browser.evaluate(_ASK % (json.dumps(words), BEST))
            seconds = _cpu_seconds(os.getpid()) - before
        finally:
            browser.close()
            server.shutdown()
            server.server_close()
    return {
        "browser_load_seconds": round(load / 1000, 3),
        "browser_suggest_ms": _summary(times),
        "browser_suggest_cpu_ms": round(1000 * seconds / len(words), 3),
    }
