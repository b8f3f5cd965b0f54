"""Writes trained language models as folders that run without fairseq."""
