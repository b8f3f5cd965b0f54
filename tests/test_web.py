"""The page of ``--format web`` in a real browser, against the runner in Python."""

from __future__ import annotations

import functools
import http.server
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from browser import CHROMIUM, Browser
from fairseq_run import move_in_further_tables, train

from fairseq_lightrnn.commands import export
from fairseq_lightrnn.export.page import page_files
from fairseq_lightrnn.runtime.model import ExportedModel

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium (apt-get install chromium)"),
]

KINDS: dict[str, dict[str, Any]] = {
    "paper": {"arch": "lightrnn_lm"},
    "projected outputs": {"component_vectors": "shared", "hidden_size": 10},
    "own numbers": {"arch": "lightrnn_lm_gated", "word_dim": 3},
    "further tables": {"arch": "lightrnn_lm_gated", "further_tables": "2"},
    "input tables": {"arch": "lightrnn_lm_gated", "further_tables": "2"},
    "three components": {"arch": "lightrnn_lm_gated", "table_shape": "4x4x4"},
    "transformer": {"arch": "lightrnn_transformer_lm", "word_dim": 3},
}
WORDS = "[...document.querySelectorAll('#suggestions span')].map(one => one.textContent)"
QUANTISED = {"own numbers": "int8", "further tables": "int4", "paper": "fp16",
    "transformer": "int8",
}  # fmt: skip


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *arguments: Any) -> None:
        """Says nothing of requests."""


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    found = Browser(tmp_path_factory.mktemp("profile"))
    yield found
    found.close()


@pytest.fixture(scope="module", params=KINDS)
def page(
    request: pytest.FixtureRequest,
    data: Path,
    tmp_path_factory: pytest.TempPathFactory,
    browser: Browser,
) -> Iterator[Any]:
    """The model, shown in the browser from a server of this machine."""
    try:
        page_files()
    except ValueError as error:
        pytest.skip(str(error))
    checkpoint, folder = tmp_path_factory.mktemp("trained"), tmp_path_factory.mktemp("x") / "web"
    more = ["--keep-input-table"] if request.param == "input tables" else []
    train(data, checkpoint, *more, max_epoch=2, **KINDS[request.param])
    if request.param == "input tables":
        move_in_further_tables(checkpoint)
    export.main([
        str(checkpoint), "-o", str(folder), "--format", "web",
        "--quantize", QUANTISED.get(request.param, "none"),
    ])  # fmt: skip
    handler = functools.partial(Quiet, directory=str(folder))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    browser.call("Page.navigate", url=f"http://127.0.0.1:{server.server_port}/")
    ready = browser.wait("document.documentElement?.dataset.ready")
    assert ready == "yes", browser.evaluate("document.body.innerText")
    yield ExportedModel.load(folder)
    server.shutdown()
    server.server_close()


def clear(browser: Browser) -> None:
    browser.evaluate(
        "(() => { const box = document.getElementById('text'); box.value = ''; box.focus();"
        " box.dispatchEvent(new Event('input')); })()"
    )


def typable(pairs: list[tuple[str, float]]) -> list[tuple[str, float]]:
    """The best of ten that somebody might type."""
    special = {"<s>", "<pad>", "</s>", "<unk>"}
    return [pair for pair in pairs if pair[0] not in special][:6]


def names(pairs: list[tuple[str, float]]) -> list[str]:
    return [word for word, _ in typable(pairs)]


def suggested(browser: Browser, expected: list[str]) -> bool:
    listed = ",".join(f"'{word}'" for word in expected)
    return bool(browser.wait(f"{WORDS}.join() === [{listed}].join()"))


def test_typing_changes_what_is_suggested(page: ExportedModel, browser: Browser) -> None:
    clear(browser)
    assert suggested(browser, names(page.next_words("", 10)))
    browser.type("w1 w8")
    assert suggested(browser, names(page.complete("w1 w8", 10)))
    browser.type(" ")
    assert suggested(browser, names(page.next_words("w1 w8", 10)))
    shares = browser.evaluate(
        "[...document.querySelectorAll('#suggestions small')].map(one => one.textContent)"
    )
    expected = [p for _, p in typable(page.next_words("w1 w8", 10))]
    assert [float(share.rstrip("%")) / 100 for share in shares] == pytest.approx(expected, rel=0.06)
    assert float(browser.evaluate("document.getElementById('latency').value").split()[0]) > 0
    browser.type("zzz")
    assert browser.wait("document.getElementById('state').textContent.includes('zzz')")


