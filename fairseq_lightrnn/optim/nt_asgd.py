"""``--optimizer nt_asgd``: SGD that averages once validation stops getting better."""

import logging
from dataclasses import dataclass, field
from typing import Any

from fairseq.dataclass import FairseqDataclass
from fairseq.optim import FairseqOptimizer, register_optimizer
from omegaconf import II

from fairseq_lightrnn.errors import UsageError
from fairseq_lightrnn.optim.averaged_sgd import AveragedSGD, is_nonmonotone

__all__ = ["NonmonotoneASGD", "NonmonotoneASGDConfig"]

logger = logging.getLogger(__name__)


@dataclass
class NonmonotoneASGDConfig(FairseqDataclass):
    nonmonotone_interval: int = field(
        default=5,
        metadata={
            "help": "average the parameters from the validation on whose loss is above the best "
            "of those more than this many validations before; training itself goes on from the "
            "last parameters, validation and checkpoints have the averages. A LightRNN task is "
            "needed, which tells the losses"
        },
    )
    momentum: float = field(default=0.0, metadata={"help": "momentum factor"})
    weight_decay: float = field(default=0.0, metadata={"help": "weight decay"})
    lr: list[float] = II("optimization.lr")
    fp16: bool = II("common.fp16")
    bf16: bool = II("common.bf16")
    amp: bool = II("common.amp")
    disable_validation: bool = II("dataset.disable_validation")


@register_optimizer("nt_asgd", dataclass=NonmonotoneASGDConfig)
class NonmonotoneASGD(FairseqOptimizer):
    """Non-monotonically triggered averaged SGD (arXiv 1708.02182, algorithm 1).

    Args:
        cfg: the flags.
        params: the parameters.

    Attributes:
        validation_losses: the losses of all validations so far.
    """

    def __init__(self, cfg: NonmonotoneASGDConfig, params: Any) -> None:
        super().__init__(cfg)
        _check(cfg)
        self._optimizer = AveragedSGD(params, **self.optimizer_config)
        self.validation_losses: list[float] = []

    @property
    def optimizer_config(self) -> dict[str, Any]:
        """The options of the optimiser beneath."""
        return {
            "lr": self.cfg.lr[0],
            "momentum": self.cfg.momentum,
            "weight_decay": self.cfg.weight_decay,
        }

    def validated(self, loss: float, num_updates: int) -> None:
        """Takes note of a validation, which may begin the averaging.

        Args:
            loss: the validation loss.
            num_updates: of training so far, for the log.
        """
        self.validation_losses.append(loss)
        interval = self.cfg.nonmonotone_interval
        if not self._optimizer.averaging and is_nonmonotone(self.validation_losses, interval):
            logger.info(
                f"validation loss {loss:.4f} is above the best of more than {interval} "
                f"validations ago: averaging the parameters from update {num_updates} on"
            )
            self._optimizer.start_averaging()

    def state_dict(self) -> dict[str, Any]:
        """Returns the optimiser's state, the validation losses included."""
        state: dict[str, Any] = super().state_dict()
        return {**state, "validation_losses": list(self.validation_losses)}

    def load_state_dict(
        self, state_dict: dict[str, Any], optimizer_overrides: dict[str, Any] | None = None
    ) -> None:
        """Loads a state, after the parameters that were saved with it."""
        state = dict(state_dict)
        self.validation_losses = list(state.pop("validation_losses"))
        super().load_state_dict(state, optimizer_overrides)


def _check(cfg: NonmonotoneASGDConfig) -> None:
    if cfg.nonmonotone_interval < 0:
        raise UsageError(f"--nonmonotone-interval {cfg.nonmonotone_interval}: must not be negative")
    if not 0 <= cfg.momentum < 1:
        raise UsageError(f"--momentum {cfg.momentum}: must be at least 0 and below 1")
    if not 0 <= cfg.weight_decay < float("inf"):
        raise UsageError(f"--weight-decay {cfg.weight_decay}: must be a number of at least 0")
    for name in ("fp16", "bf16", "amp"):
        if getattr(cfg, name):
            raise UsageError(
                f"--{name}: --optimizer nt_asgd averages parameters in full precision; leave one "
                "of the flags out"
            )
    if cfg.disable_validation:
        raise UsageError(
            "--disable-validation: --optimizer nt_asgd waits for validation losses; leave one of "
            "the flags out, or use --optimizer sgd"
        )
