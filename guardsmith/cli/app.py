"""The command line. Data goes to stdout, talk to stderr; each command ends by naming the next one.

Nothing heavy is imported here: every command imports what it needs, so that `--help` and `check` stay quick.
"""

from __future__ import annotations

import errno
import os
import signal
import threading
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from guardsmith import __version__
from guardsmith.cli.audit import audit_release
from guardsmith.cli.harden import harden
from guardsmith.cli.images import cloak, redteam, train_rid
from guardsmith.cli.levels import levels
from guardsmith.cli.plan import plan
from guardsmith.cli.registry import check, registry_app
from guardsmith.cli.release import export, import_file, publish, release_notes, verify_signature
from guardsmith.cli.run import run
from guardsmith.cli.screen import screen
from guardsmith.cli.tables import compare, list_table, print_policy
from guardsmith.cli.verify import verify
from guardsmith.core.console import first_process, launched, print_line, print_schema, unfailing_stderr
from guardsmith.core.errors import GuardsmithError, UserError, out_of_memory, system_errno

app = typer.Typer(
    name="guardsmith",
    help=(
        "Harden a Stable Diffusion checkpoint against personalization on protected subjects, attack the result, and let "
        "the release depend on what was measured."
    ),
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.add_typer(registry_app, name="registry")
report_app = typer.Typer(help="The format of report.json.", no_args_is_help=True)
app.add_typer(report_app, name="report")


@report_app.callback()
def _report() -> None:
    pass


NO_MEMORY = (
    "out of memory: close other programs, or choose a smaller batch, compute.gradient_checkpointing or another "
    "compute.optimizer; what was saved is kept, and --resume goes on from it"
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line (by default with sys.argv) and return the exit code.

    0 done, 1 gate failed, 2 wrong usage or input, 3 inconclusive, 4 run failed, 130 interrupted.
    """
    for library in (
        "DIFFUSERS",
        "TRANSFORMERS",
    ):  # what they warn of when they are imported is not for who runs a command
        os.environ.setdefault(f"{library}_VERBOSITY", "error")
    with unfailing_stderr(), _sigterm_as_ctrl_c():
        return _main(arguments)


@contextmanager
def _sigterm_as_ctrl_c() -> Iterator[None]:
    """Inside, SIGTERM interrupts as Ctrl-C does: `docker stop`, Kubernetes and batch systems send it.

    Without a handler, the first process of a container ignores it. A launcher's processes keep the system's: they may wait for
    each other in native code, where a handler of Python's is not called, and the launcher would wait for them.
    """
    ours = (
        launched() == 1
        and threading.current_thread() is threading.main_thread()
        and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    )
    if ours:
        signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        if ours:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _main(arguments: Sequence[str] | None) -> int:
    try:
        code = app(args=arguments, prog_name="guardsmith", standalone_mode=False)
        if code == 130:  # Typer's answer to Ctrl-C
            return _fail("interrupted", 130)
        return code if isinstance(code, int) else 0
    except GuardsmithError as error:
        return _fail(str(error), error.exit_code, error)
    except KeyboardInterrupt:
        return _fail("interrupted", 130)
    except typer.Abort:
        return _fail("aborted", 130)
    except SystemExit as stop:
        # A command's verdict is a `typer.Exit`, which arrives above as a code. Here the reader of stdout went away.
        return 4 if stop.code == 1 else int(stop.code or 0)
    except Exception as error:
        if out_of_memory(error):
            return _fail(NO_MEMORY, 4, error)
        if hasattr(error, "format_message"):  # wrong usage; Typer's exception class is not public in every version
            return _usage(error)
        number = system_errno(error)
        if number == errno.ENOSPC:
            return _fail(f"no space left on the disk{_of(error)}: free some space and run again", 4, error)
        if number in (errno.EACCES, errno.EPERM, errno.EROFS):
            return _fail(f"no permission to write or read{_of(error)}: choose another place", 2, error)
        return _bug(error)


def _of(error: Exception) -> str:
    name = getattr(error, "filename", None)
    return f" ({name})" if name else ""


def _usage(error: Any) -> int:
    context = getattr(error, "ctx", None)
    message = error.format_message()
    if not context:
        return _fail(message, 2)
    if message == context.get_help():  # no command at all
        print_line(message)
        return 2
    return _fail(f"{message.rstrip('.')}: see `{context.command_path} --help`", 2)


def _bug(error: Exception) -> int:
    reason = str(error).strip().split("\n")[0]
    sentence = f"{type(error).__name__}: {reason}: this is a bug in guardsmith, please report it"
    return _fail(f"{sentence} with what GUARDSMITH_DEBUG=1 prints", 4, error)


def _fail(sentence: str, code: int, error: BaseException | None = None) -> int:
    if error is not None and os.environ.get("GUARDSMITH_DEBUG") == "1":
        traceback.print_exception(error)
    if first_process() or not isinstance(error, UserError):  # a user's mistake is every process's
        print_line(sentence, style="red")
    return code


def _print_version(requested: bool) -> None:
    if requested:
        typer.echo(f"guardsmith {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
    progress: Annotated[
        str,
        typer.Option(help="Progress on stderr: auto (bars on a terminal, lines elsewhere), lines, or json."),
    ] = "auto",
    device: Annotated[
        str | None,
        typer.Option(
            help="Device for the networks: cpu, cuda, cuda:1, mps, xpu.  [default: an accelerator if there is one]"
        ),
    ] = None,
    deterministic: Annotated[
        bool,
        typer.Option("--deterministic", help="Bit-identical results on any number of cores: one thread, slower."),
    ] = False,
) -> None:
    from guardsmith.core.progress import STYLES, show_as

    if progress not in STYLES:
        raise UserError(f"--progress {progress}: choose {', '.join(STYLES)}")
    show_as(progress)
    if launched() > 1 and context.invoked_subcommand != "harden":
        raise UserError(
            f"several processes can harden together; run guardsmith {context.invoked_subcommand} without a launcher"
        )
    if device is not None:
        # Processes inherit it. It is guardsmith.runtime.device.VARIABLE, spelt out because torch takes long to import.
        os.environ["GUARDSMITH_DEVICE"] = device
    if deterministic:
        os.environ["GUARDSMITH_DETERMINISTIC"] = "1"


@report_app.command("schema")
def report_schema(
    output: Annotated[Path | None, typer.Option(help="File to write; by default stdout.")] = None,
) -> None:
    """Print the JSON schema of report.json."""
    from guardsmith.reports.report import json_schema

    print_schema(json_schema(), output)


app.command(no_args_is_help=True)(harden)
app.command()(verify)
app.command(no_args_is_help=True)(run)
app.command(no_args_is_help=True)(plan)
app.command()(check)
app.command()(compare)
app.command()(levels)
app.command("policy")(print_policy)
app.command("list")(list_table)
app.command()(cloak)
app.command()(redteam)
app.command("train-rid")(train_rid)
app.command()(screen)
app.command()(publish)
app.command("verify-signature")(verify_signature)
app.command("audit-release")(audit_release)
app.command()(export)
app.command("import")(import_file)
app.command("release-notes")(release_notes)
