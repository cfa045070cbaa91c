"""Settings of `kd compare`, beside those of `kd train` that its runs share, and of `kd reproduce`."""

from pathlib import Path

from pydantic import field_validator

from kdcli.base.config.settings import RUN, FolderName, Settings, setting

COMPARE = "Comparison"
MOST_SEEDS = 1000


class CompareConfig(Settings):
    """`kd compare`, beside `TrainSettings`."""

    methods: str = setting("ce,kd", "Methods to compare, joined by commas.", COMPARE, metavar="NAME,NAME,…")
    seeds: str = setting(
        "5",
        "Number of seeds of each method, from 0 on; or a list, as in 3,7,11 (7, is the one seed 7).",
        COMPARE,
        metavar="N|S,S,…",
    )
    baseline: str = setting(
        "",
        "Method that the others are compared with; by default ce, else the first.",
        COMPARE,
        metavar="NAME",
    )
    name: FolderName = setting("", "Name of the comparison; by default its methods, student and data.", RUN)
    out: Path = setting(Path("comparisons"), "Comparisons are written here.", RUN)
    csv: Path | None = setting(None, "Write all figures as CSV.", "Output")
    markdown: Path | None = setting(None, "Write the table as Markdown.", "Output")

    @field_validator("methods")
    @classmethod
    def _methods_are_named_once(cls, value: str) -> str:
        names = [name.strip() for name in value.split(",")]
        if not all(names) or len(set(names)) < len(names):
            raise ValueError("must be names of methods, each once, joined by commas")
        return ",".join(names)

    @field_validator("seeds", mode="before")
    @classmethod
    def _seeds_are_a_count_or_a_list(cls, value: object) -> str:
        words = [word.strip() for word in str(value).split(",")]
        listed = words[:-1] if len(words) > 1 and not words[-1] else words
        if not all(word.isascii() and word.isdecimal() and int(word) < 2**63 for word in listed):
            raise ValueError("must be a number of seeds, or seeds joined by commas")
        if len(words) == 1 and not 1 <= int(listed[0]) <= MOST_SEEDS:
            raise ValueError(f"must be a number from 1 to {MOST_SEEDS}, or seeds joined by commas")
        if len(set(map(int, listed))) < len(listed) or len(listed) > MOST_SEEDS:
            raise ValueError(f"must be seeds that differ, at most {MOST_SEEDS}")
        return ",".join(str(int(word)) if word else "" for word in words)

    @property
    def method_names(self) -> tuple[str, ...]:
        """In the order given."""
        return tuple(self.methods.split(","))

    @property
    def seed_numbers(self) -> tuple[int, ...]:
        """`5` is 0 … 4, `3,7,11` are these."""
        words = self.seeds.split(",")
        if len(words) == 1:
            return tuple(range(int(words[0])))
        return tuple(int(word) for word in words if word)


class ReproduceConfig(Settings):
    """`kd reproduce`."""

    method: str = setting(
        "",
        "The run's method again, if it is code of your own: kd runs no code that only a file names.",
        "Check",
        metavar="MODULE:FUNCTION",
    )
    tolerance: float = setting(
        0.5, "Points of test accuracy by which the two may differ if their bits do.", "Check", ge=0, le=100
    )
