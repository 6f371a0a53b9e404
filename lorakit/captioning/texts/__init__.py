"""Captions that are written already: read, counted, compared and changed in bulk. One file for each of these."""
