"""The core: words, their tables and vectors, and what predicts them; it knows no fairseq."""
