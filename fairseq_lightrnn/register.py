"""Importing this module registers the plugin's models, criterions and tasks with fairseq."""

from fairseq_lightrnn.criterions import two_component_cross_entropy
from fairseq_lightrnn.models import lightrnn_lm, lightrnn_transformer, lightrnn_translation
from fairseq_lightrnn.tasks import lightrnn_language_modeling
from fairseq_lightrnn.tasks import lightrnn_translation as lightrnn_translation_task

__all__ = [
    "lightrnn_language_modeling",
    "lightrnn_lm",
    "lightrnn_transformer",
    "lightrnn_translation",
    "lightrnn_translation_task",
    "two_component_cross_entropy",
]
