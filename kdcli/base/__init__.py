"""Shared ground: errors, events, files, text, settings, runtime. Nothing here knows of models or data sets."""
