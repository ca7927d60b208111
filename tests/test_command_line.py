import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig

import command_line
import run_status
from command_line import check_arguments, explain
from errors import ConfigError
from run_status import Status, read_status, write_refused

ROOT = Path(command_line.__file__).parent

# The arguments, and what the message has to say: the key or thing, and what would be valid.
BAD_INPUT = [
    (["pruning.pruning_ratoi=[0.5]"], "pruning.pruning_ratoi: [0.5]; no such key, did you mean pruning.pruning_ratio?"),
    (["modle=vgg16"], 'modle: "vgg16"; no such key, did you mean model?'),
    (["model=vgg19"], "model: vgg19; no such choice, did you mean model=vgg16? Choices: mobilenet_v2, resnet18"),
    (["pruning=magic"], "pruning: magic; no such choice"),
    (["pruning.name=magic"], 'pruning.name: "magic"; choose with pruning=NAME'),
    (["+foo=1"], "foo: 1; no such key"),
    (["++pruning.foo=1"], "pruning.foo: 1; no such key"),
    (["+seed=1"], "An item is already at 'seed'"),
    (["~pruning.pruning_ratio"], "pruning.pruning_ratio: missing"),
    (["~model"], "model.name: missing; choose with model=NAME"),
    (["~dataset"], "dataset.name: missing; choose with dataset=NAME"),
    (["~foo"], "'foo' does not exist"),
    (["latency=5"], "latency: 5; is a group, set one of its keys: batch_sizes, repeats, warmup, seconds, threads"),
    (["pruning.pruning_ratio=[0.5"], "pruning.pruning_ratio=[0.5: cannot be read; write key=value"),
    (["seed"], "seed: cannot be read; write key=value"),
    (["--sed=1"], "command line: unrecognized arguments: --sed=1"),
    (["-r", "-m"], "exclude each other"),
    (["pruning.pruning_ratio=[0.5,1]"], "pruning.pruning_ratio: 1 in [0.5, 1]; must be a list of one or more"),
    (["pruning.pruning_ratio=-0.1"], "pruning.pruning_ratio: -0.1; must be"),
    (["pruning.pruning_ratio=nan"], "pruning.pruning_ratio: NaN; must be"),
    (["pruning.pruning_ratio=[]"], "pruning.pruning_ratio: []; must be a list of one or more"),
    (["pruning.pruning_ratio=[0.5,0.50]"], "pruning.pruning_ratio: 0.5 in [0.5, 0.5]; each ratio may stand"),
    (["pruning.pruning_ratio=0.1,0.2"], "a list is written [a,b], a sweep needs --multirun"),
    (["pruning.pruning_scope=layr"], 'pruning.pruning_scope: "layr"; must be one of layer, global'),
    (["pruning.pruning_scope=global"], 'pruning.pruning_scope: "global"; ocap takes only layer'),
    (["pruning.activation_func=foo"], 'pruning.activation_func: "foo"; ocap takes only leaky_relu, relu, identity'),
    (["pruning.activation_func=foo", "pruning.choices.activation_func=[foo]"], "leave them and choose"),
    (["pruning.negative_slope=steep"], 'pruning.negative_slope: "steep"; must be a number'),
    (["pruning=ln_structured", "pruning.norm=3"], "pruning.norm: 3; ln_structured takes only 1, 2"),
    (["pruning=ln_structured", "pruning.aggregation=union"], 'pruning.aggregation: "union"; no such key'),
    (["model=[resnet18,vgg16]"], "model=[resnet18,vgg16]: one choice is needed, of mobilenet_v2, resnet18"),
    (["dataset=null"], "dataset=null: one choice is needed, of cifar10, digits"),
    (["hydra.run.dir="], "hydra.run.dir: empty"),
    (["dataset=cifar10", f"dataset.root={300 * 'x'}"], "File name too long"),
    (["pruning.residual=scatter"], "only the structure pruner puts outputs back in place"),
    (["pruning.round_to=0"], "pruning.round_to: 0; must be an integer of at least 1"),
    (["pruning.min_filters=0"], "pruning.min_filters: 0; must be an integer of at least 1"),
    (["pruning.pruner=scissors"], 'pruning.pruner: "scissors"; must be one of depgraph, structure'),
    (["dataset=cifar10", "dataset.root=no/such/folder"], "dataset.root: no/such/folder; no CIFAR-10 there, expected"),
    (["selected_classes=[3,33]"], "selected_classes: 33; digits has the classes 0 to 9"),
    (["selected_classes=[3,3]"], "selected_classes: 3 and 3"),
    (["selected_classes=[]"], "selected_classes: []; must be a list of one or more"),
    (["dataset=fashion_mnist", "selected_classes=[trowser]"], "nearest: trouser"),
    (["pruning.scoring_classes=complement", "selected_classes=[0,1,2,3,4,5,6,7,8,9]"], "leaves none to score on"),
    (["num_pruning_samples=2"], "num_pruning_samples: 2; must be at least 3"),
    (["training.epochs=-1"], "training.epochs: -1; must be an integer of at least 1"),
    (["training.epochs=ten"], 'training.epochs: "ten"; must be an integer'),
    (["training.lr=0"], "training.lr: 0; must be a number above 0"),
    (["training.lr_retrain=-1e-3"], "training.lr_retrain: -0.001; must be a number above 0"),
    (["training.batch_size_train=0"], "training.batch_size_train: 0; must be"),
    (["training.optimizer=adamx"], 'training.optimizer: "adamx"; must be one of adam, adamw, sgd'),
    (["training.scheduler=null"], "training.scheduler: null; must be one of cosine, step, none"),
    (["training.train=maybe"], 'training.train: "maybe"; must be true or false'),
    (["training.train=false"], "give model.pretrained_weights_path=FILE or, for ImageNet, training.use"),
    (["training.train=false", "training.use_pretrained_model=true"], "head is for 1000 classes"),
    (["model.pretrained_weights_path=no/such.pt"], 'model.pretrained_weights_path: "no/such.pt"; no such file'),
    (["model.pretrained_weights_path=main.py", "training.use_pretrained_model=true"], "set only one of the two"),
    (["model=vgg16", "model.small_input_stem=true"], "model.small_input_stem: true; vgg16 takes only false"),
    (["model.small_input_stem=true", "training.use_pretrained_model=true"], "set only one of the two"),
    (["dataset.num_classes=11"], "num_classes"),
    (["dataset.validation_fraction=1"], "dataset.validation_fraction: 1; must be a number above 0 and below 1"),
    (["device=gpu"], 'device: "gpu"; must be a text that is auto, cpu, cuda or cuda:N'),
    (["seed=1.5"], "seed: 1.5; must be an integer"),
    (["run_name="], 'run_name: ""; must be a text that is not empty'),
    (["run_name=${foo}"], "run_name: Interpolation key 'foo' not found"),
    (["log_results=1"], "log_results: 1; must be true or false"),
    (["latency.batch_sizes=[1,tests]"], 'latency.batch_sizes: "tests" in [1, "tests"]; must be a list of one or more'),
    (["latency.batch_sizes=[0]"], "latency.batch_sizes: 0 in [0]; must be"),
    (["latency.threads=0"], "latency.threads: 0; must be an integer of at least 1 and below 1025 or null"),
    (["latency.seconds=0"], "latency.seconds: 0; must be a number above 0"),
    (["wandb.mode=cloud"], 'wandb.mode: "cloud"; must be one of offline, online'),
    (["wandb.tags=[]"], "wandb.tags: []; must be"),
    (["hydra.foo=1"], "Could not override 'hydra.foo'"),
    (["-m", "seed=1,-2", "model=vgg16,resnet18"], "[seed=-2 model=vgg16] seed: -2; must be"),
    (["-m", "model=glob(vgg*)", "model.small_input_stem=true"], "[model=vgg16 model.small_input_stem=true]"),
    (["-m", "seed=range(5,5)"], "a sweep without values"),
    (["-m", "training.lr=interval(0,1)"], "a sweep needs single values"),
    (["hydra.mode=MULTIRUN", "seed=1,-2"], "[seed=-2] seed: -2"),
    (["=3"], "=3: cannot be read; write key=value"),
    (["hydra.run.dir='~/x'"], 'hydra.run.dir: "~/x"; ~ would be a folder of that name'),
    (["selected_classes={a: 1}"], "selected_classes.a: 1; no such key"),
    (["device=cuda:99999999999999999999"], "must be a text that is auto, cpu, cuda or cuda:N"),
    (["dataset.image_size=100000000"], "dataset.image_size: 100000000; must be an integer of at least 32 and below"),
    (["training.batch_size_test=1000000000000000000000"], "must be an integer of at least 1 and below 2147483648"),
    (["latency.threads=100000"], "latency.threads: 100000; must be"),
    (["dataset.num_workers=100000"], "dataset.num_workers: 100000; must be"),
    (["-m", "hydra.sweeper.max_batch_size=0"], "hydra.sweeper.max_batch_size: 0; must be an integer of at least 1 or"),
    (["-m", "hydra/launcher=joblib", "hydra.launcher.n_jobs=0"], "hydra.launcher.n_jobs: 0; must be a text that is a"),
    (["-m", "hydra/launcher=joblib", "hydra.launcher.batch_size=-5"], 'launcher.batch_size: "-5"; must be a text that'),
    (["-m", "hydra/launcher=joblib", "hydra.launcher.pre_dispatch=foo"], 'launcher.pre_dispatch: "foo"; must be a'),
    (["-m", "hydra/launcher=joblib", "hydra.launcher.prefer=threads"], 'launcher.prefer: "threads"; must be processes'),
    (
        ["-m", "hydra/launcher=joblib", "hydra.launcher.require=sharedmem"],
        'launcher.require: "sharedmem"; must be null',
    ),
    (["-m", "hydra/launcher=joblib", "hydra.launcher.max_nbytes=abc"], 'launcher.max_nbytes: "abc"; must be a text'),
    (["-m", "hydra/launcher=submitit_local", "hydra.launcher.timeout_min=0"], "hydra.launcher.timeout_min: 0; must be"),
    (["-m", "hydra/launcher=submitit_local", "hydra.launcher.tasks_per_node=2"], "tasks_per_node: 2; must be 1"),
    (["-m", "hydra.launcher=null"], "hydra.launcher: null; choose with hydra/launcher=NAME"),
    (["-m", "seed=1,2", "++hydra.sweeper.params.seed='4,5'"], "Hydra cannot apply it"),
    (
        ["-m", "hydra/launcher=joblib", "hydra.launcher.timeout=0"],
        "hydra.launcher.timeout: 0.0; must be a number above",
    ),
]


