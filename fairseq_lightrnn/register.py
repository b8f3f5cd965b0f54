"""Importing this module registers models, criterions, optimisers and tasks with fairseq."""

from fairseq_lightrnn import errors
from fairseq_lightrnn.criterions import two_component_cross_entropy
from fairseq_lightrnn.models import lightrnn_lm, lightrnn_transformer, lightrnn_translation
from fairseq_lightrnn.optim import nt_asgd
from fairseq_lightrnn.tasks import lightrnn_language_modeling
from fairseq_lightrnn.tasks import lightrnn_translation as lightrnn_translation_task

__all__ = [
    "lightrnn_language_modeling",
    "lightrnn_lm",
    "lightrnn_transformer",
    "lightrnn_translation",
    "lightrnn_translation_task",
    "nt_asgd",
    "two_component_cross_entropy",
]

errors.show_worker_errors()
