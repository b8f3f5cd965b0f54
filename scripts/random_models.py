"""Models with random weights, of which speed and memory are measured."""

from __future__ import annotations

from argparse import Namespace
from typing import Any

from benchmark_language_model import cutoffs_within


def sized_task(num_words: int) -> Any:
    """Returns what models are built for: a dictionary of so many words, without the words."""
    from fairseq.data import Dictionary

    class Sized(Dictionary):
        def __len__(self) -> int:
            return num_words

    words = Sized()
    return Namespace(dictionary=words, source_dictionary=words, target_dictionary=words)


def build_ours(kind: str, own: dict[str, Any], task: Any, args: Namespace) -> Any:
    """Builds a language model of the plugin.

    Args:
        kind: the name of its class.
        own: what its words have, see ``LSTMConfig``.
        task: with the dictionary.
        args: with the width and number of layers.
    """
    from fairseq_lightrnn.models import lightrnn_lm

    cls = getattr(lightrnn_lm, kind)
    cfg = lightrnn_lm.LSTMConfig(
        embed_dim=args.width, hidden_size=args.width, num_layers=args.layers, dropout=0.2, **own
    )
    settings = cls.table_settings(cfg, len(task.dictionary))
    return cls(lightrnn_lm.LightRNNDecoder(cfg, settings, task.dictionary, cls.conditioner))


def build_lstm_lm(task: Any, args: Namespace, adaptive: bool) -> Any:
    """Builds fairseq's ``lstm_lm`` with a full softmax or an adaptive one."""
    from fairseq.models.lstm_lm import LSTMLanguageModel

    flags = Namespace(
        decoder_embed_dim=args.width, decoder_hidden_size=args.width,
        decoder_layers=args.layers, decoder_out_embed_dim=args.width, dropout=0.2,
        share_decoder_input_output_embed=False,
        adaptive_softmax_cutoff=cutoffs_within(len(task.dictionary)),
        criterion="adaptive_loss" if adaptive else "cross_entropy",
    )  # fmt: skip
    return LSTMLanguageModel.build_model(flags, task)