@pytest.mark.parametrize(("arguments", "fragment"), BAD_INPUT, ids=[" ".join(arguments) for arguments, _ in BAD_INPUT])
def test_bad_input_is_answered_in_one_message(arguments, fragment, monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(Exception) as caught:  # noqa: B017 - `explain` is what is tested; it knows what is meant for users
        check_arguments(arguments)
    message = explain(caught.value)
    assert message is not None
    assert fragment in message
    assert "\n" not in message


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["model=vgg16", "training.epochs=5", "seed=0"],
        ["run_name=${hydra:job.name}-${hydra:runtime.choices.model}"],
        ["-m", "run_name=${hydra:job.num}", "seed=1,2", "pruning=ocap,random"],
        ["-m", "pruning.pruning_ratio=[0.1],[0.2,0.3]"],
        ["hydra.run.dir=elsewhere", "hydra.verbose=true"],
        ["-m", "hydra/launcher=joblib", 'hydra.launcher.pre_dispatch="1.5*n_jobs"', "hydra.launcher.batch_size=auto"],
        ["-m", "hydra/launcher=joblib", "hydra.launcher.pre_dispatch=n_jobs+1", "hydra.launcher.n_jobs=-2"],
        ["-m", "hydra/launcher=joblib", "hydra.launcher.pre_dispatch=all", "hydra.launcher.timeout=2.5"],
        ["-m", "hydra/launcher=submitit_local"],
        ["--cfg", "job", "no.such.key=1"],
        ["--help"],
    ],
    ids=" ".join,
)
def test_good_input_passes_and_leaves_nothing_behind(arguments):
    check_arguments(arguments)
    assert not GlobalHydra.instance().is_initialized()
    assert not HydraConfig.initialized()


