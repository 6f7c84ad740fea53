"""Real gloo processes, 2 and 4: checks.py and failing_ranks.py say what they do."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
TOGETHER, PAIRS = 1, 24  # checks of all four ranks, checks of one pair or the other

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        sys.platform != "linux" or not torch.distributed.is_available(), reason="needs gloo"
    ),
]


def test_processes(tmp_path: Path):
    """One test, since it is one start of the processes: workers that share tests can't split it."""
    command = [sys.executable, "-P", str(HERE / "checks.py"), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(4)]
    failed = [f"rank {i}, {name}:\n{t}" for i, r in enumerate(ranks) for name, t in r.items() if t]
    assert not failed, "\n".join(failed)
    assert ranks[0].keys() == ranks[1].keys()
    assert ranks[2].keys() == ranks[3].keys()
    assert len(ranks[0]) + len(ranks[2]) == 2 * TOGETHER + PAIRS
    for how, message in {"dies": "(closed|reset) by peer", "hangs": "[Tt]imed out"}.items():
        seconds, _, said = (tmp_path / f"{how}.said").read_text().partition(" ")
        assert float(seconds) < 5, how  # the timeout is 2
        assert re.search(message, said), said
