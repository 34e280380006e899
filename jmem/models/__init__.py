"""Architectures that are nobody's paper here: `decoder`, and `zoo` with their sizes."""
