"""Optimisers: their mathematics, and fairseq adapters that register.py imports."""
