"""The command line: one module a group of commands. Data goes to stdout, messages to stderr.

Nothing is computed here; every command calls one function of another package.
"""

from guardsmith.cli.app import main

__all__ = ["main"]
