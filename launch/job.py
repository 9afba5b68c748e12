"""What is to be run, wherever it runs."""

import dataclasses
import re

from launch.cli import find_verb
from t5pegasus.errors import UsageError

_NAME = re.compile(r"[a-z]([-a-z0-9]{0,38}[a-z0-9])?")


@dataclasses.dataclass(frozen=True)
class JobSpec:
    """One verb with its arguments, and the name of what is made to run it.

    Raises:
        UsageError: there is no such verb, it launches itself, or the name cannot name cloud resources.
    """

    command: tuple[str, ...]
    """The verb and its arguments, as they follow `t5pegasus`."""
    name: str = "t5pegasus"
    """A letter, then letters, digits and hyphens, at most 40: it becomes part of host names."""

    def __post_init__(self) -> None:
        if not self.command:
            raise UsageError("nothing to launch; write the verb and its arguments after `--`")
        find_verb(self.command[0])
        if self.command[0] == "launch":
            raise UsageError("`launch` cannot launch itself; write another verb after `--`")
        if not _NAME.fullmatch(self.name):
            raise UsageError(
                f"name={self.name!r} must be 1 to 40 lower-case letters, digits and hyphens, "
                "start with a letter and not end with a hyphen"
            )

    def require_parallel(self, num_processes: int) -> None:
        """Refuse a verb that several processes would run side by side instead of together.

        Raises:
            UsageError: `num_processes` is more than 1 and the verb works in one process.
        """
        if num_processes > 1 and not find_verb(self.command[0]).parallel:
            raise UsageError(f"{self.command[0]!r} works in one process, got processes={num_processes}")
