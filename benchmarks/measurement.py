"""What the measurements of a record cost beside the bare passes that they contain.

    python -m benchmarks.measurement [--models resnet18 vgg16] [--images 256] [--batch 64] [--repeats 7] [--threads N]

accuracy: `accuracy.evaluate` over all images, beside the forward passes alone. latency: 20 pairs of
`latency.time_in_pairs`, beside the passes that it times and those that precede them, in a plain loop. These two are
held to limits. The others contain no pass to be held against; their seconds are given as a multiple of one pass of a
batch: counting MACs, activations and bytes; the memory of a pass, its process already there; making an ONNX file and
comparing it.

Each is run in turn with its bare passes, the first of each pair changing; the ratio is taken within each pair, and its
median and quartiles are printed. The exit code is 1 above a limit.
"""

import argparse
import statistics
import sys
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import torch

from accuracy import evaluate
from benchmarks.evaluation import bare_pass, make_batches, paired_seconds
from latency import laid_out, threads, time_in_pairs, torch_pass
from metrics import Bench, footprint_of
from models import ARCHITECTURES, get_model
from onnx_network import exported

LIMITS = {"accuracy": 1.15, "latency": 1.05}
CLASSES, SHAPE = 10, (3, 32, 32)
CPU = torch.device("cpu")
PLAN = {"repeats": 20, "warmup": 0, "seconds": 1e9, "seed": 0}


def parts(name: str, images: int, batch: int) -> Iterator[tuple[str, Callable, Callable]]:
    """What is measured, the bare passes, and the measurement."""
    torch.manual_seed(0)
    model = get_model(name, CLASSES).eval().to(memory_format=torch.channels_last)
    batches = make_batches(images, batch, torch.channels_last)
    first, second = (torch_pass(laid_out(model, CPU), batches[0][0]) for _ in range(2))

    def plain_loop() -> None:
        for _ in range(PLAN["repeats"]):
            first(), first(), second(), second()

    latency = SimpleNamespace(**PLAN, threads=None, batch_sizes=("test",))
    count = torch.get_num_threads()
    with Bench(model, batches[0][0], device=CPU, latency=latency, onnx=False, seed=0) as bench:
        memory, bench.memory = bench.memory, SimpleNamespace(peak_bytes=lambda *_: 0, __exit__=lambda *_: None)
        yield "accuracy", lambda: bare_pass(model, batches), lambda: evaluate(model, batches, CLASSES, CPU)
        yield "latency", plain_loop, lambda: time_in_pairs(first, second, **PLAN)
        yield "MACs, activations, bytes", first, lambda: footprint_of(model, bench, count)
        bench.memory = memory
        yield "memory of a pass", first, lambda: memory.peak_bytes(model, SHAPE, batch, count)
        yield "ONNX file, compared", first, lambda: exported(model, SHAPE)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=["resnet18", "vgg16"], choices=sorted(ARCHITECTURES))
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    above = []
    with threads(options.threads), torch.inference_mode():
        setting = f"{options.images} images at 32x32, batches of {options.batch}, {options.threads} threads"
        print(f"{setting}, torch {torch.__version__}, {options.repeats} pairs; ratio: median (quartiles)")
        for name in options.models:
            for part, bare, ours in parts(name, options.images, options.batch):
                pairs = paired_seconds(bare, ours, options.repeats)
                low, middle, high = statistics.quantiles([b / a for a, b in pairs], n=4, method="inclusive")
                seconds = [statistics.median(column) for column in zip(*pairs, strict=True)]
                times = "bare {:8.4f} s  ours {:8.4f} s".format(*seconds)
                print(f"{name:12} {part:26} {times}  ratio {middle:.3f} ({low:.3f} to {high:.3f})")
                if middle > LIMITS.get(part, float("inf")):
                    above.append(f"{name}, {part}: {middle:.3f} above {LIMITS[part]}")
    print("\n".join(above) or f"limits: {LIMITS}")
    return int(bool(above))


if __name__ == "__main__":
    sys.exit(main())
