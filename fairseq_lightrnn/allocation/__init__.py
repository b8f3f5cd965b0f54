"""Allocation: which word has which cell of the table, before training and between rounds of it."""