def test_a_very_large_sweep_is_checked_for_every_value():
    check_arguments(["-m", "seed=range(0,20)", "training.epochs=range(1,20)"])
    with pytest.raises(Exception, match="training.epochs: 0"):
        check_arguments(["-m", "seed=range(0,40)", "training.epochs=39,38,37,36,35,34,33,0"])


def test_a_bug_is_no_message():
    assert explain(KeyError("x")) is None
    assert explain(FileNotFoundError(2, "No such file", "x")) is None
    assert explain(TimeoutError("of a network")) is None


def test_a_full_disk_is_recognised_behind_what_a_library_made_of_it():
    try:
        try:
            raise OSError(28, "No space left on device", "cache/model.pt")
        except OSError:
            raise RuntimeError("writer failed")  # noqa: B904 - as libraries do
    except RuntimeError as error:
        message = explain(error)
    assert message.startswith("cache/model.pt: No space left on device; free some space")


REPORT_HEAVY_IMPORTS = """
import atexit, runpy, sys
heavy = {{"torch", "torchvision", "numpy", "sklearn", "matplotlib"}}
atexit.register(lambda: print("HEAVY", sorted(heavy & set(sys.modules))))
sys.argv = sys.argv[1:]
sys.path.insert(0, {root!r})
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.parametrize(
    ("code", "arguments"),
    [
        (1, ["pruning.pruning_ratoi=[0.5]"]),
        (1, ["model=vgg19"]),
        (1, ["-m", "seed=1,-1"]),
        (1, ["--nonsense"]),
        (0, ["--help"]),
        (0, ["--cfg", "job"]),
    ],
)
def test_the_answer_comes_without_heavy_imports(code, arguments, tmp_path):
    command = [sys.executable, "-c", REPORT_HEAVY_IMPORTS.format(root=str(ROOT)), str(ROOT / "main.py"), *arguments]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert ended.returncode == code
    assert "HEAVY []" in ended.stdout
    assert "Traceback" not in ended.stderr
    assert len(ended.stderr.splitlines()) == code  # the one message, or nothing
    assert not list(tmp_path.iterdir())


JOB = """
import sys, time
sys.path.insert(0, {root!r})
from command_line import launch
from errors import BenchmarkError

