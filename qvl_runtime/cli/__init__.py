"""The command `qvl`: one file a subcommand. Nothing else in the package imports it."""

from __future__ import annotations


def main() -> None:
    """Run the command line: the entry point of `qvl`."""
    from qvl_runtime.cli.app import main as run

    run()
