"""``--criterion two_component_cross_entropy``: the loss of every component, summed per word."""

from __future__ import annotations

import math
from typing import Any

import torch
from fairseq import utils
from fairseq.criterions import FairseqCriterion, register_criterion
from fairseq.dataclass import FairseqDataclass
from fairseq.logging import metrics
from torch import Tensor, nn

from fairseq_lightrnn.errors import UsageError

__all__ = ["TwoComponentCrossEntropyCriterion", "component_names"]


def component_names(num_components: int) -> list[str]:
    """Returns the components' names in logs: row and column, or component1 … of other tables."""
    if num_components == 2:
        return ["row", "column"]
    return [f"component{number + 1}" for number in range(num_components)]


@register_criterion("two_component_cross_entropy", dataclass=FairseqDataclass)
class TwoComponentCrossEntropyCriterion(FairseqCriterion):
    """Cross-entropy of words as the sum over their components (arXiv 1610.09893, equation 4)."""

    def forward(
        self, model: nn.Module, sample: dict[str, Any], reduce: bool = True
    ) -> tuple[Tensor, int, dict[str, Any]]:
        """Computes the loss of a batch.

        Args:
            model: a model whose decoder has ``component_log_probs``.
            sample: fairseq's batch, with ``net_input`` and ``target`` (B, T).
            reduce: sum over the words; otherwise one loss for each of the B·T positions.

        Returns:
            The loss in nats, the number of words it is to be divided by, and what to log.
        """
        score = getattr(getattr(model, "decoder", None), "component_log_probs", None)
        if score is None:
            raise UsageError(
                f"--criterion two_component_cross_entropy cannot train {type(model).__name__}: "
                "use --arch lightrnn_lm with it, or --criterion cross_entropy with this model"
            )
        features, _ = model(**sample["net_input"])
        target = sample["target"]
        real = target.ne(self.padding_idx)
        log_probs = score(features, target)  # (B, T, k)
        losses = -log_probs.masked_fill(~real[..., None], 0.0)
        by_component = losses.detach().sum((0, 1), dtype=torch.float64)
        loss = losses.sum() if reduce else losses.sum(-1).reshape(-1)
        logging_output: dict[str, Any] = {
            "loss": loss.data,
            "ntokens": sample["ntokens"],
            "nsentences": target.size(0),
            "sample_size": sample["ntokens"],
        }
        names = component_names(log_probs.size(-1))
        for name, value in zip(names, by_component, strict=True):
            logging_output[f"{name}_loss"] = value
        return loss, sample["ntokens"], logging_output

    @classmethod
    def reduce_metrics(cls, logging_outputs: list[dict[str, Any]]) -> None:
        """Logs the loss in bits a word, and perplexities per word and per component."""
        words = sum(log.get("sample_size", 0) for log in logging_outputs)
        keys = dict.fromkeys(key for log in logging_outputs for key in log if key.endswith("loss"))
        for key in keys:
            loss = sum(log.get(key, 0) for log in logging_outputs) / words / math.log(2)
            metrics.log_scalar(key, loss, words, round=4)
            perplexity = key.removesuffix("loss") + "ppl"
            metrics.log_derived(perplexity, _perplexity_of(key))

    @staticmethod
    def logging_outputs_can_be_summed() -> bool:
        """Tells fairseq that workers' outputs may be added up."""
        return True


def _perplexity_of(key: str) -> Any:
    return lambda meters: utils.get_perplexity(meters[key].avg)
