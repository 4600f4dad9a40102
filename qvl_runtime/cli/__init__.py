"""The `qvl` command line, one file per subcommand. Library code never imports this package."""

from __future__ import annotations


def main() -> None:
    """Run the command line: the entry point of `qvl`."""
    from qvl_runtime.cli.app import main as run

    run()
