"""One error class per exit code. Each carries one sentence: what is wrong and what to do."""


class GuardsmithError(Exception):
    """Base of the errors that the command line prints without a traceback."""

    exit_code = 4


class UserError(GuardsmithError):
    """Wrong usage, registry, recipe or input file (exit code 2)."""

    exit_code = 2


class RunFailed(GuardsmithError):
    """The input was fine and the run still failed: memory, disk, a diverged training (exit code 4)."""

    exit_code = 4
