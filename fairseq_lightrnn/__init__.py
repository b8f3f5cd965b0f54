"""LightRNN for fairseq: models whose vocabulary is a table of rows and columns.

fairseq's ``--user-dir fairseq_lightrnn`` imports this package, which registers the models,
criterions and tasks. The core modules need no fairseq: where it is not in use, nothing is
registered and nothing of it imported. A program that imports the core first and fairseq's commands
later imports :mod:`fairseq_lightrnn.register` itself.
"""

import sys

from fairseq_lightrnn.version import __version__

__all__ = ["__version__"]

if "fairseq" in sys.modules:
    from fairseq_lightrnn import register  # noqa: F401
