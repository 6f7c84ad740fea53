"""Train what was asked for, print the table, draw."""

import argparse
import time

import torch
from methods import METHODS
from rich.console import Console
from showing import Found, draw, table
from task import Task


def main() -> None:
    """Train, print the table, draw."""
    parser = argparse.ArgumentParser(description="Compare methods on digits.")
    parser.add_argument("--only", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--quick", action="store_true", help="one seed, few epochs, no judgement")
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--codegen", choices=("inductor", "aot_eager"), default="aot_eager")
    parser.add_argument("--plot", help="file for the picture, .png, .svg or .pdf")
    args = parser.parse_args()
    if args.quick:
        args.epochs, args.seeds = 4, 1
    torch.set_num_threads(1)
    found = []
    for name in args.only:
        began = time.perf_counter()
        method = METHODS[name]
        runs = [method.train(Task(seed, args.epochs, args.codegen)) for seed in range(args.seeds)]
        found.append(Found(method, runs))
        print(f"{method.title}: {time.perf_counter() - began:.0f} s", flush=True)
    console = Console()
    console = Console(width=max(console.width, 160))
    console.print(table(found, judged=args.epochs >= 40))
    if args.epochs < 40:
        print("A short run: accuracy is not judged.")
    if args.plot:
        draw(found, args.plot)


if __name__ == "__main__":
    main()
