"""Failures at a terminal: each is one line and status 2, and no file is lost or half written."""

import contextlib
import io
import os
import resource
import stat
import sys
import threading
import zipfile
from pathlib import Path

import pytest
import torch

from relu_mlp import cli
from relu_mlp.cli import files, info, train_output
from relu_mlp.cli.bench import report, suite
from relu_mlp.cli.checkpoint import Checkpoint
from relu_mlp.cli.seal import check_seal, sealed

pandas = pytest.importorskip("pandas")

ROWS = "".join(f"{n},{n * n % 7},{n * 0.5}\n" for n in range(50))
TRAIN = "train --data t.csv --target y --hidden 4 --epochs 1"


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        train_output, "draw", lambda checkpoint, path: files.write(path, b"a picture")
    )
    Path("t.csv").write_text("a,b,y\n" + ROWS)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """The bytes of the checkpoints of a regression and of a classification, trained once."""
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(train_output, "draw", lambda checkpoint, path: None)
        Path("t.csv").write_text("a,b,y\n" + ROWS)
        assert cli.main(TRAIN.split()) == 0
        assert cli.main([*TRAIN.split(), *["--task", "classification", "--out", "classes"]]) == 0
        assert cli.main([*TRAIN.split(), *["--dtype", "bfloat16", "--out", "half"]]) == 0
    return {name: (folder / name / "model.pt").read_bytes() for name in ("run", "classes", "half")}


@pytest.fixture
def trained(checkpoints):
    Path("run").mkdir()
    Path("run/model.pt").write_bytes(checkpoints["run"])
    return torch.load("run/model.pt", weights_only=True)


def problem(capsys, words):
    """The single line of an error."""
    capsys.readouterr()
    with contextlib.suppress(SystemExit):
        assert cli.main(words.split()) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


# -- A checkpoint ----------------------------------------------------------------


def with_settings(**changed):
    return lambda saved: {"settings": {**saved["settings"], **changed}}


def with_optimizer(change):
    def changed(saved):
        state = {n: dict(entry) for n, entry in saved["optimizer"]["state"].items()}
        change(state)
        return {"optimizer": {**saved["optimizer"], "state": state}}

    return changed


