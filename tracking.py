"""A run on a dashboard, beside the records on disk: the one place that knows Weights & Biases.

`Tracker` is what a run tells of itself; another dashboard is one more subclass. W&B runs in a process of its own (this
file, run as a program), which is sent lines of JSON: whatever it waits for, fails at or dies of, the run goes on.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO

from records import Record, spread

log = logging.getLogger(__name__)

PATIENCE = 20.0  # seconds that the end of a run waits for W&B before it is stopped
STOPPING = 1.0  # seconds that stopping it may take, for the process and for each thread
LOGIN_TIMEOUT = 10.0  # seconds that W&B tries to reach its server before it goes on offline
LOG_FILE = "wandb.log"
WHERE_THE_RECORDS_ARE = "records.jsonl has every figure"


class Tracker:
    """What a run tells of itself; this one keeps it to itself. A context manager, left when the run ends or fails."""

    def __enter__(self) -> Tracker:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.close(failed=kind is not None)

    def curve(self, name: str, history: Iterable[Any]) -> None:
        """A training, as its `training.EpochRow`s."""

    def ratio(self, dense: Record, pruned: Record, retrained: Record | None) -> None:
        """All that was measured at one ratio."""

    def results(self, records: Sequence[Record], plots: Iterable[Path], seconds: float) -> None:
        """The run's records and plots, and how long it took, once it is done."""

    def close(self, failed: bool) -> None:
        """The run has ended."""


def get_tracker(settings: Any, run_dir: Path, config: Mapping[str, Any]) -> Tracker:
    """W&B where `settings.log_results` asks for it, else nothing; `config` is the composed configuration, resolved."""
    if not settings.log_results:
        return Tracker()
    return WandbTracker(asdict(settings.wandb), run_dir, config)


def row(dense: Record, pruned: Record, retrained: Record | None) -> dict[str, float]:
    """One ratio in the names of the framework that this benchmark follows: before pruning, after it, and the share.

    before: the dense network with all logits; after: the pruned network, retrained where it was. Accuracies on the
    selected classes' test images; sizes in bytes; times in seconds, of the largest batch in PyTorch; flops are
    multiply-adds, counted as one each, as they were there: the same as macs.
    """
    final = retrained or pruned
    sizes = [timing.batch_size for timing in final.times if timing.engine == "pytorch"]
    timing = final.time("pytorch", max(sizes)) if sizes else None
    pruning = [final.scoring_seconds, final.removal_seconds]
    values = {
        "pruning_ratio": final.ratio,
        "achieved_ratio": final.achieved_ratio,
        "accuracy_before": dense.accuracy,
        "accuracy_after": final.accuracy,
        "accuracy_after_pruning": pruned.accuracy,
        "worst_class_accuracy_before": dense.worst_class_accuracy,
        "worst_class_accuracy_after": final.worst_class_accuracy,
        "model_size_before": dense.size_bytes,
        "model_size_after": final.size_bytes,
        "model_size_ratio": final.size_ratio,
        "parameters_before": dense.params,
        "parameters_after": final.params,
        "parameter_ratio": final.params_ratio,
        "inference_time_batch_before": timing and timing.dense_median_ms / 1e3,
        "inference_time_batch_after": timing and timing.median_ms / 1e3,
        "inference_time_batch_ratio": timing and timing.ratio,
        "pruning_time": sum(filter(None, pruning)),
        "retraining_time": final.retraining_seconds or 0.0,
        "total_time": sum(filter(None, [*pruning, final.retraining_seconds])),
    }
    for name in ("flops", "macs"):
        values |= {f"{name}_before": dense.macs, f"{name}_after": final.macs, f"{name}_ratio": final.macs_ratio}
    for each in final.times:
        for figure in ("ratio", "ratio_low", "ratio_high", "noisy"):
            values[f"latency/{each.engine}_batch_{each.batch_size}_{figure}"] = getattr(each, figure)
    return {name: value for name, value in values.items() if value is not None}


def results_table(records: Sequence[Record]) -> tuple[list[str], list[list[Any]]]:
    """Columns and rows: every record with each of its fields that is one value."""
    columns, rows = spread(records)
    plain = [place for place in range(len(columns)) if any(isinstance(row[place], (int, float, str)) for row in rows)]
    return [columns[place] for place in plain], [[row[place] for place in plain] for row in rows]


