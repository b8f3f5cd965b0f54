"""Keeps the whole output of a command in a log file and shows the part that a newcomer wants.

Use: ``COMMAND 2>&1 | python progress.py LOGFILE``.
"""

from __future__ import annotations

import json
import re
import signal
import sys
import textwrap
from collections.abc import Iterable
from typing import TextIO

__all__ = ["copy_and_show", "readable"]

WIDTH = 160
_PREFIX = re.compile(r"^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d \| [A-Z]+ \| ([\w.]+) \| ")
_UNWANTED = re.compile(
    r"^(Namespace\(|\{'_name'|[SWDP]-\d+\t|\s*\d+%\|)"
    r"|^(Preparing to save|Saving|Finished saving|Start iterating|grouped total_num_itrs)\b"
    r"|^(begin (validation|training)|end of epoch|skipp?ing remaining batches|rank \d+:|\*{9})"
)


def readable(line: str) -> str | None:
    """Returns how a line of output is shown, or None if it is only kept in the log file."""
    plain = _PREFIX.sub("", line.rstrip())
    if not plain or _UNWANTED.search(plain):
        return None
    if plain.startswith("{"):
        try:
            return _readable_record(json.loads(plain))
        except (ValueError, KeyError, TypeError):
            pass
    if plain.startswith("reallocation after"):
        return textwrap.fill(plain, 100, initial_indent="  ", subsequent_indent="    ")
    return plain if len(plain) <= WIDTH else plain[: WIDTH - 1] + "…"


def _readable_record(record: dict) -> str | None:
    """Puts a progress record of fairseq's into words."""
    epoch = f"  epoch {record['epoch']}"
    if "valid_ppl" in record:
        return f"{epoch}: validation perplexity {float(record['valid_ppl']):.1f}"
    if "train_ppl" in record:
        return f"{epoch}: training perplexity {float(record['train_ppl']):.1f}"
    share = 100 * (float(record["update"]) - int(record["epoch"]) + 1)
    shown = f"{epoch}, {share:3.0f} %"
    if "ppl" in record:
        shown += f": training perplexity {float(record['ppl']):.1f}"
    if "wps" in record and float(record["wps"]) > 0:
        shown += f", {float(record['wps']):,.0f} words/s"
    return shown


def copy_and_show(lines: Iterable[str], log: TextIO, screen: TextIO) -> None:
    """Copies every line to the log and shows the readable ones.

    Args:
        lines: the output of a command, as it comes.
        log: takes all of it.
        screen: takes what is to be shown.
    """
    for line in lines:
        log.write(line)
        log.flush()
        shown = readable(line)
        if shown is not None:
            print(shown, file=screen, flush=True)


def main() -> int:
    """Runs the command line; returns the exit status."""
    if len(sys.argv) != 2:
        print("usage: COMMAND 2>&1 | progress.py LOGFILE", file=sys.stderr)
        return 2
    # An interrupted command may have last words: read them before ending.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    sys.stdin.reconfigure(errors="replace")  # type: ignore[union-attr]
    with open(sys.argv[1], "a", encoding="utf-8") as log:
        copy_and_show(sys.stdin, log, sys.stdout)
    return 0


if __name__ == "__main__":
    sys.exit(main())
