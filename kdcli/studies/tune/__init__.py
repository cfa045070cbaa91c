"""Search for good settings: trials of kd train, recorded in a study that any number of processes work on.

`search.tune` does it, `space.read_space` reads what is searched. Nothing is imported here: ranges are
read, and mistakes in them told, before torch and Optuna are loaded.
"""
