"""Hyperparameter search over kd train's settings with Optuna, in a study that several processes can share.

No imports here: ranges are read, and mistakes in them reported, before torch and Optuna are loaded.
"""
