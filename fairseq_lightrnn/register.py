"""Importing this module registers the plugin's models, criterions and tasks with fairseq."""

from fairseq_lightrnn.criterions import two_component_cross_entropy
from fairseq_lightrnn.models import lightrnn_lm
from fairseq_lightrnn.tasks import lightrnn_language_modeling

__all__ = ["lightrnn_language_modeling", "lightrnn_lm", "two_component_cross_entropy"]
