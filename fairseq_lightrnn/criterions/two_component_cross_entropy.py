"""``--criterion two_component_cross_entropy``: the loss of every component, summed per word."""

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from fairseq import utils
from fairseq.criterions import FairseqCriterion, register_criterion
from fairseq.dataclass import FairseqDataclass
from fairseq.logging import metrics
from torch import Tensor, nn

from fairseq_lightrnn.core.decoder import Activations
from fairseq_lightrnn.core.network import mean_square, mean_square_change
from fairseq_lightrnn.core.table import component_names
from fairseq_lightrnn.errors import UsageError
from fairseq_lightrnn.models.flags import Regularisation
from fairseq_lightrnn.models.word_head import WordHead

__all__ = [
    "TwoComponentCrossEntropyConfig",
    "TwoComponentCrossEntropyCriterion",
]

# Penalties of a model's regularisation, and their names in logs.
PENALTIES = {"activation": "ar", "change": "tar"}


@dataclass
class TwoComponentCrossEntropyConfig(FairseqDataclass):
    label_smoothing: float = field(
        default=0.0,
        metadata={
            "help": "share of every component's target that is spread over words: the row's over "
            "all words, the column's over the words of the target's row; the loss without it is "
            "logged as nll_loss"
        },
    )


@register_criterion("two_component_cross_entropy", dataclass=TwoComponentCrossEntropyConfig)
class TwoComponentCrossEntropyCriterion(FairseqCriterion):
    """Cross-entropy of words as the sum over their components (arXiv 1610.09893, equation 4).

    In training, penalties on the activations of the model's last layer are added to it where the
    model asks for them, ``--regularise`` (arXiv 1708.02182, section 4.6). They are logged by
    themselves: the loss that is reported, and the perplexities, never contain them.

    Label smoothing (Szegedy et al., arXiv 1512.00567, section 7) with a share ε replaces the target
    of every component: from all on the target word's coordinate to ``1 - ε`` on it and ε spread
    uniformly over the *words* that share the target's coordinates before it, which gives a
    coordinate as much as it has such words, the target's own included. With two components::

        (1 - ε) · -log P(w) + ε · mean over all words v of -log P(row of v)
                            + ε · mean over the words v of w's row of -log P(column of v | row)

    So the best that the model can do is to predict, at every component, ``1 - ε`` times the data's
    distribution plus ε times that of a word drawn uniformly. With one component this is ordinary
    label smoothing over the vocabulary. It is not ordinary label smoothing of words otherwise:
    that would need the columns of all other rows, a pass over the vocabulary for every position.

    Args:
        task: fairseq's task.
        label_smoothing: ε, at least 0 and below 1.
    """

    def __init__(self, task: Any, label_smoothing: float = 0.0) -> None:
        super().__init__(task)
        if not 0 <= label_smoothing < 1:
            raise UsageError(f"--label-smoothing {label_smoothing}: must be at least 0 and below 1")
        self.label_smoothing = label_smoothing

    def forward(
        self, model: nn.Module, sample: dict[str, Any], reduce: bool = True
    ) -> tuple[Tensor, int, dict[str, Any]]:
        """Computes the loss of a batch.

        Args:
            model: a model whose decoder has a :class:`WordHead`.
            sample: fairseq's batch, with ``net_input`` and ``target`` (B, T).
            reduce: sum over the words; otherwise one loss for each of the B·T positions.

        Returns:
            The loss in nats, the number of words it is to be divided by, and what to log.
        """
        head: WordHead | None = getattr(getattr(model, "decoder", None), "words", None)
        if not isinstance(head, WordHead):
            raise UsageError(
                f"--criterion two_component_cross_entropy cannot train {type(model).__name__}: "
                "use one of the lightrnn architectures with it, or --criterion cross_entropy with "
                "this model"
            )
        features, extra = model(**sample["net_input"])
        target = sample["target"]
        losses, means = self._losses(head, features, target)  # (B, T, k)
        by_component = losses.detach().sum((0, 1), dtype=torch.float64)
        smoothed = losses
        if means is not None:
            smoothed = (1 - self.label_smoothing) * losses + self.label_smoothing * means
        loss = smoothed.sum() if reduce else smoothed.sum(-1).reshape(-1)
        logging_output: dict[str, Any] = {
            "loss": loss.data,
            "ntokens": sample["ntokens"],
            "nsentences": target.size(0),
            "sample_size": sample["ntokens"],
        }
        if means is not None:
            logging_output["nll_loss"] = by_component.sum()
        names = component_names(losses.size(-1))
        for name, value in zip(names, by_component, strict=True):
            logging_output[f"{name}_loss"] = value
        penalties: Regularisation = getattr(model.decoder, "penalties", Regularisation())
        if reduce and self.training and (penalties.activation or penalties.change):
            real = target.ne(self.padding_idx)
            loss = loss + self._penalty(penalties, extra["activations"], real, logging_output)
        return loss, sample["ntokens"], logging_output

    def _losses(
        self, head: WordHead, features: Tensor, target: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """Returns the losses (B, T, k) of the targets' components, 0 where there is padding.

        And with label smoothing the means of those losses over the words that share a prefix.
        """
        padding = target.eq(self.padding_idx)[..., None]
        if not self.label_smoothing:
            scores = head.log_probs(features, target)
            return -scores.masked_fill(padding, 0.0), None
        scores, means = head.log_probs_and_means(features, target)
        return -scores.masked_fill(padding, 0.0), -means.masked_fill(padding, 0.0)

    def _penalty(
        self,
        penalties: Regularisation,
        activations: Activations,
        real: Tensor,
        logging_output: dict[str, Any],
    ) -> Tensor | float:
        """Returns the penalties of a batch and logs them.

        They are per word, like the loss, of which fairseq takes the sum and the mean later on.
        """
        steps = activations.raw.size(1) // real.size(1)  # of the network, for each word
        real_steps = real.repeat_interleave(steps, dim=1)
        means = {
            "activation": lambda: mean_square(activations.dropped, real_steps),
            "change": lambda: mean_square_change(activations.raw, real_steps),
        }
        total: Tensor | float = 0.0
        for name, short in PENALTIES.items():
            weight = getattr(penalties, name)
            if weight:
                penalty = weight * real.sum() * means[name]()
                logging_output[f"{short}_penalty"] = penalty.detach()
                total = total + penalty
        return total

    @classmethod
    def reduce_metrics(cls, logging_outputs: list[dict[str, Any]]) -> None:
        """Logs loss and penalties in bits a word, and perplexities per word and per component.

        Perplexities are of the words themselves: label smoothing does not enter them.
        """
        words = sum(log.get("sample_size", 0) for log in logging_outputs)
        keys = dict.fromkeys(key for log in logging_outputs for key in log if key.endswith("loss"))
        for key in keys:
            loss = sum(log.get(key, 0) for log in logging_outputs) / words / math.log(2)
            metrics.log_scalar(key, loss, words, round=4)
            if key == "loss" and "nll_loss" in keys:
                continue
            perplexity = key.removeprefix("nll_").removesuffix("loss") + "ppl"
            metrics.log_derived(perplexity, _perplexity_of(key))
        for key in (f"{name}_penalty" for name in PENALTIES.values()):
            if any(key in log for log in logging_outputs):
                penalty = sum(log.get(key, 0) for log in logging_outputs) / words / math.log(2)
                metrics.log_scalar(key, penalty, words, round=4)

    @staticmethod
    def logging_outputs_can_be_summed() -> bool:
        """Tells fairseq that workers' outputs may be added up."""
        return True


def _perplexity_of(key: str) -> Any:
    return lambda meters: utils.get_perplexity(meters[key].avg)
