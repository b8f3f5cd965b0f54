"""Allocation: which word has which cell of the table, before training and between rounds of it."""

from fairseq_lightrnn.allocation.balanced_assignment import BalancedAssignment, balanced_assignment
from fairseq_lightrnn.allocation.cooccurrence import CoOccurrence
from fairseq_lightrnn.allocation.costs import DenseCosts, LowRankCosts
from fairseq_lightrnn.allocation.initial_table import INITIAL_TABLES, initial_table
from fairseq_lightrnn.allocation.joint_assignment import JointAssignment, joint_assignment
from fairseq_lightrnn.allocation.reallocation import OBJECTIVES, Reallocation, reallocate
from fairseq_lightrnn.allocation.statistics import AllocationStatistics

__all__ = [
    "INITIAL_TABLES",
    "OBJECTIVES",
    "AllocationStatistics",
    "BalancedAssignment",
    "CoOccurrence",
    "DenseCosts",
    "JointAssignment",
    "LowRankCosts",
    "Reallocation",
    "balanced_assignment",
    "initial_table",
    "joint_assignment",
    "reallocate",
]
