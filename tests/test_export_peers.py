"""What exports are measured beside: fairseq's model against itself, KenLM against its library."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fairseq import checkpoint_utils
from fairseq_run import symbols, train

SCRIPTS = Path(__file__).parents[1] / "scripts"
sys.path.insert(0, str(SCRIPTS))
from export_peers import Kenlm, LstmLm, build_kenlm, export_lstm_lm, known  # noqa: E402

KINDS: dict[str, dict[str, Any]] = {
    "lstm_lm": {"criterion": "cross_entropy"},
    "lstm_lm-adaptive": {
        "criterion": "adaptive_loss", "adaptive_softmax_cutoff": "9,20", "ddp_backend": "legacy_ddp"
    },
}  # fmt: skip
LINES = ["w1 w2 w35 w0", "w39 w4"]
needs_kenlm = pytest.mark.skipif(
    not all(map(shutil.which, ("lmplz", "build_binary"))), reason="KenLM's programs are not built"
)


@pytest.fixture(scope="module", params=KINDS)
def exported(
    request: pytest.FixtureRequest, data: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path]:
    """The checkpoint and the export of a model with 16 numbers a word."""
    folder = tmp_path_factory.mktemp(request.param)
    sizes = {f"decoder_{name}": 16 for name in ("embed_dim", "hidden_size", "out_embed_dim")}
    train(
        data, folder, "--task", "language_modeling", arch="lstm_lm", embed_dim=None,
        hidden_size=None, max_epoch=3, **sizes, **KINDS[request.param],
    )  # fmt: skip
    export_lstm_lm(folder / "checkpoint_last.pt", data, "none", folder / "export")
    return folder / "checkpoint_last.pt", folder / "export"


def log_probs(checkpoint: Path, data: Path, ids: list[int]) -> np.ndarray:
    """The distributions after each word, by fairseq, (T, V)."""
    models, _ = checkpoint_utils.load_model_ensemble([str(checkpoint)], {"data": str(data)})
    decoder = models[0].eval().decoder
    with torch.no_grad():
        output = decoder(torch.tensor([ids]))
        if decoder.adaptive_softmax is not None:
            return np.asarray(decoder.adaptive_softmax.get_log_prob(output[0], None)[0])
        return np.asarray(decoder.get_normalized_probs(output, log_probs=True)[0])


def test_fairseqs_export_says_what_fairseq_says(exported: tuple[Path, Path], data: Path) -> None:
    names = symbols(data)
    ids = [names.index(word) for line in LINES for word in [*line.split(), "</s>"]]
    expected = log_probs(exported[0], data, [2, *ids])
    scored = LstmLm(exported[1]).log_prob(LINES)
    assert scored.log_prob == pytest.approx(expected[range(len(ids)), ids].sum(), rel=1e-4)
    assert (scored.words, scored.unknown) == (len(ids), 0)
    unknown = LstmLm(exported[1]).log_prob(["w1 zebra"])
    assert (unknown.words, unknown.unknown) == (2, 1)


def test_fairseqs_export_suggests_the_best(exported: tuple[Path, Path], data: Path) -> None:
    names, model = symbols(data), LstmLm(exported[1])
    ids = [2]
    for word in ("w1", "w2", "w35", "w0", "w39"):
        ids.append(names.index(word))
        order = np.argsort(-log_probs(exported[0], data, ids)[-1])
        if word == "w35":
            order = [one for one in order if names[one].startswith("w")]
        ask = model.complete if word == "w35" else model.suggest
        assert ask(word) == [names[one] for one in order[:3]]


@needs_kenlm
def test_kenlm(data: Path, tmp_path: Path) -> None:
    kenlm = pytest.importorskip("kenlm")
    build_kenlm(data.parent / "train.txt", data, tmp_path / "kenlm")
    scored = Kenlm(tmp_path / "kenlm").log_prob(LINES)
    library = kenlm.Model(str(tmp_path / "kenlm" / "model.trie"))
    expected = sum(map(library.score, LINES)) * np.log(10)
    assert scored.log_prob == pytest.approx(expected, rel=1e-5)
    assert (scored.words, scored.unknown) == (8, 0)
    assert Kenlm(tmp_path / "kenlm").log_prob(["zebra w1"]).unknown == 1
    words = [*symbols(data)[4:], "</s>"]
    for ask, some in (("suggest", words), ("complete", words[:-1])):
        scores = {word: library.score(f"w2 {word}", eos=False) for word in some}
        best = sorted(scores.values(), reverse=True)[:3]
        model = Kenlm(tmp_path / "kenlm")
        assert [scores[word] for word in getattr(model, ask)("w2")] == pytest.approx(best)


def test_kenlms_programs_are_named_where_they_are_missing(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SystemExit, match="kenlm needs lmplz and build_binary on the PATH"):
        build_kenlm(data.parent / "train.txt", data, tmp_path / "kenlm")


def test_a_word_of_the_text_may_be_called_unknown() -> None:
    assert known(["a", "<unk>", "b"], [4, 3, 3], 3).tolist() == [True, True, False]