WRONG = {
    "settings": [
        with_settings(dtype="nope"),
        with_settings(dtype="load"),
        with_settings(dtype=["float32"]),
        with_settings(seed="x"),
        with_settings(seed=2**64),
        with_settings(seed=True),
        with_settings(hidden=[-1]),
        with_settings(hidden=[4.0]),
        with_settings(hidden=4),
        with_settings(optimizer="lbfgs"),
        with_settings(validation=2.0),
        with_settings(validation="x"),
        with_settings(epochs=0),
        with_settings(batch_size=-1),
        with_settings(batch_size=None),
        with_settings(lr=float("nan")),
        with_settings(weight_decay=[1]),
        with_settings(patience=-1),
        with_settings(last=1),
    ],
    "model": [
        with_settings(hidden=[5]),
        with_settings(hidden=[4, 4]),
        with_settings(hidden=[2**31 - 1]),
        with_settings(dtype="float64"),
        lambda saved: {"model": {1: torch.ones(1)}},
        lambda saved: {"model": None},
        lambda saved: {"model": {**saved["model"], "more": torch.ones(1)}},
        lambda saved: {"model": {**saved["model"], "0.bias": None}},
        lambda saved: {"model": {**saved["model"], "0.bias": torch.full((4,), torch.nan)}},
        lambda saved: {"model": {**saved["model"], "0.bias": torch.ones(4).to_sparse()}},
        lambda saved: {"model": {**saved["model"], "0.bias": torch.ones(1).expand(4)}},
        lambda saved: {"model": {**saved["model"], "0.bias": torch.ones(4, device="meta")}},
        lambda saved: {"features": ["a"]},
        lambda saved: {"features": ["a", "b", "c"]},
        lambda saved: {"categories": {"a": ["x", "z"]}},
        lambda saved: {"indicators": ["b"]},
    ],
    "features": [
        lambda saved: {"features": None},
        lambda saved: {"features": []},
        lambda saved: {"features": ["a", "a"]},
        lambda saved: {"features": ["a", 1]},
        lambda saved: {"features": "ab"},
    ],
    "targets": [lambda saved: {"targets": []}, lambda saved: {"targets": [["y"]]}],
    "classes": [
        lambda saved: {"classes": []},
        lambda saved: {"classes": "ab"},
        lambda saved: {"classes": ["a", 1]},
        lambda saved: {"classes": [["a"]]},
        lambda saved: {"targets": ["y", "z"], "classes": ["a"]},
    ],
    "categories": [
        lambda saved: {"categories": None},
        lambda saved: {"categories": {"c": ["x"]}},
        lambda saved: {"categories": {1: ["x"]}},
        lambda saved: {"categories": {"a": "x"}},
        lambda saved: {"categories": {"a": ["x", "x"]}},
        lambda saved: {"categories": {"a": ["x", 1]}},
    ],
    "indicators": [
        lambda saved: {"indicators": None},
        lambda saved: {"indicators": ["c"]},
        lambda saved: {"indicators": ["a", "a"]},
        lambda saved: {"indicators": [["a"]]},
    ],
    "last_model": [
        lambda saved: {"last_model": None},
        lambda saved: {"last_model": {**saved["model"], "0.bias": torch.ones(3)}},
    ],
    "feature_mean": [
        lambda saved: {"feature_mean": None},
        lambda saved: {"feature_mean": torch.zeros(7, dtype=torch.float64)},
        lambda saved: {"feature_mean": torch.zeros(2)},
        lambda saved: {"feature_mean": torch.tensor([0, torch.inf], dtype=torch.float64)},
    ],
    "feature_scale": [
        lambda saved: {"feature_scale": torch.zeros(2, dtype=torch.float64)},
        lambda saved: {"feature_scale": -torch.ones(2, dtype=torch.float64)},
        lambda saved: {"feature_scale": 1.0},
    ],
    "target_mean": [
        lambda saved: {"target_mean": None},
        lambda saved: {"target_mean": torch.zeros(2, dtype=torch.float64)},
    ],
    "target_scale": [
        lambda saved: {"target_scale": None},
        lambda saved: {"target_scale": torch.zeros(1, dtype=torch.float64)},
    ],
    "rows": [lambda saved: {"rows": "50"}, lambda saved: {"rows": -1}],
    "table": [lambda saved: {"table": None}],
    "epoch": [lambda saved: {"epoch": 0}, lambda saved: {"epoch": 1.0}],
    "best_epoch": [
        lambda saved: {"best_epoch": 0},
        lambda saved: {"best_epoch": 2},
        lambda saved: {"best_epoch": None},
    ],
    "history": [
        lambda saved: {"history": "abc"},
        lambda saved: {"history": []},
        lambda saved: {"history": saved["history"] * 2},
        lambda saved: {"history": [{}]},
        lambda saved: {"history": [{**saved["history"][0], "epoch": 2}]},
        lambda saved: {"history": [{**saved["history"][0], "train_loss": float("nan")}]},
        lambda saved: {"history": [{**saved["history"][0], "train_r2": "good"}]},
    ],
    "optimizer": [
        lambda saved: {"optimizer": {}},
        lambda saved: {"optimizer": None},
        lambda saved: {"optimizer": {**saved["optimizer"], "state": {}}},
        with_optimizer(lambda state: state.pop(0)),
        with_optimizer(lambda state: state.update({9: state[0]})),
        with_optimizer(lambda state: state[0].pop("exp_avg")),
        with_optimizer(lambda state: state[0].update(exp_avg=torch.ones(3))),
        with_optimizer(lambda state: state[0].update(exp_avg_sq=None)),
        with_optimizer(lambda state: state[0].update(step=torch.tensor(torch.nan))),
        with_settings(optimizer="sgd"),
    ],
    "master_weights": [
        lambda saved: {"master_weights": None},
        lambda saved: {"master_weights": torch.ones(1)},
    ],
    "generator": [
        lambda saved: {"generator": None},
        lambda saved: {"generator": torch.zeros(3, dtype=torch.uint8)},
        lambda saved: {"generator": saved["generator"].float()},
    ],
}