def run(cfg):
    print("running", cfg.seed, flush=True)
    if cfg.run_name == "wait":
        time.sleep(60)
    if cfg.run_name == "full":
        with open("/dev/full", "w") as file:
            file.write("x")
    if cfg.run_name == "bug":
        raise KeyError("bug")
    if cfg.seed == 2:
        raise BenchmarkError("seed: 2; no luck")

if __name__ == "__main__":
    sys.exit(launch(run))
"""


@pytest.fixture
def job(tmp_path):
    script = tmp_path / "job.py"
    script.write_text(JOB.format(root=str(ROOT)))

    def command(*arguments):
        return [sys.executable, str(script), *arguments]

    return command


def execute(command, directory, **environment):
    return subprocess.run(command, capture_output=True, text=True, cwd=directory, env=environment or None)


def test_a_failing_job_gives_its_message_also_to_the_log(job, tmp_path):
    ended = execute(job("seed=2", "hydra.run.dir=run"), tmp_path)
    assert ended.returncode == 1
    assert ended.stderr == "seed: 2; no luck\n"
    assert "seed: 2; no luck" in (tmp_path / "run" / "job.log").read_text()


def test_a_failing_job_does_not_stop_the_sweep(job, tmp_path):
    ended = execute(job("-m", "seed=1,2,3"), tmp_path)
    assert ended.returncode == 1
    assert [line for line in ended.stdout.splitlines() if "running" in line] == ["running 1", "running 2", "running 3"]
    assert ended.stderr == "[seed=2] seed: 2; no luck\n"


def test_a_good_job_exits_with_zero(job, tmp_path):
    ended = execute(job(), tmp_path)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "running 42\n", "")
    assert len(list(tmp_path.glob("outputs/*/*/job.log"))) == 1


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_disk_is_one_message_with_the_path(job, tmp_path):
    ended = execute(job("run_name=full", "hydra.run.dir=run"), tmp_path)
    assert ended.returncode == 1
    assert ended.stderr.startswith(f"{tmp_path / 'run'}: No space left on device")
    assert "Traceback" not in ended.stderr


@pytest.mark.parametrize(
    ("folder", "message"),
    [
        ("file/run", "file/run: Not a directory"),
        ("/proc/run", "/proc/run: No such file or directory"),
        (300 * "x", f"{300 * 'x'}: File name too long"),
        ("taken", "{}/taken/job.log: Is a directory"),  # where the log file is to be
    ],
)
def test_a_run_directory_that_cannot_be_made_is_one_message(job, tmp_path, folder, message):
    (tmp_path / "file").touch()
    (tmp_path / "taken" / "job.log").mkdir(parents=True)
    ended = execute(job(f"hydra.run.dir={folder}"), tmp_path)
    assert ended.returncode == 1
    assert ended.stderr.startswith(message.format(tmp_path)) and "Traceback" not in ended.stderr


def test_a_bug_keeps_its_traceback(job, tmp_path):
    ended = execute(job("run_name=bug"), tmp_path)
    assert ended.returncode == 1
    assert "KeyError: 'bug'" in ended.stderr


def test_the_traceback_is_shown_on_request(job, tmp_path):
    ended = execute(job("seed=2"), tmp_path, HYDRA_FULL_ERROR="1")
    assert ended.returncode == 1
    assert "Traceback" in ended.stderr
    assert "BenchmarkError: seed: 2; no luck" in ended.stderr


def test_an_interrupt_is_one_line(job, tmp_path):
    command = job("run_name=wait")
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a background job's child would ignore it
    ) as process:  # fmt: skip
        assert process.stdout.readline() == "running 42\n"
        time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=20)
    assert process.returncode == 130
    assert errors == "Interrupted.\n"


def test_runs_that_would_share_a_folder_are_refused():
    """All but one would be lost, or wait for each other."""
    shared = ["-m", "seed=1,2", "hydra.sweep.subdir=${pruning.name}"]
    with pytest.raises(ConfigError, match=r"hydra.sweep.subdir: \[seed=1\] and \[seed=2\] would share .*/ocap; add"):
        check_arguments(shared)
    assert len(check_arguments([*shared[:2], "hydra.sweep.subdir=${pruning.name}-${run_hash:}"]).runs) == 2
    assert len(check_arguments(["-m", "seed=1,1", "hydra.sweep.subdir=${pruning.name}"]).runs) == 2  # one and the same


def test_a_sweep_too_large_to_plan_tells_of_failed_runs_by_their_files(tmp_path, monkeypatch):
    monkeypatch.setattr(command_line, "MAX_JOBS_PLANNED", 1)
    plan = check_arguments(["-m", "seed=1,2", f"hydra.sweep.dir={tmp_path}"])
    assert plan.runs == () and not plan.failed()
    for state in ("done", "failed"):
        (tmp_path / state).mkdir()
        (tmp_path / state / "status.json").write_text(json.dumps({"state": state, "identity": "x"}))
        assert plan.failed() == (state == "failed")


def test_runs_that_never_began_are_no_success(tmp_path):
    """A launcher's jobs are other processes: of what they refuse, only the files tell."""
    plan = check_arguments(["-m", "seed=1,2", f"hydra.sweep.dir={tmp_path}"])
    plan.begin(tmp_path)
    first, second = (run.path for run in plan.runs)
    working = Status("running", plan.runs[0].identity, run_id="r", attempts=2, host=run_status.HOST, pid=os.getpid())
    (first / "status.json").write_text(json.dumps(asdict(working)))
    assert plan.failed()  # the second is still queued
    write_refused(second, plan.runs[1].identity, "two\nlines")
    assert plan.failed() and read_status(second).reason == "two lines"
    (second / "status.json").write_text(json.dumps(asdict(replace(working, identity=plan.runs[1].identity))))
    assert not plan.failed()  # both are at work, of another command
    write_refused(first, plan.runs[0].identity, "no")
    assert read_status(first) == replace(working, state="failed", reason="no")  # what it had measured still counts


