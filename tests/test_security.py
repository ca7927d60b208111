"""What comes from elsewhere runs no code, leads to no other place on the disk, and is what it should be."""

from __future__ import annotations

import ast
import http.server
import io
import json
import os
import pickle
import shutil
import subprocess
import sys
import tarfile
import threading
import zipfile
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch
import yaml
from torchvision import datasets

import decoded
import report
from baselines import ANSWERS
from command_line import check_arguments, explain
from data_files import download, read_cifar10
from disk import read_arrays
from errors import BenchmarkError, ConfigError
from export import load_pruned_model
from filter_selection import get_criterion
from kept import Kind, load_checked, save_checked
from models import ARCHITECTURES, get_model, read_weights
from records import read_records, scan_records
from run_status import read_status
from runs import read_sweep
from scores import SCORES, load_scores
from tests.formats import IMAGENETTE_WNIDS, write_cifar10, write_fashion_mnist, write_gtsrb, write_image_folder
from tests.test_main import MAIN, SMALL, job

ROOT = MAIN.parent
MODULES = [*ROOT.glob("*.py"), *ROOT.glob("filter_selection/*.py"), *ROOT.glob("benchmarks/*.py")]


# No code that comes with a file

UNPICKLERS = {"pickle", "_pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "pandas", "yaml"}
SAFE_ONLY_WITH = {
    "torch.load": "weights_only=True",
    "np.load": "allow_pickle=False",
    "numpy.load": "allow_pickle=False",
}
EVALUATORS = {"eval", "exec", "torch.jit.load", "torch.hub.load", "torch.package.PackageImporter"}
ALLOWED = {
    "data_files.py": {
        "import pickle"
    },  # of which it takes `Unpickler` alone, with a `find_class` of its own: see below
    "memory.py": {"torch.load without weights_only=True"},  # what its own parent process sends it through a pipe
}


def unsafe(code: str) -> set[str]:
    """What in `code` could run what a file says."""
    found = set()
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            found |= {f"import {name.name}" for name in node.names if name.name.split(".")[0] in UNPICKLERS}
        elif isinstance(node, ast.ImportFrom):
            taken = {f"{node.module}.{name.name}" for name in node.names}
            if (node.module or "").split(".")[0] in UNPICKLERS or taken & (SAFE_ONLY_WITH.keys() | EVALUATORS):
                found.add(f"import {node.module}")
        elif isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            given = {f"{word.arg}={ast.unparse(word.value)}" for word in node.keywords}
            if called in EVALUATORS:
                found.add(called)
            if called in SAFE_ONLY_WITH and SAFE_ONLY_WITH[called] not in given:
                found.add(f"{called} without {SAFE_ONLY_WITH[called]}")
            if called.endswith(".get_state_dict") and not {"check_hash=True", "weights_only=True"} <= given:
                found.add(f"{called} without check_hash=True, weights_only=True")
            if "allow_pickle=True" in given:
                found.add("allow_pickle=True")
    return found


@pytest.mark.parametrize(
    "code",
    ["import pickle", "from pickle import load", "import joblib.numpy_pickle", "from torch import load",
     "torch.load(path)", "torch.load(path, weights_only=wanted)", "x = np.load(p, allow_pickle=True)", "np.load(p)",
     "torch.hub.load(a, b)", "eval(text)", "weights.get_state_dict(check_hash=True)"],
)  # fmt: skip
def test_what_could_run_code_is_found(code):
    assert unsafe(code)


def test_no_module_unpickles_anything_but_weights():
    assert len(MODULES) > 50
    found = {path.name: unsafe(path.read_text()) for path in MODULES}
    assert {name: what for name, what in found.items() if what} == ALLOWED


def test_of_pickle_only_the_restricted_reader_is_used():
    tree = ast.parse((ROOT / "data_files.py").read_text())
    used = [
        node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "pickle"
    ]
    (reader,) = [node for node in ast.walk(tree) if isinstance(node, ast.ClassDef) and "Unpickler" in node.name]
    assert set(used) == {"Unpickler", "UnpicklingError"} and used.count("Unpickler") == 1
    assert [ast.unparse(base) for base in reader.bases] == ["pickle.Unpickler"]
    assert "find_class" in {node.name for node in reader.body if isinstance(node, ast.FunctionDef)}
    calls = (ROOT / "memory.py").read_text().count("torch.load(")
    assert calls == 1, "the pipe's alone"


class Runs:
    """Pickled, it makes a folder when it is read."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


def as_pickle(evil: Runs) -> bytes:
    return pickle.dumps(evil)


def as_old_pickle(evil: Runs) -> bytes:
    return pickle.dumps({b"data": evil, b"labels": [0]}, protocol=0)


def as_torch_file(evil: Runs) -> bytes:
    content = io.BytesIO()
    torch.save({"state_dict": {"conv1.weight": evil}}, content)
    return content.getvalue()


def as_array(evil: Runs) -> bytes:
    content = io.BytesIO()
    np.save(content, np.array([evil], dtype=object), allow_pickle=True)
    return content.getvalue()


def as_archive(evil: Runs) -> bytes:
    """Under every name that a reader asks for."""
    content = io.BytesIO()
    hidden = np.array([evil], dtype=object)
    np.savez(content, **dict.fromkeys(["facts.json", "structure.json", "conv1", "dense/confusion"], hidden))
    return content.getvalue()


def as_yaml(evil: Runs) -> bytes:
    return f"- !!python/object/apply:os.mkdir ['{evil.mark}']\n".encode()


def open_archive(content: bytes) -> None:
    with np.load(io.BytesIO(content), allow_pickle=True) as arrays:
        arrays[arrays.files[0]]


FORMS = {  # and the reader that would run it
    as_pickle: pickle.loads,
    as_old_pickle: pickle.loads,
    as_torch_file: lambda content: torch.load(io.BytesIO(content), weights_only=False),
    as_array: lambda content: np.load(io.BytesIO(content), allow_pickle=True),
    as_archive: open_archive,
    as_yaml: yaml.unsafe_load,
}
forms = pytest.mark.parametrize("form", FORMS, ids=lambda form: form.__name__)


@forms
def test_a_careless_reader_would_run_it(form, tmp_path):
    FORMS[form](form(Runs(tmp_path / "ran")))
    assert (tmp_path / "ran").exists()


# Of files of the cache, by their endings.
KINDS = {".pt": Kind("dense model", "", dict, dict), ".retrained": Kind("retrained dense model", "", dict, dict),
         ".scores": SCORES, ".answers": ANSWERS, ".images": decoded.KIND}  # fmt: skip


def overrides_of(path: Path):
    """A run's folder in which this is Hydra's list of overrides."""
    (path.parent / "run" / ".hydra").mkdir(parents=True)
    shutil.copy(next((ROOT / "results" / "digits-vgg16_bn").glob("*/records.jsonl")), path.parent / "run")
    path.rename(path.parent / "run" / ".hydra" / "overrides.yaml")
    read_sweep(path.parent / "run")


def batch_of(path: Path):
    write_cifar10(path.parent, images_per_class=5)
    path.replace(path.parent / "cifar-10-batches-py" / "data_batch_1")
    read_cifar10(path.parent / "cifar-10-batches-py")


READERS = {
    "weights": read_weights,
    **{f"cached {kind.what}": partial(load_checked, kind) for kind in KINDS.values()},
    "scores_path": load_scores,
    "matched_selections": lambda path: get_criterion("matched_random", {"matched_selections": str(path)}),
    "pruned network": load_pruned_model,
    "latency.npz, confusion.npz": read_arrays,
    "status.json": lambda path: read_status(path.rename(path.with_name("status.json")).parent),
    "records.jsonl": scan_records,
    "overrides.yaml": overrides_of,
    "CIFAR-10 batch": batch_of,
}


@forms
@pytest.mark.parametrize("read", READERS.values(), ids=READERS)
def test_no_file_that_a_run_reads_runs_code(form, read, tmp_path):
    path, evil = tmp_path / "given", Runs(tmp_path / "ran")
    path.write_bytes(form(evil))
    with suppress(BenchmarkError, ValueError):  # others do without it, or tell what they did not read
        read(path)
    assert not evil.mark.exists()


@pytest.mark.parametrize("kind", KINDS.values(), ids=lambda kind: kind.what)
def test_a_checksum_makes_no_file_of_the_cache_trusted(kind, tmp_path):
    evil = Runs(tmp_path / "ran")
    for content in ({"facts": evil}, {"state": {"fc.bias": evil}}, {"key": "x", "scores": {"conv1": evil}}):
        save_checked(kind, tmp_path / "file", content)
        with pytest.raises(pickle.UnpicklingError, match="[Ww]eights.only"):
            load_checked(kind, tmp_path / "file")
    assert not evil.mark.exists()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run with all that it keeps."""
    folder = tmp_path_factory.mktemp("whole")
    job(folder, "run", "training.retrain_after_pruning=false", "pruning.pruning_ratio=[0.5]")
    return folder


@pytest.mark.slow
def test_a_run_that_meets_them_all_goes_on(whole, tmp_path, caplog):
    """Resumed in a folder, and with a cache, whose files were replaced."""
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    evil, run_dir = Runs(tmp_path / "ran"), tmp_path / "run"
    for path in (tmp_path / "cache").glob("*.*"):
        save_checked(KINDS[path.suffix], path, {"facts": evil, "key": evil})
    for name in ("latency.npz", "confusion.npz", "scores.npz"):
        (run_dir / name).write_bytes(as_archive(evil))
    for name in ("selections.json", "environment.json"):
        (run_dir / name).write_bytes(as_pickle(evil))
    with (run_dir / "records.jsonl").open("ab") as file:
        file.write(as_pickle(evil) + b"\n")
    status = json.loads((run_dir / "status.json").read_text()) | {"state": "failed"}
    (run_dir / "status.json").write_text(json.dumps(status))
    records = job(tmp_path, "run", "training.retrain_after_pruning=false", "pruning.pruning_ratio=[0.5]")
    before = read_records(whole / "run" / "records.jsonl")
    assert [record.accuracy_per_class for record in records] == [record.accuracy_per_class for record in before]
    assert "Dense model not used and made again" in caplog.text and "Scores not used and made again" in caplog.text
    assert not evil.mark.exists()


@pytest.mark.parametrize("key", ["pruning.scores_path", "pruning.matched_selections"])
@pytest.mark.slow
def test_a_file_that_a_key_names_runs_no_code(key, whole, tmp_path):
    evil = Runs(tmp_path / "ran")
    (tmp_path / "given").write_bytes(as_pickle(evil) if key.endswith("selections") else as_archive(evil))
    method = "matched_random" if key.endswith("selections") else "ocap"
    shutil.copytree(whole / "cache", tmp_path / "cache")
    with pytest.raises(ConfigError, match=f"{key}: {tmp_path}/given; is not the "):
        job(tmp_path, "run", f"pruning={method}", f"{key}={tmp_path}/given")
    assert not evil.mark.exists()


# No name that leads elsewhere


def paths_in(folder: Path) -> set[Path]:
    return set(folder.rglob("*"))


HOSTILE = "../../escaped"


@pytest.mark.slow
def test_names_of_a_run_are_never_paths(tmp_path):
    """Each text that a configuration sets freely leads out of the run's folder, or would if it were a path."""
    places = {name: tmp_path / "a" / "b" / name for name in ("work", "run", "cache", "home", "temporary")}
    for place in places.values():
        place.mkdir(parents=True)
    classes = ["x..escaped", "a\nescaped", "<img src=escaped>"]
    write_image_folder(tmp_path / "data", classes, images_per_class=4)
    before = paths_in(tmp_path)
    texts = {"run_name": f"{HOSTILE}\\n", "wandb.name": f"{places['work']}/../escaped", "wandb.project": "..escaped",
             "wandb.group": HOSTILE, "wandb.job_type": HOSTILE, "wandb.entity": "..escaped"}  # fmt: skip
    command = [
        sys.executable, str(MAIN), *SMALL, "dataset=imagenet", f"dataset.root={tmp_path}/data", "dataset.num_classes=3",
        "dataset.image_size=64", "dataset.num_workers=0", "dataset.samples_per_class=4", "training.epochs=1",
        "num_pruning_samples=3", "selected_classes=[0,1,2]", "pruning.pruning_ratio=[0.5]",
        "latency.batch_sizes=[1]", "training.retrain_after_pruning=false", "log_results=true", "wandb.mode=offline",
        *(f"{key}='{value}'" for key, value in texts.items()), f"wandb.tags=['{HOSTILE}','/escaped']",
        f"hydra.run.dir={places['run']}", f"cache_dir={places['cache']}",
    ]  # fmt: skip
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("WANDB", "XDG", "MPL"))}
    environment |= {
        "HOME": str(places["home"]),
        "TMPDIR": str(places["temporary"]),
        "MPLCONFIGDIR": matplotlib.get_cachedir(),
    }
    done = subprocess.run(command, cwd=places["work"], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    new = paths_in(tmp_path) - before
    own = [places["run"], places["cache"], places["home"], places["temporary"]]  # of the last two nothing was asked
    assert {path for path in new if not any(path.is_relative_to(place) for place in own)} == set()
    assert [path for path in new if "escaped" in path.name] == []
    assert list(places["run"].glob("wandb/offline-run-*/*.wandb"))
    page = (places["run"] / "report.html").read_text()
    assert "&lt;img src=escaped&gt;" in page and "<img src=escaped>" not in page


def test_a_report_of_hostile_records_stays_in_its_folder(tmp_path):
    """Whoever sends records may write anything into them."""
    folder = tmp_path / "a" / "b" / "sweep"
    for number, path in enumerate(sorted((ROOT / "results" / "digits-vgg16_bn").glob("*/records.jsonl"))[:2]):
        (folder / str(number)).mkdir(parents=True)
        lines = []
        for line in path.read_text().splitlines():
            record = json.loads(line)
            record |= {
                "dataset": f"{HOSTILE}<b>",
                "model": f"{tmp_path}/escaped",
                "variant": f"<b>{HOSTILE}</b>{number}",
            }
            lines.append(json.dumps(record))
        (folder / str(number) / "records.jsonl").write_text("\n".join(lines) + "\n")
    assert report.main([str(folder)]) == 0
    assert {path for path in paths_in(tmp_path) if not path.is_relative_to(folder)} == {
        folder.parent,
        folder.parent.parent,
    }
    assert (folder / "plots" / "accuracy_over_macs.png").is_file()
    assert not [path for path in paths_in(tmp_path) if "escaped" in path.name]
    assert "<b>" not in (folder / "report.html").read_text()


ESCAPING = [
    (["-m", "seed=1,2", "hydra.sweep.subdir=../../x"], 'hydra.sweep.subdir: "../../x"; leaves the sweep\'s folder'),
    (["-m", "seed=1,2", "hydra.sweep.subdir=/tmp/x"], 'hydra.sweep.subdir: "/tmp/x"; leaves the sweep\'s folder'),
    (["-m", "seed=1,2", "hydra.sweep.subdir=a/../../x"], 'hydra.sweep.subdir: "a/../../x"; leaves'),
    (
        ["-m", "run_name=ok,../x", "hydra.sweep.subdir=${run_name}"],
        '[run_name=../x] hydra.sweep.subdir: "../x"; leaves',
    ),
    (["-m", "run_name=ok,../x", "hydra.sweep.subdir=${run_name}-${run_hash:}"], "-0000000000"),
    (["-m", "cache_dir=../../x", "hydra.sweep.subdir=${hydra.job.override_dirname}"], '"cache_dir=../../x"; leaves'),
    (["-m", "hydra.sweep.subdir=a,../x"], 'hydra.sweep.subdir: "../x"; leaves'),
    (["hydra.mode=MULTIRUN", "hydra.sweep.subdir=../x"], 'hydra.sweep.subdir: "../x"; leaves'),
    (["-m", "seed=range(0,5000)", "hydra.sweep.subdir=../${seed}"], "leaves the sweep's folder"),
    (["hydra.output_subdir=../../x"], 'hydra.output_subdir: "../../x"; leaves the run\'s folder'),
    (["-m", "hydra.output_subdir=/tmp/x"], 'hydra.output_subdir: "/tmp/x"; leaves the run\'s folder'),
    (["hydra.job.name=../../x"], 'hydra.job.name: "../../x"; names the log file in the run\'s folder, leave out the /'),
    (["hydra.job.name=/tmp/x"], 'hydra.job.name: "/tmp/x"; names the log file'),
    (["run_name='../x\ny'", "hydra.job.name=${run_name}"], 'hydra.job.name: "../x\\ny"; names the log file'),
]


@pytest.mark.parametrize(("arguments", "fragment"), ESCAPING, ids=[" ".join(arguments) for arguments, _ in ESCAPING])
def test_a_name_that_leaves_its_folder_is_refused(arguments, fragment):
    with pytest.raises(ConfigError) as caught:
        check_arguments(arguments)
    message = explain(caught.value)
    assert fragment in message and "\n" not in message


def test_it_is_refused_before_anything_is_made(tmp_path):
    (tmp_path / "a" / "b").mkdir(parents=True)
    before = paths_in(tmp_path)
    for arguments in (
        ["-m", "hydra.sweep.subdir=../../x"],
        ["hydra.job.name=../../x"],
        ["hydra.output_subdir=../../x"],
    ):
        done = subprocess.run(
            [sys.executable, str(MAIN), *arguments], cwd=tmp_path / "a" / "b", capture_output=True, text=True
        )
        assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1), done.stderr
    assert paths_in(tmp_path) == before