COMMANDS = ("predict --data t.csv", "train --data t.csv --resume --epochs 3")


@pytest.mark.parametrize("field", WRONG)
@pytest.mark.parametrize("command", COMMANDS)
def test_refuses_a_wrong_field(field, command, trained, capsys):
    for change in WRONG[field]:
        torch.save({**trained, **change(trained)}, "run/model.pt")
        before = Path("run/model.pt").read_bytes()
        line = problem(capsys, command)
        if field == "model":
            assert line.endswith(
                "run/model.pt: expected parameters of the network that it describes, got another's"
            )
        else:
            assert line.endswith(f"got one whose {field!r} can't be used")
        assert Path("run/model.pt").read_bytes() == before
    assert not Path("predictions.csv").exists()


def test_refuses_wrong_master_weights(checkpoints, capsys):
    saved = torch.load(io.BytesIO(checkpoints["half"]), weights_only=True)
    weights = saved["master_weights"]
    Path("run").mkdir()
    for wrong in ([], weights[1:], [torch.ones(1)] * 4, [w.double() for w in weights]):
        torch.save({**saved, "master_weights": wrong}, "run/model.pt")
        line = problem(capsys, COMMANDS[1])
        assert line.endswith("got one whose 'master_weights' can't be used")


@pytest.mark.parametrize("kind", ["run", "classes", "half"])
@pytest.mark.parametrize("seal", [True, False])
def test_takes_what_was_saved(kind, seal, checkpoints, capsys):
    """Also without its own checksum, as earlier versions saved it."""
    Path("run").mkdir()
    if seal:
        Path("run/model.pt").write_bytes(checkpoints[kind])
    else:
        torch.save(
            torch.load(io.BytesIO(checkpoints[kind]), weights_only=True), Path("run/model.pt")
        )
    for command in COMMANDS:
        assert cli.main(command.split()) == 0
    assert torch.load("run/model.pt", weights_only=True)["epoch"] == 3


def format_1(saved):
    """A checkpoint as versions up to 0.2 wrote it."""
    new = {"categories", "indicators", "best_epoch", "last_model"}
    settings = {k: v for k, v in saved["settings"].items() if k not in ("last", "patience")}
    old = {name: value for name, value in saved.items() if name not in new}
    return {**old, "format": 1, "settings": settings}


@pytest.mark.parametrize("kind", ["run", "classes", "half"])
def test_takes_what_an_earlier_version_saved(kind, checkpoints, capsys):
    saved = torch.load(io.BytesIO(checkpoints[kind]), weights_only=True)
    Path("run").mkdir()
    torch.save(format_1(saved), "run/model.pt")
    for command in (*COMMANDS, f"{COMMANDS[0]} --force"):
        assert cli.main(command.split()) == 0
    now = torch.load("run/model.pt", weights_only=True)
    assert (now["epoch"], now["format"]) == (3, 2)
    for name, parameter in now["model"].items():  # it goes on keeping the last
        assert torch.equal(parameter, now["last_model"][name])


def test_a_flipped_bit_is_seen(checkpoints):
    data, path = checkpoints["run"], Path("model.pt")
    places = [*range(0, len(data), 37), *range(len(data) - 160, len(data))]
    for place in places:
        damaged = bytearray(data)
        damaged[place] ^= 1 << place % 8
        path.write_bytes(damaged)
        with pytest.raises(cli.Problem, match=r"model\.pt: expected a checkpoint of relu-mlp"):
            Checkpoint.load(path)


