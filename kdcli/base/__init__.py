"""Shared ground: errors, events, files, text, settings, runtime; independent of models and data sets."""
