"""``main``: parse, run one command, print its result or one line about what went wrong."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import traceback
from collections.abc import Sequence

from sparsefx.cli.parser import build_parser
from sparsefx.cli.results import Result, UsageError
from sparsefx.errors import ConfigError, SparsefxError


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line.

    Args:
        argv: the words behind the program's name; None takes those of this process.

    Returns:
        The exit code: 0; 1 where the command failed, or where ``doctor`` finds that the backend
        can't compile; 2 where what was typed, or the config, makes no sense; 130 after an
        interrupt.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    as_json, debug = "--json" in words, "--debug" in words
    try:
        options = build_parser().parse_args(words)
        result = _run(options)
        _show(result, as_json)
        return result.code
    except BrokenPipeError:  # whoever read our output went away, such as `head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        print("sparsefx: error: interrupted", file=sys.stderr)
        return 130
    except Exception as error:  # models and their factories raise anything: one line, code 1
        if debug:
            traceback.print_exc()
        return _failed(error, as_json, debug)


def _run(options: argparse.Namespace) -> Result:
    """Run the command; under ``--json`` what models print goes to stderr."""
    if not options.json:
        return _called(options)
    with contextlib.redirect_stdout(sys.stderr):
        return _called(options)


def _called(options: argparse.Namespace) -> Result:
    result = options.command(options)
    assert isinstance(result, Result), result
    return result


def _show(result: Result, as_json: bool) -> None:
    print(json.dumps(result.data, indent=2, default=str) if as_json else result.text)
    sys.stdout.flush()


def _failed(error: Exception, as_json: bool, debug: bool) -> int:
    """Print one line on stderr, and an object on stdout where one was asked for."""
    message = _line(error)
    hint = "" if debug or isinstance(error, SparsefxError) else " (--debug shows where)"
    print(f"sparsefx: error: {message}{hint}", file=sys.stderr)
    if as_json:
        print(json.dumps({"error": {"kind": type(error).__name__, "message": message}}, indent=2))
    return 2 if isinstance(error, UsageError | ConfigError) else 1


def _line(error: Exception) -> str:
    """One line about an error: of torch's long ones, what stands first."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if isinstance(error, SparsefxError):
        return " ".join(lines)
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
