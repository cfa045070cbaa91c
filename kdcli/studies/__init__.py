"""Many runs of the engine and what they show together."""