def class_table(records: Sequence[Record]) -> tuple[list[str], list[list[Any]]]:
    """Columns and rows: the accuracy of each selected class in every record."""
    rows = [
        [record.stage, record.head, record.ratio, name, record.images_per_class[name], accuracy]
        for record in records
        for name, accuracy in record.accuracy_per_class.items()
    ]
    return ["stage", "head", "pruning_ratio", "class", "images", "accuracy"], rows


class WandbTracker(Tracker):
    """Weights & Biases, from a distance: nothing here waits but `close`, and that not for long.

    Args:
        options: mode, project, entity, group, job_type, tags and name.
        run_dir: W&B writes below it, unless WANDB_DIR says where else.
        config: what the dashboard shows as the run's configuration.
    """

    def __init__(self, options: Mapping[str, Any], run_dir: Path, config: Mapping[str, Any]):
        self._troubles: set[str] = set()
        self._lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._process: subprocess.Popen | None = None
        self._threads: list[threading.Thread] = []
        folder = Path(os.environ.get("WANDB_DIR") or run_dir)
        self._temporary: tempfile.TemporaryDirectory | None = None
        try:
            # What W&B keeps for the moment: it leaves that behind when it is killed.
            self._temporary = tempfile.TemporaryDirectory(prefix="wandb-", ignore_cleanup_errors=True)
            with (run_dir / LOG_FILE).open("wb") as errors:
                # In a session of its own: Ctrl-C is for the run, which then ends this process in an orderly way.
                self._process = subprocess.Popen(
                    [sys.executable, str(Path(__file__).resolve())],
                    stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True, start_new_session=True,
                    env=os.environ | {"TMPDIR": self._temporary.name},
                )  # fmt: skip
        except OSError as error:
            self._warn(f"cannot be started ({error.strerror or error})")
            if self._temporary is not None:
                self._temporary.cleanup()
            return
        for work, stream in ((self._write, self._process.stdin), (self._read, self._process.stdout)):
            thread = threading.Thread(target=work, args=(stream,), daemon=True)
            thread.start()
            self._threads.append(thread)
        self._send("start", options=dict(options), folder=str(folder.resolve()), config=dict(config))

    def curve(self, name: str, history: Iterable[Any]) -> None:
        name = name.replace(".", "_")  # W&B reads a dot in a defined name as a step into a nested value
        for epoch in history:
            values = {f"{name}/{key}": value for key, value in asdict(epoch).items()}
            self._send("log", values=values, step=f"{name}/epoch")

    def ratio(self, dense: Record, pruned: Record, retrained: Record | None) -> None:
        self._send("log", values=row(dense, pruned, retrained), step="pruning_ratio")

    def results(self, records: Sequence[Record], plots: Iterable[Path], seconds: float) -> None:
        for name, (columns, rows) in (("results", results_table(records)), ("classes", class_table(records))):
            self._send("table", name=name, columns=columns, rows=rows)
        for path in plots:
            self._send("image", name=f"plots/{path.stem}", path=str(path.resolve()))
        dense, last = records[0], [record for record in records if record.ratio == records[-1].ratio]
        pruned = next((record for record in last if record.stage == "pruned"), None)
        retrained = next((record for record in last if record.stage == "retrained"), None)
        final = row(dense, pruned, retrained) if pruned is not None else {}
        self._send("summary", values={**final, "seconds": seconds})

    def close(self, failed: bool) -> None:
        """Let W&B finish, for `PATIENCE` seconds, then stop it; what it has not sent by then stays on disk."""
        if self._process is None:
            return
        deadline = time.monotonic() + PATIENCE
        self._send("finish", failed=failed)
        self._lines.put(None)
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        try:
            code = self._process.wait(max(0.0, deadline - time.monotonic()))
            if code:
                self._warn(f"its process ended with {code}, see {LOG_FILE} in the run's directory")
        except subprocess.TimeoutExpired:
            self._warn(f"still busy after {PATIENCE:g} s and was stopped; `wandb sync` sends what it had written")
        self._kill()
        for thread in self._threads:  # with the process gone, nothing keeps them
            thread.join(STOPPING)
        self._process.stdout.close()
        self._process = None
        self._temporary.cleanup()

    def _send(self, do: str, **what: Any) -> None:
        if self._process is not None:
            self._lines.put(json.dumps({"do": do, **what}, default=str) + "\n")

    def _write(self, stream: TextIO) -> None:
        """Thread: lines to the process, for as long as there are any and it takes them."""
        try:
            while (line := self._lines.get()) is not None:
                stream.write(line)
                stream.flush()
        except (OSError, ValueError):  # it has ended: `close` says so
            pass
        with contextlib.suppress(OSError, ValueError):
            stream.close()

    def _read(self, stream: TextIO) -> None:
        """Thread: what the process has to say."""
        for line in stream:
            with contextlib.suppress(ValueError, KeyError):
                said = json.loads(line)
                if said["kind"] == "warning":
                    self._warn(said["text"])
                else:
                    log.info("W&B: %s", said["text"])

    def _kill(self) -> None:
        """The process; W&B's own helper ends with it, since it watches it."""
        with contextlib.suppress(OSError):
            os.killpg(self._process.pid, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(STOPPING)

    def _warn(self, text: str) -> None:
        if text not in self._troubles:
            self._troubles.add(text)
            log.warning("W&B: %s; the benchmark goes on, %s", text, WHERE_THE_RECORDS_ARE)


class _Dashboard:
    """In the process of its own: each message as a call of W&B's."""

    def __init__(self, answers: TextIO):
        self._answers = answers
        self._run: Any = None
        self._known: set[str] = set()

    def serve(self, lines: Iterable[str]) -> int:
        """Until the last message, or until whoever sends them is gone: then the run is marked as failed."""
        failed = True
        for line in lines:
            message = json.loads(line)
            do = message.pop("do")
            if do == "finish":
                failed = message["failed"]
                break
            getattr(self, f"_{do}")(**message)
        else:  # nobody waits any more, so nobody would end what takes too long
            signal.alarm(math.ceil(PATIENCE))
        if self._run is not None:
            self._run.finish(exit_code=int(failed))
            place = self._run.settings.sync_dir
            self._say("info", f"kept in {place}" if self._run.offline else f"kept in {place}, seen at {self._run.url}")
        return 0

    def _start(self, options: dict[str, Any], folder: str, config: dict[str, Any]) -> None:
        import wandb

        mode = options.pop("mode")
        # No statistics of the machine: reading them takes time from what is being timed.
        settings = {"silent": True, "console": "off", "init_timeout": LOGIN_TIMEOUT, "x_disable_stats": True}
        for attempt in dict.fromkeys((mode, "offline")):
            try:
                self._run = wandb.init(
                    **options, mode=attempt, dir=folder, config=config, settings=wandb.Settings(**settings)
                )
                if not Path(self._run.settings.sync_dir).is_relative_to(folder):  # it looks for another place itself
                    self._say("warning", f"{folder} cannot be written, it writes to {self._run.settings.sync_dir}")
                return
            except Exception as error:
                reason = str(error).splitlines()[0] if str(error) else type(error).__name__
                then = ", offline instead" if attempt == "online" else ""
                self._say("warning", f"{attempt} did not work ({reason}){then}")
        sys.exit(1)

    def _log(self, values: dict[str, float], step: str) -> None:
        for name in values:
            if name not in self._known and name != step:
                self._run.define_metric(name, step_metric=step)
                self._known.add(name)
        self._run.log(values)

    def _table(self, name: str, columns: list[str], rows: list[list[Any]]) -> None:
        import wandb

        self._run.log({name: wandb.Table(columns=columns, data=rows, allow_mixed_types=True)})

    def _image(self, name: str, path: str) -> None:
        import wandb

        self._run.log({name: wandb.Image(path)})

    def _summary(self, values: dict[str, float]) -> None:
        self._run.summary.update(values)

    def _say(self, kind: str, text: str) -> None:
        with contextlib.suppress(OSError):
            print(json.dumps({"kind": kind, "text": text}), file=self._answers, flush=True)


if __name__ == "__main__":
    pipe = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what W&B prints goes to the log file, not between the answers
    sys.path.pop(0)  # the benchmark's own modules are not for W&B to import
    sys.exit(_Dashboard(pipe).serve(sys.stdin))
