"""Tasks: fairseq adapters, registered when fairseq imports this folder's modules."""
