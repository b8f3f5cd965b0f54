"""Criterions: fairseq adapters, registered when a module of this folder is imported."""