def test_a_flipped_bit_of_a_value_is_seen_without_a_seal(checkpoints):
    saved = torch.load(io.BytesIO(checkpoints["run"]), weights_only=True)
    buffer = io.BytesIO()
    torch.save(saved, buffer)
    data, found = buffer.getvalue(), 0
    for tensor in saved["model"].values():
        place = data.index(tensor.numpy().tobytes())
        damaged = bytearray(data)
        damaged[place] ^= 1
        torch.load(io.BytesIO(damaged), weights_only=True)  # says nothing
        Path("model.pt").write_bytes(damaged)
        with pytest.raises(cli.Problem, match="a damaged one: its checksums are not"):
            Checkpoint.load(Path("model.pt"))
        found += 1
    assert found == 4


@pytest.mark.parametrize("size", [0, 1, 4, 1000, -1, -80, -81, -102, -103])
def test_a_file_cut_short_is_refused(size, checkpoints):
    Path("model.pt").write_bytes(checkpoints["run"][:size])
    with pytest.raises(cli.Problem, match="expected a checkpoint of relu-mlp train, got"):
        Checkpoint.load(Path("model.pt"))


def test_a_compressed_file_is_not_unpacked():
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(10**7))
    Path("model.pt").write_bytes(buffer.getvalue())
    with pytest.raises(cli.Problem, match="a damaged one: its records are larger than the file"):
        Checkpoint.load(Path("model.pt"))


def test_other_readers_accept_the_seal():
    buffer = io.BytesIO()
    torch.save({"a": torch.ones(3)}, buffer)
    data = sealed(buffer.getvalue())
    check_seal(data)
    assert torch.load(io.BytesIO(data), weights_only=True)["a"].tolist() == [1, 1, 1]


def test_a_pickle_runs_nothing(trained, capsys):
    class Bomb:
        def __reduce__(self):
            return os.system, ("touch exploded",)

    torch.save({**trained, "table": Bomb()}, "run/model.pt")
    assert "got another kind of file" in problem(capsys, "predict --data t.csv")
    assert not Path("exploded").exists()


# -- Files that are written ------------------------------------------------------