@pytest.mark.parametrize(
    "layout",
    [
        ["hydra.sweep.dir=o/${now:%S-%f}"],
        pytest.param(["hydra.sweep.subdir=${now:%S-%f}-${run_hash:}"], marks=pytest.mark.slow),
        ["hydra.sweep.subdir=${hydra.job.id}"],
        pytest.param(["hydra.sweep.subdir=${hydra:job.num}"], marks=pytest.mark.slow),
        pytest.param(["hydra.sweep.subdir=${hydra.job.override_dirname}"], marks=pytest.mark.slow),
    ],
)
def test_a_good_sweep_ends_with_zero_wherever_its_runs_go(layout, tmp_path):
    (tmp_path / "job.py").write_text(GOOD.format(root=str(ROOT)))
    ended = execute([sys.executable, "job.py", "-m", "seed=1,2", "hydra.sweep.dir=o", *layout], tmp_path)
    assert (ended.returncode, ended.stderr) == (0, "")
    found = [read_status(path.parent) for path in tmp_path.glob("o/**/status.json")]
    assert sorted(status.state for status in found) == ["done", "done"]


def test_a_sweep_that_cannot_be_queued_is_one_message(tmp_path):
    (tmp_path / "job.py").write_text(GOOD.format(root=str(ROOT)))
    (tmp_path / "taken").touch()
    ended = execute([sys.executable, "job.py", "-m", "seed=1,2", "hydra.sweep.dir=taken"], tmp_path)
    assert ended.returncode == 1 and "Traceback" not in ended.stderr and "taken" in ended.stderr
    assert len(ended.stderr.splitlines()) == 1