@pytest.mark.parametrize(
    "arguments",
    [["run_name=../../x"], ["hydra.sweep.subdir=${pruning.name}/${seed}"], ["hydra.sweep.subdir=a..b/..c${seed}"],
     ["hydra.output_subdir=null"], ["hydra.output_subdir=.other/hydra"], ["hydra.job.name=..x"]],
    ids=" ".join,
)  # fmt: skip
def test_runs_of_a_sweep_are_planned_below_it(arguments, tmp_path):
    plan = check_arguments(["-m", "seed=1,2", f"hydra.sweep.dir={tmp_path}/sweep", *arguments])
    assert len(plan.runs) == 2
    for run in plan.runs:
        assert Path(os.path.normpath(run.path)).is_relative_to(tmp_path / "sweep") and run.path != tmp_path / "sweep"


def test_what_is_checked_is_where_hydra_goes(tmp_path):
    """A subdir that Hydra makes of the command line: the runs, which fail at once, are where they were planned."""
    given = ["-m", "seed=1,2", "dataset=digits", "model.skip_first_layers=99", f"hydra.sweep.dir={tmp_path}/sweep",
             "hydra.sweep.subdir=x/${hydra.job.override_dirname}", "selected_classes=[0,1]", "cache_dir=cache",
             "device=cuda:9"]  # fmt: skip
    planned = {run.path for run in check_arguments(given).runs}
    done = subprocess.run([sys.executable, str(MAIN), *given], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1
    assert {path.parent for path in tmp_path.rglob(".hydra")} == planned and len(planned) == 2
    assert {path.parent for path in tmp_path.rglob("status.json")} == planned


# No download that is not what it should be


@pytest.fixture
def server(tmp_path, monkeypatch) -> Iterator[Path]:
    """The folder of a web server on this machine to which every address of torchvision's datasets leads."""
    folder = tmp_path / "served"
    folder.mkdir()

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), lambda *a: Quiet(*a, directory=str(folder))) as running:
        thread = threading.Thread(target=running.serve_forever, daemon=True)
        thread.start()
        address = f"http://127.0.0.1:{running.server_port}"
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        monkeypatch.setattr(  # as if the real server sent us on
            datasets.utils, "_get_redirect_url", lambda url, max_hops: f"{address}/{url.rpartition('/')[2]}"
        )
        (folder / "address").write_text(address)
        yield folder
        running.shutdown()
        thread.join()


