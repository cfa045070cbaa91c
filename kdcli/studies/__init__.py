"""Studies of several runs: comparison, search, reproduction."""
