"""Importing this module registers models, criterions, optimisers and tasks with fairseq."""

from fairseq_lightrnn.criterions import two_component_cross_entropy
from fairseq_lightrnn.models import lightrnn_lm
from fairseq_lightrnn.optim import nt_asgd
from fairseq_lightrnn.tasks import lightrnn_language_modeling

__all__ = ["lightrnn_language_modeling", "lightrnn_lm", "nt_asgd", "two_component_cross_entropy"]