def packed(archive: Path, root: Path) -> None:
    """All below `root`, as its provider packs it."""
    if archive.suffix == ".zip":
        with zipfile.ZipFile(archive, "w") as file:
            for path in sorted(root.rglob("*")):
                file.write(path, path.relative_to(root))
    else:
        with tarfile.open(archive, "w:gz") as file:
            for path in root.iterdir():
                file.add(path, path.name)


def serve_cifar10(folder: Path, root: Path) -> None:
    packed(folder / "cifar-10-python.tar.gz", write_cifar10(root))


def serve_fashion_mnist(folder: Path, root: Path) -> None:
    for path in (write_fashion_mnist(root, gzipped=True) / "FashionMNIST" / "raw").iterdir():
        shutil.copy(path, folder)


def serve_gtsrb(folder: Path, root: Path) -> None:
    base = write_gtsrb(root, tracks_per_class=1, frames_per_track=1, test_images_per_class=1) / "gtsrb"
    for name in ("GTSRB-Training_fixed", "GTSRB_Final_Test_Images", "GTSRB_Final_Test_GT"):
        packed(folder / f"{name}.zip", base)


def serve_imagenette(folder: Path, root: Path) -> None:
    packed(folder / "imagenette2-320.tgz", write_image_folder(root / "imagenette2-320", IMAGENETTE_WNIDS, 1).parent)


