"""Fuzzing: `targets` are what is fuzzed, `run` fuzzes. pytest collects nothing here."""
