"""Export, int8 quantisation, inference and benchmark of models."""