GOOD = """
import sys
from pathlib import Path
sys.path.insert(0, {root!r})
import command_line, main
from tests.sample_records import record

def measured(cfg, settings, run_dir, status):
    Path(run_dir, "records.jsonl").write_text(record(run_id=status.run_id).to_json() + "\\n")
    status.measured(1)
    return []

main._run = measured
command_line.SweepReport.on_multirun_end = lambda *_, **__: None
if __name__ == "__main__":
    sys.exit(command_line.launch(main.run))
"""


LARGE = """
import sys
sys.path.insert(0, {root!r})
import command_line, main
command_line.MAX_JOBS_CHECKED = 3  # instead of some hundred jobs
main._run = lambda *_: []
if __name__ == "__main__":
    sys.exit(command_line.launch(main.run))
"""


def test_a_job_that_is_refused_where_it_runs_leaves_the_reason(tmp_path):
    """Of a large sweep not every job is checked beforehand, and a launcher's jobs tell by their files alone."""
    (tmp_path / "job.py").write_text(LARGE.format(root=str(ROOT)))
    swept = ["pruning.scoring_classes=complement,all", "selected_classes=[1,2],[0,1,2,3,4,5,6,7,8,9]"]
    ended = execute([sys.executable, "job.py", "-m", *swept, "hydra.sweep.dir=sweep"], tmp_path)
    assert ended.returncode == 1
    found = [read_status(path.parent) for path in tmp_path.glob("sweep/*/status.json")]
    assert len(found) == 4
    (failed,) = [status for status in found if status.state == "failed"]
    assert "leaves none to score on" in failed.reason


class TerminatedWorkerError(Exception):
    """As joblib's."""


class FailedJobError(Exception):
    """As submitit's."""


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            TerminatedWorkerError("A worker process\nwas unexpectedly terminated"),
            "a job's process ended before its run was done (A worker process was unexpectedly terminated); the same "
            "command goes on with what is missing",
        ),
        (
            FailedJobError("sbatch: error: Unable to contact\nslurm controller"),
            "hydra/launcher: submitit_slurm; the cluster took no jobs (sbatch: error: Unable to contact slurm "
            "controller)",
        ),
        (multiprocessing.TimeoutError(), "hydra.launcher.timeout: a run took longer, and the sweep was ended"),
        (RuntimeError("unable to mmap 8 bytes: Cannot allocate memory (12)"), "memory: unable to mmap"),
        (MemoryError(), "memory: there is too little; take fewer images at a time"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you"), "memory: DefaultCPUAllocator: can't"),
        (RuntimeError("CUDA out of memory. Tried to allocate"), "memory: CUDA out of memory."),
    ],
)
def test_what_ends_a_process_is_one_message(error, message):
    assert explain(error).startswith(message)


def test_without_slurm_its_launcher_is_refused_and_only_listing_goes(monkeypatch, tmp_path):
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    monkeypatch.setenv("PATH", str(tmp_path))
    arguments = ["-m", "seed=1,2", "hydra/launcher=submitit_slurm"]
    with pytest.raises(ConfigError, match="submitit_slurm; no SLURM here"):
        check_arguments(arguments)
    assert len(check_arguments([*arguments, "sweep.dry_run=true"]).runs) == 2
