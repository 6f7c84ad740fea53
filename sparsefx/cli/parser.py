"""The words of the command line, with help and examples for each command."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any, NoReturn

from sparsefx.cli import bench, doctor, explain, export
from sparsefx.cli.results import Result, UsageError
from sparsefx.config import PRESETS

_INPUTS = """
A model is MODULE:NAME or FILE.py:NAME: a torch.nn.Module, or a class or function that returns one
when it is called without arguments. Modules are looked for in this folder, too.

An input is [NAME=]DTYPE[SIZES][:LOW..HIGH], one --input for each argument of the model:
  float32[4,16]                  from a normal distribution
  float32[4,16]:0..1             uniform between 0 and 1
  int64[2,32]:0..255             whole numbers, both ends included (0..1 if no range is given)
  bool[2,32]                     true or false
  input_ids=int64[2,32]:0..255   passed by its name
"""

_TOP = """
commands explain themselves: sparsefx explain --help

exit codes: 0; 1 after a failure (doctor: the backend can't compile); 2 for a command that makes no
sense
"""

_DOCTOR = """
examples:
  sparsefx doctor            compiles and trains a small layer with Inductor, takes seconds
  sparsefx doctor --quick    trains it operator by operator: no C++ is built
  sparsefx doctor --json
"""

_EXPLAIN = f"""{_INPUTS}
examples:
  sparsefx explain net.py:build --input float32[32,784]
  sparsefx explain my.models:Net --input float32[8,3,32,32] --config adelman-cnn --why "layer1.*"
  sparsefx explain net.py:gpt --input input_ids=int64[2,32]:0..255 --config mlp-2-4.yaml --times
  sparsefx explain net.py:build --input float32[32,784] --inference --json
"""

_BENCH = f"""{_INPUTS}
Dense and sparse are both compiled and run in turns in one process. What is faster follows from the
machine and the sizes; products whose masked weights are multiplied in full save nothing.

examples:
  sparsefx bench net.py:build --input float32[256,1024] --config 4:8-transposable
  sparsefx bench net.py:build --input float32[256,1024] --config my.yaml --inference --rounds 50
"""

_EXPORT = f"""{_INPUTS}
examples:
  sparsefx export net.py:build net.onnx --input float32[1,784] --config 2:4
  sparsefx export net.py:build net.onnx --input float32[1,784] --config my.json --weights packed
"""


class Parser(argparse.ArgumentParser):
    """Raises what it refuses, so that one place prints errors."""

    def error(self, message: str) -> NoReturn:
        """Refuse a command line."""
        raise UsageError(f"{message}; see {self.prog} --help")


def build_parser() -> Parser:
    """Return the parser of all commands; each sets ``command`` to the function that runs it."""
    parser = _parser_of(Parser, "sparsefx", _TOP)
    _add_common(parser, False)
    commands = parser.add_subparsers(metavar="command", required=True, parser_class=Parser)

    def add(name: str, run: Callable[[argparse.Namespace], Result], says: str, more: str) -> Parser:
        command = _parser_of(commands.add_parser, name, more, says)
        command.set_defaults(command=run)
        _add_common(command, argparse.SUPPRESS)
        return command

    _doctor(add("doctor", doctor.run, "say what works here, and what to do", _DOCTOR))
    _explain(add("explain", explain.run, "say what becomes of a model's products", _EXPLAIN))
    _bench(add("bench", bench.run, "time a model dense and sparse, both compiled", _BENCH))
    _export(add("export", export.run, "write a model with its zeros as ONNX", _EXPORT))
    return parser


def _parser_of(make: Callable[..., Parser], name: str, more: str, says: str = "") -> Parser:
    about = says or 'A sparse compiler for PyTorch: torch.compile(model, backend="sparsefx").'
    more_of = {"prog": name} if make is Parser else {"help": says}
    return make(
        *([] if make is Parser else [name]),
        description=about,
        epilog=more.strip("\n"),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        **more_of,
    )


def _add_common(parser: Parser, default: Any) -> None:
    """Add options that may stand before the command and behind it."""
    flags = {"--json": "print one JSON object", "--debug": "show the traceback of an error"}
    for flag, says in flags.items():
        parser.add_argument(flag, action="store_true", default=default, help=says)


# --- what each command takes


def _doctor(parser: Parser) -> None:
    parser.add_argument("--quick", action="store_true", help="build nothing, import no extra")


def _add_model(parser: Parser) -> None:
    parser.add_argument("model", help="MODULE:NAME or FILE.py:NAME")


def _add_inputs(parser: Parser) -> None:
    parser.add_argument(
        "--input", action="append", default=[], metavar="SPEC", help="one input; see below"
    )
    parser.add_argument(
        "--config",
        metavar="NAME",
        help=f"a file (.yaml, .yml, .json) or a preset: {', '.join(PRESETS)}",
    )
    parser.add_argument("--seed", type=int, default=0, help="of weights and inputs (0)")


def _add_mode(parser: Parser) -> None:
    parser.add_argument("--device", default="cpu", help="where the model runs (cpu)")
    parser.add_argument(
        "--inference", action="store_true", help="eval mode, no gradients; else a training step"
    )


def _explain(parser: Parser) -> None:
    _add_model(parser)
    _add_inputs(parser)
    _add_mode(parser)
    parser.add_argument("--times", action="store_true", help="add the times that are expected")
    parser.add_argument("--why", metavar="GLOB", help="one line for each product of these layers")


def _bench(parser: Parser) -> None:
    _add_model(parser)
    _add_inputs(parser)
    _add_mode(parser)
    parser.add_argument("--rounds", type=int, default=20, help="timed runs of each (20)")
    parser.add_argument("--warmup", type=int, default=3, help="runs of each before that (3)")


def _export(parser: Parser) -> None:
    _add_model(parser)
    parser.add_argument("file", help="the ONNX file to write")
    _add_inputs(parser)
    parser.add_argument("--weights", default="auto", help="auto, dense, packed or coo (auto)")
    parser.add_argument("--sampled", default="sampled", help="sampled or exact (sampled)")
    parser.add_argument("--no-verify", action="store_true", help="don't run it in onnxruntime")
    parser.add_argument("--force", action="store_true", help="coo weights even where larger")
