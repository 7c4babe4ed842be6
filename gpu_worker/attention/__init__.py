"""Attention over a paged key/value cache: one small interface, one file per backend."""
