"""LightRNN for fairseq: language models whose vocabulary is a table of rows and columns.

``--user-dir fairseq_lightrnn`` registers the models, criterions and tasks. Importing the package
alone does not import fairseq, so that the core modules can be used without it.
"""

from fairseq_lightrnn.version import __version__

__all__ = ["__version__"]
