"""Sparse weights: how they come about, how they are packed, and how they multiply."""
