"""From a checkpoint to a file that is deployed, and what it is worth."""