@contextlib.contextmanager
def full_disk(size):
    """Limits the size of every file to this many bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("size, wanting", [(0, "run/model.pt"), (4000, "run/model.pt")])
def test_a_full_disk(size, wanting, capsys):
    with full_disk(size):
        line = problem(capsys, TRAIN)
    assert line == f"relu-mlp train: error: {wanting} can't be written: File too large"
    assert os.listdir("run") == []


def test_a_full_disk_keeps_what_was_there(trained, capsys):
    before = Path("run/model.pt").read_bytes()
    with full_disk(4000):
        problem(capsys, "train --data t.csv --resume --epochs 2")
    assert os.listdir("run") == ["model.pt"] and Path("run/model.pt").read_bytes() == before
    with full_disk(10):
        line = problem(capsys, "predict --data t.csv")
    assert line == "relu-mlp predict: error: predictions.csv can't be written: File too large"
    assert not Path("predictions.csv").exists()


def test_a_picture_that_cannot_be_written_is_a_failure(monkeypatch, capsys):
    Path("run/curves.png").mkdir(parents=True)
    line = problem(capsys, f"{TRAIN} --force")
    assert line == "relu-mlp train: error: run/curves.png can't be written: Is a directory"
    assert Checkpoint.load(Path("run/model.pt")).epoch == 1  # the training is not lost


def test_two_runs_into_one_file(monkeypatch):
    """One run writes the whole file while the other is about to rename its own."""
    path, fsync, nested = Path("model.pt"), os.fsync, []

    def fsync_while_another_writes(descriptor):
        if not nested:
            nested.append(path)
            files.write(path, b"theirs" * 1000)
            assert path.read_bytes() == b"theirs" * 1000
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", fsync_while_another_writes)
    files.write(path, b"mine")
    assert path.read_bytes() == b"mine"
    assert sorted(os.listdir()) == ["model.pt", "t.csv"]


def test_is_on_the_disk_before_it_has_its_name(monkeypatch):
    calls, fsync, replace = [], os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda at: (calls.append("fsync"), fsync(at)))
    monkeypatch.setattr(os, "replace", lambda *names: (calls.append("rename"), replace(*names)))
    files.write(Path("file"), b"data")
    assert calls == ["fsync", "rename", "fsync"]  # of the file, and of its folder


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_leaves_nothing_behind(error, monkeypatch):
    def fsync(descriptor):
        raise error

    Path("file").write_bytes(b"old")
    monkeypatch.setattr(os, "fsync", fsync)
    expected = cli.Problem if isinstance(error, OSError) else KeyboardInterrupt
    with pytest.raises(expected):
        files.write(Path("file"), b"new")
    assert sorted(os.listdir()) == ["file", "t.csv"] and Path("file").read_bytes() == b"old"


@pytest.mark.parametrize("out", ["/dev/null", "link"])
def test_a_device_stays_a_device(out, trained, capsys):
    Path("link").symlink_to("/dev/null")
    assert cli.main(f"predict --data t.csv --out {out}".split()) == 0
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode) and Path("link").is_symlink()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="has no such device")
def test_a_full_device(trained, capsys):
    line = problem(capsys, "predict --data t.csv --out /dev/full")
    assert line == "relu-mlp predict: error: /dev/full can't be written: No space left on device"
    assert stat.S_ISCHR(os.stat("/dev/full").st_mode)


def test_pipes(trained, capsys):
    for name in ("in", "out"):
        os.mkfifo(name)
    read = []
    ends = [
        threading.Thread(target=lambda: Path("in").write_bytes(Path("t.csv").read_bytes())),
        threading.Thread(target=lambda: read.append(Path("out").read_text())),
    ]
    for end in ends:
        end.start()
    assert cli.main(["predict", "--data", "in", "--out", "out"]) == 0
    for end in ends:
        end.join()
    assert read[0].startswith("predicted_y\n") and len(read[0].splitlines()) == 51


def test_a_link_stays_a_link(trained, capsys):
    Path("elsewhere").mkdir()
    Path("predictions.csv").symlink_to("elsewhere/real.csv")
    assert cli.main(["predict", "--data", "t.csv"]) == 0
    assert Path("predictions.csv").is_symlink()
    assert Path("elsewhere/real.csv").read_text().startswith("predicted_y\n")


def test_the_mode_of_a_file_stays():
    Path("file").write_bytes(b"old")
    Path("file").chmod(0o640)
    files.write(Path("file"), b"new")
    assert stat.S_IMODE(Path("file").stat().st_mode) == 0o640
    umask = os.umask(0o027)
    try:
        files.write(Path("another"), b"new")
    finally:
        os.umask(umask)
    assert stat.S_IMODE(Path("another").stat().st_mode) == 0o640


def test_a_file_that_may_not_be_written_stays(monkeypatch):
    Path("file").write_bytes(b"old")
    # Not a matter of its mode, because the superuser may write everywhere.
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(cli.Problem, match="file can't be written: Permission denied"):
        files.write(Path("file"), b"new")
    assert Path("file").read_bytes() == b"old"


@pytest.mark.parametrize(
    "out, expected",
    [
        ("run", "run can't be written: Is a directory"),
        ("loop", "loop can't be written: Too many levels of symbolic links"),
        ("x" * 300, "can't be written: File name too long"),
        ("t.csv/x", "t.csv/x can't be written: Not a directory"),
        ("no/x", "no/x can't be written: No such file or directory"),
    ],
)
@pytest.mark.parametrize("force", ["", " --force"])
def test_an_invalid_output_path(out, expected, force, trained, capsys):
    Path("loop").symlink_to("loop")
    assert expected in problem(capsys, f"predict --data t.csv --out {out}{force}")


def test_a_long_output_name_is_valid(trained):
    assert cli.main(["predict", "--data", "t.csv", "--out", "x" * 255]) == 0


def test_bench_writes_whole_files(monkeypatch):
    row = report.MemoryRow(4096, 1, "eager", 1.5)
    suite.keep(Path(), "memory.csv", [row])
    before = Path("memory.csv").read_bytes()
    with full_disk(20), pytest.raises(cli.Problem, match=r"memory\.csv can't be written"):
        suite.keep(Path(), "memory.csv", [row] * 9)
    assert Path("memory.csv").read_bytes() == before
    for unreadable in (b"\xff{", b"[1]", b""):
        Path("suite.json").write_bytes(unreadable)
        suite.keep(Path(), "memory.csv", [row])  # fifteen minutes of results are not lost
        assert b'"memory.csv"' in Path("suite.json").read_bytes()


# -- Files that are read ---------------------------------------------------------


@pytest.mark.parametrize("device", ["/dev/zero", "/dev/random"])
@pytest.mark.parametrize("flag", ["--data", "--model"])
def test_a_device_without_an_end_is_not_read(device, flag, trained, capsys):
    line = problem(capsys, f"predict --data t.csv {flag} {device}")
    assert line == f"relu-mlp predict: error: {device} can't be read: it is a device"


@pytest.mark.parametrize(
    "table",
    [
        b"",
        b"\n\n",
        b'""',
        b'""\n1\n',
        b'a\nx\n""\n',
        b"\r,a\n1,2\n",
        b"\0",
        b"a,y\n1,\0\n2,3\n",
        b"\xff\xfea\0,\0y\0",
        b"\x89PNG\r\n\x1a\n",
        b"a,y\n1,2,3\n1\n",
        b'a,y\n"1,2\n',
        b"a,y\n" + b"9" * 5000 + b",1\n",
        b"a,y\n1," + b"9" * 30 + b"x\n",
    ],
)
def test_a_table_that_is_none(table, capsys):
    Path("t.csv").write_bytes(table)
    assert cli.main(["train", "--data", "t.csv", "--target", "y", "--epochs", "1"]) == 2
    line = capsys.readouterr().err.splitlines()[-1]  # below the notes about columns
    assert "RELU_MLP_TRACEBACK" not in line and line.startswith("relu-mlp train: error: t.csv")
    assert not Path("run").exists()


def test_whole_numbers_of_any_size(capsys):
    rows = [f"{n},{10**40 + n % 3}" for n in range(9)]
    Path("t.csv").write_text("\n".join(["a,y", *rows]))
    assert cli.main(TRAIN.split()) == 0
    assert cli.main(["predict", "--data", "t.csv"]) == 0


# -- The terminal ----------------------------------------------------------------


def stream(descriptor, encoding="utf-8"):
    return io.TextIOWrapper(os.fdopen(descriptor, "wb"), encoding=encoding)


def test_a_terminal_without_a_character(monkeypatch):
    rows = [f"{n},{'groß' if n % 2 else 'klein'}" for n in range(20)]
    Path("t.csv").write_text("\n".join(["a,size", *rows]), encoding="utf-8")
    out = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
    assert cli.main(["train", "--data", "t.csv", "--target", "size", "--epochs", "1"]) == 0
    assert sys.stdout is out
    out.flush()
    assert b"Classes: 2: gro\\xdf, klein" in out.buffer.getvalue()
    assert Path("run/model.pt").exists()
    print("\N{MICRO SIGN}", file=(shown := cli.terminal.Output(out)))
    shown.flush()
    assert out.buffer.getvalue().endswith(b"\\xb5\n")


def test_a_name_that_is_no_text(trained, monkeypatch):
    """A file name with bytes that are not UTF-8 is a str with surrogates."""
    out = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
    monkeypatch.setattr(sys, "stdout", out)
    assert cli.main(["predict", "--data", "t.csv", "--out", os.fsdecode(b"\xff.csv")]) == 0
    out.flush()
    assert b"Wrote \\udcff.csv" in out.buffer.getvalue()


def test_a_reader_that_has_seen_enough(monkeypatch, capsys):
    """As in `relu-mlp train | head -1`: the training goes on."""
    read, write = os.pipe()
    os.close(read)
    with stream(write) as out:
        monkeypatch.setattr(sys, "stdout", out)
        assert cli.main(TRAIN.split()) == 0
        out.flush()  # as when the process ends
    assert Checkpoint.load(Path("run/model.pt")).epoch == 1
    assert not capsys.readouterr().err


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="has no such device")
@pytest.mark.parametrize("words", ["info", "--help", "train --help", TRAIN])
def test_output_into_a_full_disk(words, monkeypatch, capsys):
    with stream(os.open("/dev/full", os.O_WRONLY)) as out:
        monkeypatch.setattr(sys, "stdout", out)
        assert cli.main(words.split()) == 2
        out.flush()
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith("error: the standard output: No space left on device")
    assert Path("run/model.pt").exists() == (words == TRAIN)


@pytest.mark.parametrize("closed", ["stdout", "stderr"])
def test_a_closed_stream(closed, monkeypatch, capsys):
    monkeypatch.setattr(sys, closed, None)
    assert cli.main(TRAIN.split()) == 0
    assert cli.main(TRAIN.split()) == 2
    assert getattr(sys, closed) is None


# -- All commands ----------------------------------------------------------------


@pytest.mark.parametrize(
    "words, expected",
    [
        ("", f"relu-mlp: error: expected a command, one of {', '.join(cli.COMMANDS)}"),
        ("trian", "relu-mlp: error: argument COMMAND: invalid choice: 'trian' (choose from "),
        ("info --nonsense", "relu-mlp: error: unrecognized arguments: --nonsense"),
        ("train", "relu-mlp train: error: the following arguments are required: --data"),
        ("check --rows 99999999999999999999", "relu-mlp check: error: argument --rows: expected"),
        ("check --seed 1e9", "relu-mlp check: error: argument --seed: expected an integer"),
        (f"check --seed {2**63}", "relu-mlp check: error: argument --seed: expected an integer"),
        ("bench --threads 9999999", "relu-mlp bench: error: argument --threads: expected at most"),
        (f"bench --rounds {10**30}", "relu-mlp bench: error: argument --rounds: expected an"),
        (f"{TRAIN} --batch-size {10**30}", "relu-mlp train: error: argument --batch-size: expec"),
    ],
)
def test_a_usage_error_is_one_line(words, expected, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(words.split())
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(expected)
    program = expected.split(": error")[0]
    assert line.endswith(f"; usage: {program} --help")


@pytest.mark.parametrize(
    "error, expected",
    [
        (KeyError("x"), "KeyError: 'x' (RELU_MLP_TRACEBACK=1 shows where)"),
        (RuntimeError("one\ntwo"), "RuntimeError: one (RELU_MLP_TRACEBACK=1 shows where)"),
        (
            RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"),
            "there is not enough memory for this",
        ),
        (MemoryError(), "there is not enough memory for this"),
        (OSError(5, "Input/output error", "a file"), "a file: Input/output error"),
        (cli.Problem("a\nb"), "a b"),
    ],
)
def test_whatever_goes_wrong_is_one_line(error, expected, monkeypatch, capsys):
    def fail():
        raise error

    monkeypatch.setattr(info, "build_info", fail)
    monkeypatch.setattr(info, "checked_build_info", fail)
    assert problem(capsys, "info") == f"relu-mlp info: error: {expected}"


def test_a_traceback_can_be_asked_for(monkeypatch):
    monkeypatch.setattr(info, "checked_build_info", lambda: {}["x"])
    monkeypatch.setenv("RELU_MLP_TRACEBACK", "1")
    with pytest.raises(KeyError):
        cli.main(["info"])


def test_more_memory_than_there_is(capsys):
    # 2^31 - 1 units would be 17 GB and more; the limit makes sure that no machine has them.
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (16 * 2**30, before[1]))
    try:
        line = problem(capsys, f"{TRAIN} --hidden {2**31 - 1}")
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
    assert line == "relu-mlp train: error: there is not enough memory for this"


def test_without_docstrings(monkeypatch, capsys):
    """`python -OO` removes docstrings."""
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] == "relu_mlp":
            monkeypatch.setattr(module, "__doc__", None)
    for name in cli.COMMANDS:
        with pytest.raises(SystemExit) as stop:
            cli.main([name, "--help"])
        assert stop.value.code == 0
    assert "Train a network on a CSV table" in capsys.readouterr().out
