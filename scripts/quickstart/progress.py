"""Keeps the whole output of a command in a log file and shows the part that a newcomer wants.

Use: ``COMMAND 2>&1 | python progress.py LOGFILE [EPOCHS]``, with the number of epochs where the
command is a training, which then gets a progress bar.
"""

from __future__ import annotations

import json
import re
import signal
import sys
import time
from collections.abc import Callable, Iterable
from typing import TextIO

__all__ = ["Display", "copy_and_show"]

_BAR = 24
_PREFIX = re.compile(r"^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d \| [A-Z]+ \| ([\w.]+) \| ")
# What a command's output tells a newcomer, and in which words.
_TELLING: list[tuple[re.Pattern[str], Callable[[re.Match[str]], str]]] = [
    (
        re.compile(r"^\[None\] Dictionary: (\d+) types"),
        lambda found: f"a vocabulary of {int(found[1]):,} words",
    ),
    (
        re.compile(r"^initial table: (\w+), WordTable\((\d+) words, ([\d×]+)\b.*?([\d.]+) seconds"),
        lambda found: (
            f"a word table of {found[3]} cells, made from "
            + ("which words occur together" if found[1] == "cooccurrence" else found[1])
            + f" ({float(found[4]):.0f} s)"
        ),
    ),
    (
        re.compile(r"Loss \(base 2\): \S+ Perplexity: ([\d.]+|inf)"),
        lambda found: f"perplexity {float(found[1]):.1f} on the test text",
    ),
    (re.compile(r"^H-0\t\S+\t(.*)"), lambda found: found[1]),
    (re.compile(r"^(\d[\d,]* words to train on.*)"), lambda found: found[1]),
]


class Display:
    """Shows lines that stay and, on a terminal, a last line that changes.

    Args:
        screen: where to show them.
        epochs: of the training that is shown; 0 if it is none.
        clock: tells seconds.
    """

    def __init__(
        self, screen: TextIO, epochs: int = 0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.screen, self.epochs, self.clock = screen, epochs, clock
        self.start: tuple[float, float] | None = None  # time and epochs done at the first record
        self.tenths = -1
        self.last = ""
        self.changing = False

    def line(self, text: str) -> None:
        """Shows a line that stays, unless it repeats the one before it."""
        self.end()
        if text == self.last:
            return
        self.last = text
        print(f"      {text}", file=self.screen, flush=True)

    def end(self) -> None:
        """Takes away the line that changes."""
        if self.changing:
            print("\r\033[K", end="", file=self.screen, flush=True)
            self.changing = False

    def show(self, output: str) -> None:
        """Shows what a line of a command's output tells, if anything."""
        plain = _PREFIX.sub("", output.rstrip())
        if plain.startswith("{") and self.epochs:
            try:
                self._record(json.loads(plain))
            except (ValueError, KeyError, TypeError):
                return
        for pattern, words in _TELLING:
            found = pattern.search(plain)
            if found:
                self.line(words(found))

    def _record(self, record: dict) -> None:
        """Shows a progress record of fairseq's."""
        if "valid_ppl" in record:
            perplexity = float(record["valid_ppl"])
            self.line(
                f"epoch {record['epoch']} of {self.epochs} done: "
                f"perplexity {perplexity:.1f} on the validation text"
            )
        elif "train_ppl" not in record:
            self._bar(float(record["update"]), record)

    def _bar(self, done: float, record: dict) -> None:
        """Shows the progress bar; without a terminal, at every tenth of the training.

        Args:
            done: epochs done, such as 1.5.
            record: of fairseq's.
        """
        now = self.clock()
        if self.start is None:
            self.start = now, done
        began, first = self.start
        share = min(done / self.epochs, 1.0)
        full = round(share * _BAR)
        text = f"epoch {record['epoch']} of {self.epochs} {'█' * full}{'░' * (_BAR - full)}"
        text += f" {100 * share:3.0f} %"
        if "ppl" in record:
            text += f"  perplexity {float(record['ppl']):.1f}"
        if float(record.get("wps", 0)) > 0:
            text += f"  {float(record['wps']):,.0f} words/s"
        if done > first:
            left = round((self.epochs - done) * (now - began) / (done - first))
            text += f"  {left // 60}:{left % 60:02d} left"
        if self.screen.isatty():
            print(f"\r\033[K      {text}", end="", file=self.screen, flush=True)
            self.changing = True
        elif int(10 * share) > self.tenths:
            self.tenths = int(10 * share)
            self.line(text)


def copy_and_show(lines: Iterable[str], log: TextIO, display: Display) -> None:
    """Copies every line to the log and shows what the telling ones say.

    Args:
        lines: the output of a command, as it comes.
        log: takes all of it.
        display: takes what is to be shown.
    """
    try:
        for line in lines:
            log.write(line)
            log.flush()
            display.show(line)
    finally:
        display.end()


def main() -> int:
    """Runs the command line; returns the exit status."""
    if len(sys.argv) not in (2, 3):
        print("usage: COMMAND 2>&1 | progress.py LOGFILE [EPOCHS]", file=sys.stderr)
        return 2
    # An interrupted command may have last words: read them before ending.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    sys.stdin.reconfigure(errors="replace")  # type: ignore[union-attr]
    epochs = int(sys.argv[2]) if len(sys.argv) == 3 else 0
    with open(sys.argv[1], "a", encoding="utf-8") as log:
        copy_and_show(sys.stdin, log, Display(sys.stdout, epochs))
    return 0


if __name__ == "__main__":
    sys.exit(main())
