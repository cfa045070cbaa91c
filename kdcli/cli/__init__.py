"""The command line: parse → settings → one call → render."""

from kdcli.cli.app import COMMANDS, main
