"""Train what was asked for, print the table, draw."""

import argparse
import multiprocessing
import time
from concurrent.futures import ProcessPoolExecutor

from methods import METHODS, train
from rich.console import Console
from showing import Found, draw, table
from task import Run

Job = tuple[str, int, int, str]


def trained(jobs: list[Job], processes: int) -> list[Run]:
    """Run trainings, several at a time where there are several processes."""
    if processes == 1 or len(jobs) == 1:
        return [train(*job) for job in jobs]
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, mp_context=spawn) as pool:
        return list(pool.map(train, *zip(*jobs, strict=True)))


def main() -> None:
    """Train, print the table, draw."""
    parser = argparse.ArgumentParser(description="Compare methods on digits.")
    parser.add_argument("--only", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--quick", action="store_true", help="one seed, few epochs, no judgement")
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--codegen", choices=("inductor", "aot_eager"), default="aot_eager")
    parser.add_argument("--jobs", type=int, default=2, help="trainings at a time, one core each")
    parser.add_argument("--plot", help="file for the picture, .png, .svg or .pdf")
    args = parser.parse_args()
    if args.quick:
        args.epochs, args.seeds, args.jobs = 4, 1, 1
    began, seeds = time.perf_counter(), range(args.seeds)
    jobs = [(name, seed, args.epochs, args.codegen) for name in args.only for seed in seeds]
    runs = trained(jobs, args.jobs)
    found = [
        Found(METHODS[name], runs[i * args.seeds : (i + 1) * args.seeds])
        for i, name in enumerate(args.only)
    ]
    print(f"{len(runs)} trainings in {time.perf_counter() - began:.0f} s")
    console = Console()
    console = Console(width=max(console.width, 180))
    console.print(table(found, judged=args.epochs >= 40))
    if args.epochs < 40:
        print("A short run: accuracy is not judged.")
    if args.plot:
        draw(found, args.plot)


if __name__ == "__main__":
    main()
