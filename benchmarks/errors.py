"""How long a bad input takes to be answered, beside `python -c "import hydra"`: 3 times at most is the aim.

    python -m benchmarks.errors [--repeats 7]

The two run in turn, so that a busy machine slows both. The ratio is taken within each pair; its median is printed, the
exit code is 1 above the limit.
"""

import argparse
import statistics
import subprocess
import sys
import time
from pathlib import Path

LIMIT = 3.0
MAIN = str(Path(__file__).resolve().parents[1] / "main.py")
BASELINE = ["-c", "import hydra"]
BAD_INPUTS = [
    ["pruning.pruning_ratoi=[0.5]"],
    ["model=vgg19"],
    ["training.epochs=ten"],
    ["pruning.pruning_ratio=[0.5"],
    ["selected_classes=[3,33]"],
    ["dataset=fashion_mnist", "selected_classes=[trowser]"],
    ["pruning.activation_func=foo"],
    ["dataset=cifar10", "dataset.root=no/such/folder"],
    ["pruning.scores_path=no/such/file"],
    ["-m", "model=resnet18,vgg16", "seed=1,2,-3"],
]


def seconds(arguments: list[str], exit_code: int) -> float:
    """Wall-clock seconds of a Python process that must end with `exit_code`."""
    start = time.perf_counter()
    process = subprocess.run([sys.executable, *arguments], capture_output=True)
    took = time.perf_counter() - start
    if process.returncode != exit_code:
        raise SystemExit(f"{arguments}: exit code {process.returncode} instead of {exit_code}")
    return took


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=7)
    repeats = parser.parse_args().repeats
    print(f"ratio  seconds  bad input (medians of {repeats} paired runs)")
    worst = 0.0
    for arguments in BAD_INPUTS:
        pairs = [(seconds([MAIN, *arguments], 1), seconds(BASELINE, 0)) for _ in range(repeats)]
        ratio = statistics.median(took / baseline for took, baseline in pairs)
        print(f"{ratio:5.2f}  {statistics.median(took for took, _ in pairs):7.3f}  {' '.join(arguments)}")
        worst = max(worst, ratio)
    print(f"worst {worst:.2f}, limit {LIMIT}")
    return int(worst > LIMIT)


if __name__ == "__main__":
    sys.exit(main())
