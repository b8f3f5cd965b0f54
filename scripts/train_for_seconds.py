"""``fairseq-train`` for so long: its ``--stop-time-hours``, and a learning rate that falls in them.

    python scripts/train_for_seconds.py cpu|clock FLAGS_OF_FAIRSEQ_TRAIN

Time is the processor's or the clock's, of earlier processes of the training too. With
``--lr-scheduler polynomial_decay`` the learning rate falls as this time passes, whatever its
``--total-num-update``, and has fallen to the end when the time is over.
"""

from __future__ import annotations

import argparse
import sys
import time

from fairseq.logging import metrics
from fairseq.optim.lr_scheduler.polynomial_decay_schedule import PolynomialDecayLRSchedule
from fairseq.trainer import Trainer
from fairseq_cli.train import cli_main


def processor_time(trainer: Trainer) -> float:
    """Returns the seconds that the processor has worked for a training."""
    earlier: float = trainer._previous_training_time
    return time.process_time() + earlier


def step_by_time(trainer: Trainer) -> float:
    """Sets the learning rate after an update, and returns it."""
    schedule, updates = trainer.lr_scheduler, trainer.get_num_updates()
    if isinstance(schedule, PolynomialDecayLRSchedule):
        warmup = schedule.cfg.warmup_updates
        if updates > warmup:
            limit = 3600 * trainer.cfg.optimization.stop_time_hours
            passed = trainer.cumulative_training_time() / limit
            updates = warmup + passed * (schedule.total_num_update - warmup)
    rate: float = schedule.step_update(updates)
    metrics.log_scalar("lr", rate, weight=0, priority=300)
    return rate


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("time", choices=("cpu", "clock"))
    parser.add_argument("--stop-time-hours", type=float, default=0, help="and all other flags of "
        "fairseq-train")  # fmt: skip
    args, _ = parser.parse_known_args()
    if args.stop_time_hours <= 0:
        parser.error("fairseq-train's --stop-time-hours must say for how long")
    sys.argv.remove(args.time)
    if args.time == "cpu":
        Trainer.cumulative_training_time = processor_time
    Trainer.lr_step_update = step_by_time
    cli_main()


if __name__ == "__main__":
    main()