def test_a_transformers_text_has_an_end(page: ExportedModel, browser: Browser) -> None:
    if page.network.memory.carries:
        pytest.skip("an LSTM reads on for ever")
    clear(browser)
    text = "w1 w8 " * 5
    browser.type(text)
    assert suggested(browser, names(page.next_words(text, 10)))
    browser.type("w1 w8 ")
    assert browser.wait("document.getElementById('state').textContent.includes('of more than 12')")
    clear(browser)
    assert suggested(browser, names(page.next_words("", 10)))


def test_the_keyboard_alone_will_do(page: ExportedModel, browser: Browser) -> None:
    clear(browser)
    first = names(page.next_words("", 10))[0]
    assert suggested(browser, names(page.next_words("", 10)))
    browser.key("Tab", 9)
    assert browser.wait("document.activeElement.closest('#suggestions') !== null")
    browser.key("Enter", 13, "\r")
    assert browser.wait(f"document.getElementById('text').value === '{first} '")
    assert browser.evaluate("document.activeElement.id") == "text"
    assert suggested(browser, names(page.next_words(first, 10)))


def test_the_table_shows_neighbours(page: ExportedModel, browser: Browser) -> None:
    browser.evaluate("document.getElementById('tab-type').focus()")
    browser.key("ArrowRight", 39)
    assert browser.evaluate("!document.getElementById('table').hidden")
    browser.evaluate("document.getElementById('word').focus()")
    browser.type("w7")
    number = page.vocabulary.find("w7")
    assert number is not None
    coordinates = page.network.seating.coordinates
    cell = " · ".join(map(str, coordinates[number].tolist()))
    assert browser.wait(f"document.getElementById('cell').textContent === '{cell}'")
    row = browser.evaluate("[...document.querySelectorAll('#row li')].map(one => one.textContent)")
    same = (coordinates[:, :-1] == coordinates[number, :-1]).all(axis=1).nonzero()[0].tolist()
    assert sorted(row) == sorted(page.vocabulary[word] for word in same if word != number)
    browser.type("zz")
    assert browser.wait("document.getElementById('unknown').textContent.includes('w7zz')")
    browser.evaluate(
        "(() => { document.getElementById('word').value = '';"
        " document.getElementById('tab-type').click(); })()"
    )


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [320, 1200])
def test_light_and_dark_narrow_and_wide(
    page: ExportedModel, browser: Browser, scheme: str, width: int, tmp_path: Path
) -> None:
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    browser.call("Emulation.setEmulatedMedia", features=features)
    browser.call(
        "Emulation.setDeviceMetricsOverride", width=width, height=800, deviceScaleFactor=1,
        mobile=False,
    )  # fmt: skip
    ground, ink = browser.evaluate(
        "[getComputedStyle(document.body).backgroundColor, getComputedStyle(document.body).color]"
        ".map(one => one.match(/\\d+/g).map(Number).reduce((a, b) => a + b) / 765)"
    )
    assert (ground < 0.3 and ink > 0.7) if scheme == "dark" else (ground > 0.7 and ink < 0.3)
    wide = browser.evaluate("document.documentElement.scrollWidth")
    assert wide <= width
    browser.screenshot(tmp_path / "page.png")
    assert (tmp_path / "page.png").stat().st_size > 1000


def test_nothing_comes_from_elsewhere(page: ExportedModel, browser: Browser) -> None:
    """No request leaves the server that the page came from."""
    urls = browser.evaluate("performance.getEntriesByType('resource').map(one => one.name)")
    origin = browser.evaluate("location.origin")
    assert len(urls) > 5
    assert all(url.startswith((origin, "data:", "blob:")) for url in urls)
