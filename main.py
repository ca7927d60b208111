"""The benchmark in one command: configuration in, records out. `python main.py --help` shows what can be configured."""

from __future__ import annotations

import logging
import os
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from command_line import launch
from errors import ConfigError
from identity import run_identity
from records import records_of
from run_status import RunStatus, write_refused
from settings import check

if TYPE_CHECKING:
    from records import Record
    from settings import Settings

log = logging.getLogger(__name__)

# Read when torch is imported. Threads that wait for each other by spinning take the cores from those they wait for as
# soon as anything else runs: a training step was seen to take six times as long.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def run(cfg: DictConfig, run_dir: str | Path | None = None) -> list[Record]:
    """Run one job: train or load, score once, and prune, measure and retrain at every ratio.

    Args:
        cfg: the composed configuration.
        run_dir: where records, selections, plots and the environment go; Hydra's run directory by default. What an
            interrupted process left of the same run there is taken up, unless `resume` is false.

    Returns:
        The records, in the order they were measured: dense, then each ratio pruned and retrained. Ratio 0, nothing
        removed and the head replaced, is always among them. None of a sweep's run that another process is at.

    Raises:
        BenchmarkError: whatever the user can mend, before anything expensive where that is possible.
    """
    run_dir = Path(run_dir or HydraConfig.get().runtime.output_dir)
    in_sweep = HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN
    try:
        settings = check(cfg)  # before torch is imported
    except ConfigError as error:
        if in_sweep:  # a single run has a message to read, a sweep only what its runs left behind
            with suppress(OmegaConfBaseException):  # what is refused may have no identity
                write_refused(run_dir, run_identity(cfg), str(error))
        raise
    with RunStatus(run_dir, run_identity(cfg), resume=settings.resume, wait=not in_sweep) as status:
        if not status.claimed:
            log.info("%s: left to the process that is at it", run_dir)
            return []
        if status.done:
            log.info("%s: done already, nothing is done; resume=false does it anew", run_dir)
            return records_of(run_dir, status.run_id)
        return _run(cfg, settings, run_dir, status)


def _run(cfg: DictConfig, settings: Settings, run_dir: Path, status: RunStatus) -> list[Record]:
    from cache import dense_model
    from data_loader import get_data_factory
    from disk import write_json
    from experiment import Experiment, choose_classes
    from helpers import resolve_device
    from parallel import require
    from pruner import get_pruner
    from records import environment, write_selections
    from report import table, write_report
    from scores import obtain_scores, weights_digest
    from selection import get_selector
    from structure import ModelGraph
    from tracking import get_tracker

    start = time.perf_counter()
    device = resolve_device(settings.device)
    require(device, settings.training.processes)
    earlier = records_of(run_dir, status.run_id)
    if not earlier:
        write_json(run_dir / "environment.json", environment(settings))
    factory = get_data_factory(settings, device)
    around = environment(settings, factory.describe())

    train, validation, test = factory.get_dataloaders()
    log.info(
        "%s: %d training, %d validation and %d test images",
        settings.dataset.name, train.num_images, validation.num_images, test.num_images,
    )  # fmt: skip
    config = OmegaConf.to_container(cfg, resolve=True) | {"environment": around}
    with get_tracker(settings, run_dir, config) as tracker:
        dense = dense_model(settings, factory, device)
        tracker.curve("training", dense.history)
        if not status.same_origin(f"{weights_digest(dense.model)} {factory.fingerprint()}"):
            earlier = []
        elsewhere = earlier and earlier[0].environment_hash != around["hash"]  # where a run was begun stays told
        write_json(run_dir / (f"environment-{around['hash'][:8]}.json" if elsewhere else "environment.json"), around)
        if not settings.selected_classes:
            settings, factory = choose_classes(settings, factory, dense.model, device)
        selector = get_selector(settings, factory)
        graph = ModelGraph(dense.model, factory.input_shape, settings.pruning.residual)
        with Experiment(
            settings, factory, device, run_dir, selector, dense, graph, around["hash"], tracker,
            run_id=status.run_id, earlier=earlier,
        ) as experiment:  # fmt: skip
            scores, experiment.scoring_costs = obtain_scores(settings, selector, graph, factory, run_dir)
            selections = selector.select(graph, scores)
            experiment.measure_dense()
            pruner = get_pruner(settings.pruning.pruner, graph)
            budgeted = experiment.budgeted(selector.chooser(graph, scores), pruner) if settings.pruning.match else []
            write_selections(run_dir / "selections.json", selections | {b.ratio: b.indices for b in budgeted})
            for ratio, indices in selections.items():
                experiment.measure_ratio(ratio, indices, pruner)
            for found in budgeted:
                experiment.measure_ratio(found.ratio, found.indices, pruner, found)

        status.measured(len(experiment.records))
        written = write_report(run_dir)
        for path in written:
            log.info("Wrote %s", path)
        print(table(experiment.records))
        plots = [path for path in written if path.suffix == ".png"]
        tracker.results(experiment.records, plots, time.perf_counter() - start)
    return experiment.records


if __name__ == "__main__":
    sys.exit(launch(run))
