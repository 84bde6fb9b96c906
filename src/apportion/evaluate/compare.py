"""`apportion compare`: a report of any runs."""

from dataclasses import dataclass, field

from apportion.evaluate.report import compare
from apportion.train.run import check_place


@dataclass(frozen=True, kw_only=True)
class Compare:
    """What `apportion compare` needs to know.

    Attributes:
        runs: Run folders; runs that differ only in their seed are one method, the first method is the baseline.
        output: Folder of the report.

    Raises:
        ValueError: If no run is given.
    """

    runs: list[str] = field(default_factory=list)
    output: str = "report"

    def __post_init__(self) -> None:
        """Refuse to compare nothing."""
        if not self.runs:
            raise ValueError("no run is given; name run folders: apportion compare RUN...")


def compare_runs(settings: Compare) -> None:
    """Make the report and say where it lies.

    Raises:
        FileNotFoundError: If a folder is no run.
        ValueError: If the runs cannot be compared, or the folder of the report cannot be written.
    """
    check_place(settings.output)
    print(f"report: {compare(settings.runs, settings.output)}")