SERVE = {"cifar10": serve_cifar10, "fashion_mnist": serve_fashion_mnist, "gtsrb": serve_gtsrb,
         "imagenette": serve_imagenette}  # fmt: skip


@pytest.mark.parametrize("name", SERVE)
def test_a_dataset_that_is_not_the_published_one_is_not_kept(name, server, tmp_path):
    """What the server has is whole and in the right format; only its checksum is not the published one."""
    SERVE[name](server, tmp_path / "made")
    root = tmp_path / "new" / "data"
    with pytest.raises(BenchmarkError, match=f"dataset.download: {name} could not be fetched .*corrupted") as caught:
        download(name, root)
    assert "\n" not in str(caught.value)
    assert list(root.iterdir()) == []


@pytest.mark.parametrize("name", SERVE)
def test_it_is_the_checksum_that_refuses_it(name, server, tmp_path, monkeypatch):
    """The same files, were it not for the checksum."""
    SERVE[name](server, tmp_path / "made")
    monkeypatch.setattr(datasets.utils, "check_md5", lambda *_, **__: True)
    root = tmp_path / "new" / "data"
    download(name, root)
    assert list(root.iterdir()) != []


@pytest.fixture
def torchs_server(server, tmp_path, monkeypatch):
    """Where ResNet18's weights are fetched from; it has others."""
    weights = ARCHITECTURES["resnet18"].weights
    name = weights.url.rpartition("/")[2]
    torch.save(get_model("resnet18", 1000).state_dict(), server / name)
    monkeypatch.setattr(weights.value, "url", f"{(server / 'address').read_text()}/{name}")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    return server / name


def test_weights_that_are_not_the_published_ones_are_not_kept(torchs_server, tmp_path):
    with pytest.raises(BenchmarkError, match="could not be fetched .*invalid hash value") as caught:
        get_model("resnet18", 1000, use_pretrained_model=True)
    assert "\n" not in str(caught.value)
    assert not [path for path in (tmp_path / "torch").rglob("*") if path.is_file()]


def test_weights_that_were_changed_after_they_were_fetched_are_not_used(torchs_server, tmp_path):
    """torch.hub takes a file that is there as it is."""
    place = tmp_path / "torch" / "hub" / "checkpoints" / torchs_server.name
    place.parent.mkdir(parents=True)
    shutil.copy(torchs_server, place)
    with pytest.raises(
        BenchmarkError, match=f"{place} is damaged .its sha256 begins with [0-9a-f]{{8}}, not with f37072fd"
    ):
        get_model("resnet18", 1000, use_pretrained_model=True)


def test_every_architecture_has_a_checksum_in_its_address():
    """Without it torch.hub would check nothing."""
    for name, facts in ARCHITECTURES.items():
        assert torch.hub.HASH_REGEX.search(facts.weights.url.rpartition("/")[2])[1].isalnum(), name
