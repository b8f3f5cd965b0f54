"""Generation through fairseq: its searches, against a twin that reads every hypothesis anew."""

from __future__ import annotations

import math
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from fairseq import checkpoint_utils
from fairseq_run import TASK, run, train, write_text
from scipy.stats import chisquare
from tiny_translation import banned
from torch import Tensor

from fairseq_lightrnn.core.distribution import next_word_log_probs
from fairseq_lightrnn.language_model import LanguageModel
from fairseq_lightrnn.models.lightrnn_transformer import TransformerText


class Trained(NamedTuple):
    data: Path
    folder: Path
    models: list[Any]  # of two epochs: an ensemble
    task: Any


@pytest.fixture(
    scope="module", params=["lightrnn_lm", "lightrnn_lm_gated", "lightrnn_transformer_lm"]
)
def trained(
    request: pytest.FixtureRequest, data: Path, tmp_path_factory: pytest.TempPathFactory
) -> Trained:
    folder = tmp_path_factory.mktemp("trained")
    train(
        data, folder, max_epoch=2, lr=0.05, sample_break_mode="eos", arch=request.param,
        initial_table="random", table_shape="6x9",
    )  # fmt: skip
    paths = [str(folder / f"checkpoint{epoch}.pt") for epoch in (1, 2)]
    models, _, task = checkpoint_utils.load_model_ensemble_and_task(paths)
    return Trained(data, folder, [model.eval() for model in models], task)


@pytest.fixture(scope="module")
def folder(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    train(data, folder, max_epoch=2, sample_break_mode="eos", initial_table="random")
    return folder


def flags(**values: Any) -> Namespace:
    """Settings of a generator, as fairseq's commands have them."""
    defaults = {"beam": 3, "max_len_a": 0, "max_len_b": 6, "min_len": 1, "lenpen": 1.0}
    return Namespace(**{**defaults, **values})


@torch.no_grad()
def generate(
    trained: Trained, models: list[Any], prompts: Sequence[Sequence[int]], **values: Any
) -> list[list[tuple[list[int], float]]]:
    """Generates with fairseq, for a batch of prompts."""
    generator = trained.task.build_generator(models, flags(**values))
    eos, pad = trained.task.dictionary.eos(), trained.task.dictionary.pad()
    width = max(map(len, prompts)) + 1
    source = torch.full((len(prompts), width), pad)
    for row, prompt in zip(source, prompts, strict=True):
        row[: len(prompt) + 1] = torch.tensor([eos, *prompt])
    lengths = torch.tensor([len(prompt) + 1 for prompt in prompts])
    sample = {"net_input": {"src_tokens": source, "src_lengths": lengths}}
    found = trained.task.inference_step(generator, models, sample)
    return [
        [(hypothesis["tokens"].tolist(), float(hypothesis["score"])) for hypothesis in hypotheses]
        for hypotheses in found
    ]


@torch.no_grad()
def slow_log_probs(models: list[Any], past: list[int], temperature: float) -> Tensor:
    """The distribution after a text that is read from its beginning."""
    every = []
    for model in models:
        decoder = model.decoder
        decoder = decoder.core if hasattr(decoder, "core") else TransformerText(decoder)
        context = decoder.read(torch.tensor([past]))
        log_probs = next_word_log_probs(decoder.head, context)[0]
        every.append(torch.log_softmax(log_probs / temperature, 0))
    return torch.logsumexp(torch.stack(every), 0) - math.log(len(models))


def slow_beam_search(
    trained: Trained, models: list[Any], prompt: Sequence[int], *, beam: int = 3,
    max_len_b: int = 6, temperature: float = 1.0, unkpen: float = 0.0, lenpen: float = 1.0,
    no_repeat_ngram_size: int = 0,
) -> list[tuple[list[int], float]]:  # fmt: skip
    """Beam search over whole distributions, without batches, states or tensors of hypotheses."""
    dictionary = trained.task.dictionary
    active, finished = [([dictionary.eos()], 0.0)], []
    for step in range(max_len_b + 1):
        candidates = []
        for past, score in active:
            log_probs = slow_log_probs(models, past, temperature)
            log_probs[dictionary.pad()] = -math.inf
            log_probs[dictionary.unk()] -= unkpen
            allowed = torch.zeros_like(log_probs, dtype=torch.bool)
            if step == max_len_b:
                allowed[dictionary.eos()] = True
            elif step < len(prompt):
                allowed[prompt[step]] = True
            else:
                allowed[:] = True
                allowed[dictionary.eos()] = step >= 1
            if no_repeat_ngram_size:
                allowed[banned(past, no_repeat_ngram_size)] = False
            for word in allowed.nonzero()[:, 0].tolist():
                candidates.append(([*past, word], score + float(log_probs[word])))
        candidates.sort(key=lambda pair: -pair[1])
        active = []
        for rank, (words, score) in enumerate(candidates[: 2 * beam]):
            if words[-1] != dictionary.eos():
                active.append((words, score))
            elif rank < beam and len(finished) < beam:
                finished.append((words[1:], score / (step + 1) ** lenpen))
        active = active[:beam]
        if len(finished) == beam:
            break
    return sorted(finished, key=lambda pair: -pair[1])


def assert_same(fast: list[tuple[list[int], float]], slow: list[tuple[list[int], float]]) -> None:
    assert [words for words, _ in fast] == [words for words, _ in slow]
    assert [score for _, score in fast] == pytest.approx([score for _, score in slow], abs=1e-4)


PROMPTS = [[], [5], [9, 12, 5], [3, 7], [8, 8, 8, 8]]  # 3 is the unknown word
OPTIONS: list[dict[str, Any]] = [
    {},
    {"beam": 1},
    {"temperature": 0.5},
    {"temperature": 3.0},
    {"unkpen": 5.0},
    {"lenpen": 0.0},
    {"no_repeat_ngram_size": 2},
    {"beam": 5, "max_len_b": 9, "no_repeat_ngram_size": 3},
]


class TestBeamSearch:
    @pytest.mark.parametrize("options", OPTIONS)
    def test_equals_a_search_over_whole_distributions(
        self, trained: Trained, options: dict[str, Any]
    ) -> None:
        models = trained.models[1:]
        # Prompts of one length: a batch that shrinks as its texts end, at steps of their own.
        prompts = [[5, 9], [9, 12], [3, 7], [8, 8]]
        found = generate(trained, models, prompts, **options)
        for hypotheses, prompt in zip(found, prompts, strict=True):
            assert_same(hypotheses, slow_beam_search(trained, models, prompt, **options))

    @pytest.mark.parametrize("prompt", PROMPTS)
    def test_any_prompt(self, trained: Trained, prompt: list[int]) -> None:
        models = trained.models[1:]
        (found,) = generate(trained, models, [prompt])
        assert_same(found, slow_beam_search(trained, models, prompt))

    @pytest.mark.parametrize("options", [{}, {"temperature": 2.0}])
    def test_ensembles_average_probabilities(
        self, trained: Trained, options: dict[str, Any]
    ) -> None:
        found = generate(trained, trained.models, [[5], [9]], **options)
        for hypotheses, prompt in zip(found, ([5], [9]), strict=True):
            assert_same(hypotheses, slow_beam_search(trained, trained.models, prompt, **options))

    def test_the_widest_beam_finds_the_most_probable_text(self, trained: Trained) -> None:
        """A beam of all words but <pad> and the end holds every text of one word, so the best of
        two words or fewer is exact."""
        models, dictionary = trained.models[1:], trained.task.dictionary
        best: tuple[float, list[int]] = (-math.inf, [])
        eos, pad = dictionary.eos(), dictionary.pad()
        first = slow_log_probs(models, [eos], 1.0)
        for word in (w for w in range(len(dictionary)) if w not in (eos, pad)):
            second = slow_log_probs(models, [eos, word], 1.0)
            best = max(best, (float(first[word] + second[eos]), [word, eos]))
            for other in (w for w in range(len(dictionary)) if w not in (eos, pad)):
                score = float(first[word] + second[other])
                if score > best[0]:
                    end = float(slow_log_probs(models, [eos, word, other], 1.0)[eos])
                    best = max(best, (score + end, [word, other, eos]))
        (found,) = generate(
            trained, models, [[]], beam=len(dictionary) - 1, max_len_b=2, unnormalized=True
        )
        assert found[0][0] == best[1]
        assert found[0][1] == pytest.approx(best[0], abs=1e-4)


class TestSampling:
    def test_the_only_word_of_the_top_is_the_best(self, trained: Trained) -> None:
        models = trained.models[1:]
        expected = generate(trained, models, [[5], [9]], beam=1, max_len_b=8)
        for options in ({"sampling_topk": 1}, {"sampling_topp": 1e-6}):
            found = generate(
                trained, models, [[5], [9]], beam=1, max_len_b=8, sampling=True, **options
            )
            assert [texts[0][0] for texts in found] == [texts[0][0] for texts in expected]

    @pytest.mark.parametrize(
        "options",
        [{}, {"temperature": 0.5}, {"temperature": 2.0}, {"sampling_topk": 5},
         {"sampling_topp": 0.5, "temperature": 2.0}],
    )  # fmt: skip
    def test_words_follow_the_tempered_distribution(
        self, trained: Trained, options: dict[str, Any]
    ) -> None:
        models, draws = trained.models[1:], 3000
        torch.manual_seed(1)
        found = generate(
            trained, models, [[5]] * draws, beam=1, max_len_b=2, sampling=True, **options
        )
        counts = np.bincount(
            [texts[0][0][1] for texts in found], minlength=len(trained.task.dictionary)
        )
        dictionary = trained.task.dictionary
        log_probs = slow_log_probs(models, [dictionary.eos(), 5], options.get("temperature", 1.0))
        log_probs[dictionary.pad()] = -math.inf  # fairseq never draws it, nor normalises again
        probs = log_probs.exp().double().numpy()
        order = np.argsort(-probs)
        if "sampling_topk" in options:
            probs[order[options["sampling_topk"] :]] = 0
        if "sampling_topp" in options:
            reached = np.cumsum(probs[order]) >= options["sampling_topp"]
            probs[order[int(reached.argmax()) + 1 :]] = 0
        probs /= probs.sum()
        assert (counts[probs == 0] == 0).all()
        common = probs * draws >= 5
        rest = [] if common.sum() == (probs > 0).sum() else [~common]
        observed = [*counts[common], *(counts[part].sum() for part in rest)]
        hoped = [*(probs[common] * draws), *(probs[part].sum() * draws for part in rest)]
        assert len(observed) > 3
        assert chisquare(observed, hoped).pvalue > 1e-4


class TestCommands:
    """The commands' flags, on prompts as people type them."""

    def interactive(
        self, data: Path, path: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str],
        lines: Sequence[str], *flags: Any,
    ) -> list[list[str]]:  # fmt: skip
        prompt = tmp_path / "prompt.txt"
        prompt.write_text("".join(line + "\n" for line in lines))
        capsys.readouterr()
        run("interactive", data, *TASK, "--path", path, "--cpu", "--input", prompt, *flags)
        output = capsys.readouterr().out.splitlines()
        return [line.split("\t") for line in output if line.startswith("H-")]

    @pytest.mark.parametrize(
        "flags",
        [
            ["--beam", 4, "--nbest", 3, "--max-len-b", 8],
            ["--beam", 2, "--nbest", 2, "--sampling", "--sampling-topk", 5, "--max-len-b", 8],
            ["--beam", 2, "--nbest", 2, "--sampling", "--sampling-topp", 0.5, "--max-len-b", 8],
            ["--beam", 3, "--unkpen", 9, "--no-repeat-ngram-size", 2, "--max-len-b", 8],
            ["--beam", 3, "--temperature", 2, "--buffer-size", 3, "--batch-size", 3],
        ],
    )
    def test_flags(
        self, data: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
        flags: list[Any],
    ) -> None:  # fmt: skip
        prompts = ["w1 w8", "w3", "unheard-of w2"]
        found = self.interactive(data, folder / "checkpoint2.pt", tmp_path, capsys, prompts, *flags)
        nbest = flags[flags.index("--nbest") + 1] if "--nbest" in flags else 1
        assert len(found) == nbest * len(prompts)
        for number, prompt in enumerate(["w1 w8", "w3", "<unk> w2"]):
            texts = [text for name, _, text in found if name == f"H-{number}"]
            assert all(text.startswith(prompt) for text in texts)

    @pytest.mark.parametrize("size", [1, 2, 3])
    def test_nothing_is_repeated(
        self, data: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
        size: int,
    ) -> None:  # fmt: skip
        """But what the prompt repeats, which is longer for one text than for the other."""
        prompts, path = ["w1", "w2 w2 w2 w2 w3"], folder / "checkpoint2.pt"
        flags = ["--beam", 3, "--min-len", 12, "--max-len-b", 15]

        def repeated(*more: Any) -> list[int]:
            texts = self.interactive(data, path, tmp_path, capsys, prompts, *flags, *more)
            repeats = []
            for prompt, (_, _, text) in zip(prompts, texts, strict=True):
                assert text.startswith(prompt)
                words = text.split()
                parts = [tuple(words[at : at + size]) for at in range(len(words) - size + 1)]
                new = range(len(prompt.split()) - size + 1, len(parts))
                repeats.append(sum(parts[at] in parts[:at] for at in new if at >= 0))
            return repeats

        assert sum(repeated()) > 0
        assert repeated("--no-repeat-ngram-size", size) == [0, 0]

    def test_an_ensemble(
        self, data: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        paths = ":".join(str(folder / f"checkpoint{epoch}.pt") for epoch in (1, 2))
        (found,) = self.interactive(data, paths, tmp_path, capsys, ["w1"], "--max-len-b", 5)
        assert found[2].startswith("w1")

    def test_an_empty_and_a_very_long_prompt(
        self, data: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        long = " ".join(f"w{number % 40}" for number in range(400))
        found = self.interactive(
            data, folder / "checkpoint2.pt", tmp_path, capsys, ["", long], "--beam", 2,
            "--max-len-b", 410,
        )  # fmt: skip
        assert len(found) == 2
        assert found[1][2].startswith(long)

    def test_the_first_words_of_a_split_as_prompts(
        self, data: Path, folder: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        run(
            "generate", data, *TASK, "--path", folder / "checkpoint2.pt", "--cpu", "--gen-subset",
            "test", "--sample-break-mode", "eos", "--prefix-size", 2, "--beam", 2, "--max-len-b",
            12, "--num-workers", 0, "--batch-size", 8,
        )  # fmt: skip
        lines = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
        targets = {fields[0][2:]: fields[1] for fields in lines if fields[0].startswith("T-")}
        texts = {fields[0][2:]: fields[2] for fields in lines if fields[0].startswith("H-")}
        assert len(texts) == 20
        for number, text in texts.items():
            assert text.split()[:2] == targets[number].split()[:2]


def test_shallow_fusion(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A translation's score is its own plus the weighted score of the language model."""
    train(data, tmp_path / "lm", max_epoch=1, sample_break_mode="eos", initial_table="random")
    for seed, split in enumerate(("train", "valid")):
        for side in ("xx", "yy"):
            write_text(tmp_path / f"{split}.{side}", 16, seed)
    run(
        "preprocess", "--source-lang", "xx", "--target-lang", "yy", "--trainpref",
        tmp_path / "train", "--validpref", tmp_path / "valid", "--srcdict", data / "dict.txt",
        "--tgtdict", data / "dict.txt", "--destdir", tmp_path / "bin",
    )  # fmt: skip
    # Where fairseq looks for the language model's dictionary.
    (tmp_path / "bin" / "dict.txt").write_bytes((data / "dict.txt").read_bytes())
    run(
        "train", tmp_path / "bin", "--cpu", "--arch", "transformer_iwslt_de_en",
        "--encoder-layers", 1, "--decoder-layers", 1, "--encoder-embed-dim", 8,
        "--decoder-embed-dim", 8, "--encoder-ffn-embed-dim", 8, "--decoder-ffn-embed-dim", 8,
        "--encoder-attention-heads", 1, "--decoder-attention-heads", 1, "--optimizer", "adam",
        "--lr", 0.01, "--max-tokens", 200, "--max-epoch", 1, "--save-dir", tmp_path / "mt",
        "--num-workers", 0,
    )  # fmt: skip
    capsys.readouterr()
    path, weight = tmp_path / "mt" / "checkpoint_last.pt", 0.6
    run(
        "generate", tmp_path / "bin", "--user-dir", TASK[1], "--path", path, "--cpu",
        "--gen-subset", "valid", "--beam", 3, "--max-len-b", 7, "--lm-path",
        tmp_path / "lm" / "checkpoint_last.pt", "--lm-weight", weight, "--num-workers", 0,
    )  # fmt: skip
    lines = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    sources = {fields[0][2:]: fields[1] for fields in lines if fields[0].startswith("S-")}
    found = {fields[0][2:]: fields[1:] for fields in lines if fields[0].startswith("H-")}
    assert len(found) == 16
    (model,), _, task = checkpoint_utils.load_model_ensemble_and_task([str(path)])
    lm = LanguageModel.from_pretrained(tmp_path / "lm", data)
    parts = {fields[0][2:]: fields[1].split() for fields in lines if fields[0].startswith("P-")}
    # A text as it is printed lacks the special symbols that an untrained model generates.
    whole = [key for key, (_, text) in found.items() if len(text.split()) + 1 == len(parts[key])]
    assert len(whole) >= 3
    for number in whole:
        score, text = found[number]
        source = task.source_dictionary.encode_line(sources[number], add_if_not_exist=False).long()
        target = lm.dictionary.encode_line(text, add_if_not_exist=False).long()
        shifted = torch.cat([target[-1:], target[:-1]])
        with torch.no_grad():
            output = model.eval()(source[None], torch.tensor([len(source)]), shifted[None])
            log_probs = model.get_normalized_probs(output, log_probs=True)[0]
        own = float(log_probs.gather(1, target[:, None]).sum())
        expected = (own + weight * lm.score(text).log_prob) / len(target) / math.log(2)
        assert float(score) == pytest.approx(expected, abs=1e-3)
