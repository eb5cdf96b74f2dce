"""One configuration for Python, YAML and the command line."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import os
import pwd
import pydoc
import subprocess
import sys
import threading
from itertools import pairwise
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from runs import environment

from fastdml.data import dataset_names
from fastdml.errors import InputError
from fastdml.paths import expand, expanded
from fastdml.train import ReidConfig, TrainConfig
from fastdml.train.checkpoint import FREE_ON_RESUME, check_resumable
from fastdml.train.config.fields import documented, field_texts
from fastdml.train.config.sources import (
    from_command_line,
    load_config,
    preset,
    resolve,
)
from fastdml.train.run_folder import numbered_folders, run_name

FIELDS = [field.name for field in dataclasses.fields(TrainConfig)]


def test_defaults_are_the_papers_settings_for_cifar100():
    c = TrainConfig()
    assert (c.data, c.peers, c.batch_size, c.epochs) == (
        "cifar100", ("resnet32", "resnet32"), 64, 200,
    )  # fmt: skip
    assert (c.optimizer, c.momentum, c.nesterov, c.lr, c.weight_decay) == (
        "sgd", 0.9, True, 0.1, 5e-4,
    )  # fmt: skip
    assert (c.schedule, c.lr_drop_every, c.lr_drop_factor, c.warmup_epochs) == ("step", 60, 0.1, 0)
    assert (c.pad, c.flip, c.temperature, c.ce_weight, c.kl_weight) == (4, True, 1, 1, 1)
    assert preset("cifar100") == c


def test_every_setting_has_a_help_text():
    for kind in (TrainConfig, ReidConfig):
        body = ast.parse(inspect.getsource(kind)).body[0].body
        documented = [
            a.target.id
            for a, b in pairwise(body)
            if isinstance(a, ast.AnnAssign) and isinstance(b, ast.Expr)
        ]
        own = [n for n, hint in kind.__annotations__.items() if not hint.startswith("ClassVar")]
        assert documented == own
        if kind is TrainConfig:
            assert own == FIELDS
    assert set(FIELDS) >= FREE_ON_RESUME


@pytest.mark.parametrize("kind", [TrainConfig, ReidConfig])
def test_help_reads_like_documentation(kind):
    """Every field that the class defines: type, default and, below them, what it means."""
    text = pydoc.plain(pydoc.render_doc(kind)).replace(" |  ", "")
    assert "\nThe settings of a " in text
    defaults = {field.name: field for field in dataclasses.fields(kind)}
    for found in field_texts(kind):
        field = defaults[found.name]
        line = f"{found.name}: {field.type} = {field.default!r}\n"
        assert line in text
        meaning = " ".join(text.partition(f"\n{line}")[2].split())
        assert meaning.startswith(found.text)
    for line in ("optimizer\n=========\n", "lr: float = ", "Learning rate at the start. Paper: "):
        assert line in text


def test_without_sources_the_settings_are_there(monkeypatch):
    def missing(kind):
        raise OSError("could not get source code")

    monkeypatch.setattr(inspect, "getsource", missing)

    @dataclasses.dataclass
    class Settings:
        """Of something."""

        a: int = 0

    assert documented(Settings)().a == 0
    assert Settings.__doc__ == "Of something."


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("epoch", "epochs"),
        ("learning_rate", "lr"),
        ("max-epochs", "epochs"),
        ("nonsense", None),
        ("batchsize", "batch_size"),
        ("kl-weigth", "kl_weight"),
    ],
)
def test_unknown_settings_are_refused_with_the_nearest(name, near, tmp_path):
    hint = rf"did you mean {near}\?$" if near else "the settings are data, root, "
    expected = f"unknown setting '{name}'.*{hint}"
    file = tmp_path / "c.yaml"
    file.write_text(f"{name}: 3\n")
    for attempt in (
        lambda: preset("digits", **{name: 3}),
        lambda: TrainConfig().replace(**{name: 3}),
        lambda: load_config(file),
        lambda: resolve("digits", {name: 3}),
    ):
        with pytest.raises(InputError, match=expected) as caught:
            attempt()
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("epochs", 0, "epochs must be 1 or more, not 0"),
        ("epochs", 2.5, "epochs must be a whole number, not 2.5"),
        ("epochs", True, "epochs must be a whole number, not True"),
        ("batch_size", "many", "batch_size must be a whole number, not 'many'"),
        ("lr", 0, "lr must be above 0, not 0.0"),
        ("lr", float("nan"), "lr must be a finite number, not nan"),
        ("lr", float("inf"), "lr must be a finite number, not inf"),
        ("lr", [0.1], r"lr must be a finite number, not \[0.1\]"),
        ("momentum", 1, "momentum must be at least 0 and below 1, not 1.0"),
        ("momentum", 0, "nesterov needs momentum above 0"),
        ("label_smoothing", 1.5, r"label_smoothing must be within 0\.\.1, not 1.5"),
        ("temperature", -1, "temperature must be above 0, not -1.0"),
        ("amp", "half", "amp must be one of auto, off, bf16, fp16, not 'half'"),
        ("update", None, "update must be one of simultaneous, sequential, not None"),
        ("peers", (), "peers is empty: name at least one model"),
        ("peers", "resnet32", "peers must be a list of names, not 'resnet32'"),
        ("peers", [32], "peers must be text, not 32"),
        ("flip", "no", "flip must be true or false, not 'no'"),
        ("flip", 1, "flip must be true or false, not 1"),
        ("root", 7, "root must be text, not 7"),
        ("seed", -1, "seed must be within 0"),
        ("warmup_epochs", 201, r"warmup_epochs \(201\) must not exceed epochs \(200\)"),
        ("iterations", 5, r"epochs \(200\) and iterations \(5\) both say how long: set one"),
        ("lr_drops", (5, 5), r"lr_drops must be rising numbers of epochs, not \[5, 5\]"),
        ("lr_drops", (0, 5), "lr_drops must be rising"),
        ("lr_drops", "40", "lr_drops must be a list of numbers, not '40'"),
        ("lr_drops", [2.5], "lr_drops must be a whole number, not 2.5"),
    ],
)
def test_wrong_values_are_one_line(name, value, message):
    with pytest.raises(InputError, match=message) as caught:
        TrainConfig(**{name: value})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("value", [3, "2", True, 2.0])
def test_choices_that_are_numbers(tmp_path, value):
    file = tmp_path / "c.yaml"
    file.write_text(f"data: market1501\nlast_stride: {value!r}\n")
    for attempt in (lambda: ReidConfig(last_stride=value), lambda: load_config(file)):
        with pytest.raises(InputError) as caught:
            attempt()
        assert str(caught.value) == f"last_stride must be one of 1, 2, not {value!r}"
    file.write_text("data: market1501\nlast_stride: 1\n")
    assert load_config(file).last_stride == 1


def test_weights_that_leave_nothing_to_learn():
    none, alone = {"ce_weight": 0, "kl_weight": 0}, {"ce_weight": 0, "independent": True}
    for kind, changes, message in (
        (TrainConfig, none, "ce_weight = kl_weight = 0: the peers would learn nothing"),
        (TrainConfig, alone, "ce_weight = 0: a peer by itself would learn nothing"),
        (TrainConfig, {"ce_weight": 0, "peers": ["resnet8"]}, "ce_weight = 0: a peer by itself"),
        (ReidConfig, none, "ce_weight = kl_weight = triplet_weight = .* = 0: the peers"),
        (ReidConfig, {**alone, "distance_mutual_weight": 1}, "= circle_weight = 0: a peer by"),
    ):
        with pytest.raises(InputError, match=message) as caught:
            kind(**changes)
        assert "\n" not in str(caught.value)
    assert TrainConfig(ce_weight=0).kl_weight == 1
    ReidConfig(**none, distance_mutual_weight=1)
    ReidConfig(**alone, triplet_weight=1, distance_mutual_weight=1).alone()


def test_values_are_taken_as_people_write_them():
    c = TrainConfig(epochs=3.0, lr="1e-3", root=Path("x"), peers=["a"], amp=False, subset="100")
    assert (c.epochs, c.lr, c.root, c.peers, c.amp, c.subset) == (3, 1e-3, "x", ("a",), "off", 100)
    assert isinstance(c.epochs, int)


@settings(deadline=None)
@given(
    lr=st.floats(1e-8, 1e3),
    epochs=st.integers(1, 10**6),
    seed=st.integers(0, 2**63 - 1),
    peers=st.lists(st.text(min_size=1), min_size=1),
    flip=st.booleans(),
    folder=st.none() | st.text().filter(lambda s: "\0" not in s),
)
def test_yaml_returns_what_was_written(tmp_path_factory, lr, epochs, seed, peers, flip, folder):
    c = TrainConfig(lr=lr, epochs=epochs, seed=seed, peers=peers, flip=flip, folder=folder)
    path = tmp_path_factory.mktemp("yaml") / "config.yaml"
    c.save(path)
    assert load_config(path) == c


def test_yaml_1_1_pitfalls(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("amp: off\nlr: 1e-2\npeers: [resnet20, resnet8]\ndata: digits\n")
    c = load_config(path)
    assert (c.amp, c.lr, c.peers) == ("off", 0.01, ("resnet20", "resnet8"))
    assert c.epochs == preset("digits").epochs  # the preset of the data set that the file names


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lr: [", "is not YAML"),
        ("- lr\n- 3\n", "must hold 'name: value' lines, not a list"),
        ("5", "must hold 'name: value' lines, not a single value"),
        ("!!python/object/apply:os.system ['touch hacked']", "must hold 'name: value' lines"),
        ("lr: !!python/object/apply:os.system ['touch hacked']", "the list for lr is no python/"),
    ],
)
def test_files_that_are_no_settings(tmp_path, monkeypatch, text, message):
    monkeypatch.chdir(tmp_path)
    Path("c.yaml").write_text(text)
    with pytest.raises(InputError, match=message) as caught:
        load_config("c.yaml")
    assert "\n" not in str(caught.value)
    assert not Path("hacked").exists()
    with pytest.raises(InputError, match=r"cannot read the settings none\.yaml: No such file"):
        load_config("none.yaml")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lr: 1\nepochs: 3\nlr: 2\n", "line 3: lr is set twice, first on line 1: leave one"),
        ("peers: [a]\n'peers': [b]\n", "line 2: peers is set twice, first on line 1"),
        ("data: digits\n? data\n: cifar10\n", "line 2: data is set twice"),
        ("a: &a {lr: 1}\n<<: *a\n", "line 1: a must be a single value or a list of them"),
        ("<<: {lr: 1}\n", "line 1: '<<' is not the name of a setting"),
        ("? [lr]\n: 3\n", "line 1: '.' is not the name of a setting"),
        ("lr: {value: 1}\n", "line 1: lr must be a single value or a list of them"),
        ("epochs: 3\nlr: 2001-99-99\n", "line 2: '2001-99-99' for lr is no timestamp: write a"),
        ("peers:\n- resnet8\n- 2001-13-01\n", "line 3: '2001-13-01' for peers is no timestamp"),
        ("lr: !!int ''\n", "line 1: '' for lr is no int"),
        ("lr: !!timestamp x\n", "line 1: 'x' for lr is no timestamp"),
        ("lr: !!binary é\n", "line 1: 'é' for lr is no binary"),
        ("2001-99-99: 1\n", "is not YAML: month must be in"),
        ("lr: \0\n", "is not YAML"),
        ("lr: " + 2000 * "[", "is not YAML: nested too deeply"),
        ("lr: " + 2000 * "{a: ", "is not YAML: nested too deeply"),
    ],
)
def test_yaml_that_means_no_settings(tmp_path, text, message):
    path = tmp_path / "c.yaml"
    path.write_text(text)
    for read in (
        lambda: load_config(path),
        lambda: from_command_line("digits", ["--config", path]),
    ):
        with pytest.raises(InputError, match=message) as caught:
            read()
        assert str(path) in str(caught.value)
        assert "\n" not in str(caught.value)
        assert len(str(caught.value)) < 400


@pytest.mark.parametrize("name", ["lr", "peers", "nonsense"])
def test_aliases_that_stand_for_more_than_memory_holds(tmp_path, name):
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{k}: &a{k} [{', '.join([f'*a{k - 1}'] * 9)}]" for k in range(1, 30)]
    path = tmp_path / "c.yaml"
    path.write_text("\n".join([*lines, f"{name}: *a29"]))
    with pytest.raises(InputError, match="line 2: a1 must be a single value or a list of them"):
        load_config(path)


def test_aliases_of_values_are_read(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("data: digits\nlr: &x 0.5\nmomentum: *x\npeers: &p [resnet8, resnet14]\n")
    c = load_config(path)
    assert (c.lr, c.momentum, c.peers) == (0.5, 0.5, ("resnet8", "resnet14"))


@pytest.mark.parametrize("kind", ["fifo", "descriptor", "stdin"])
def test_settings_from_a_pipe_are_read_once(tmp_path, kind):
    """As in --config <(echo 'epochs: 3'), which gives nothing a second time."""
    text = b"epochs: 30\nrecipe: strong\npeers: [resnet8]\n"
    if kind == "stdin":
        code = (
            "from fastdml.train import from_command_line\n"
            "c = from_command_line('market1501', ['--config', '/dev/stdin', '--lr', '1'])\n"
            "assert (c.epochs, c.neck, c.peers, c.lr) == (30, True, ('resnet8',), 1), c"
        )
        command = [sys.executable, "-c", code]
        subprocess.run(command, input=text, env=environment(), check=True, timeout=60)
        return
    if kind == "fifo":
        path = tmp_path / "pipe"
        os.mkfifo(path)
        writer = threading.Thread(target=path.write_bytes, args=(text,))
        writer.start()
    else:
        reader, end = os.pipe()
        os.write(end, text)
        os.close(end)
        path = f"/dev/fd/{reader}"
    c = from_command_line("market1501", [f"--config={path}", "--lr", "1"])
    assert (c.epochs, c.neck, c.peers, c.lr) == (30, True, ("resnet8",), 1)
    if kind == "fifo":
        writer.join()
    else:
        os.close(reader)


@pytest.mark.parametrize("path", ["/dev/zero", "big.yaml"])
def test_files_without_an_end_are_not_read_through(tmp_path, monkeypatch, path):
    monkeypatch.chdir(tmp_path)
    Path("big.yaml").write_text("# nothing\n" * 200_000)
    with pytest.raises(InputError, match=r"more than 1,048,576 bytes"):
        load_config(path)


@pytest.mark.parametrize("width", [1, 2, 3, 5, 8, 39])
def test_narrow_terminals(monkeypatch, capsys, width):
    """tyro never ends where a box has no place for a letter."""
    monkeypatch.setenv("COLUMNS", str(width))
    with pytest.raises(SystemExit) as stop:
        from_command_line("digits", ["--help"])
    assert stop.value.code == 0
    out = capsys.readouterr().out
    assert "--peers" in out
    assert len(out) < 60_000
    assert os.environ["COLUMNS"] == str(width)
    with pytest.raises(SystemExit):  # its frame around an error as well
        from_command_line("digits", ["--epochs", "many"])
    assert "many" in capsys.readouterr().err


def test_the_width_of_a_terminal_itself(monkeypatch, capsys):
    monkeypatch.delenv("COLUMNS", raising=False)
    monkeypatch.setattr(os, "get_terminal_size", lambda *_: os.terminal_size((2, 2)))
    with pytest.raises(SystemExit):
        from_command_line("digits", ["--help"])
    assert "--peers" in capsys.readouterr().out
    assert "COLUMNS" not in os.environ


def test_home_folders(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    home = os.path.expanduser("~root")
    for c in (
        TrainConfig(folder="~/x", root="~"),
        preset("digits").replace(folder=Path("~/x"), root="~"),
        from_command_line("digits", ["--folder=~/x", "--root=~"]),
    ):
        assert (c.folder, c.root) == (f"{tmp_path}/x", str(tmp_path))
    (tmp_path / "c.yaml").write_text("folder: ~root/x\nroot: x/~\n")
    for c in (load_config("~/c.yaml"), from_command_line("digits", ["--config=~/c.yaml"])):
        assert (c.folder, c.root) == (f"{home}/x", "x/~")
    for text in ("~nobody-of-this-name/x", "~\udc80", "", "x//y/"):
        assert expand(text) == text
    assert expanded(Path("~") / "x") == tmp_path / "x"


@pytest.mark.parametrize("name", ["a\0b", "~\0", "\ud800"])
def test_what_no_file_can_be_called(name):
    for make in (lambda: TrainConfig(folder=name), lambda: TrainConfig(root=name)):
        with pytest.raises(InputError, match=r"cannot be the name of a file here \(.*utf-8"):
            make()
    with pytest.raises(InputError, match="cannot be the name of a file"):
        load_config(name)


def test_an_account_without_a_home(monkeypatch):
    def unknown(uid: int) -> None:
        raise KeyError(uid)

    monkeypatch.delenv("HOME")
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    assert TrainConfig(folder="x").folder == "x"
    for name in ("folder", "root"):
        with pytest.raises(InputError, match=r"^~/x: this account has no home folder: write"):
            TrainConfig(**{name: "~/x"})


def test_the_settings_of_a_run_start_another(tmp_path):
    """They are its own but for the folder, which is taken; going on with the run keeps it."""
    run = tmp_path / "run"
    for folder in (run, run / "independent"):
        folder.mkdir()
        preset("digits", lr=0.3, folder=str(folder)).save(folder / "config.yaml")
        (folder / "metrics.jsonl").touch()
        path = str(folder / "config.yaml")
        c = from_command_line("digits", ["--config", path])
        assert (c.lr, c.folder, c.resume) == (0.3, None, False)
        c = from_command_line("digits", ["--config", path, "--folder", "other"])
        assert (c.lr, c.folder) == (0.3, "other")
        c = from_command_line("digits", ["--config", path, "--resume"])
        assert (c.lr, c.folder, c.resume) == (0.3, str(folder), True)
    run.rename(tmp_path / "moved")
    c = from_command_line("digits", ["--config", str(tmp_path / "moved" / "config.yaml")])
    assert (c.lr, c.folder) == (0.3, None)
    own = tmp_path / "own.yaml"  # says where another run goes, and is heard
    own.write_text("folder: there\n")
    assert from_command_line("digits", ["--config", str(own)]).folder == "there"


@pytest.mark.parametrize(
    "options",
    [
        ["--peers", "resnet8,resnet14", "--lr-drops", "3,5"],
        ["--peers=resnet8,resnet14", "--lr_drops=3,5"],
        ["--peers", "resnet8,", "resnet14", "--lr-drops", "3", ",5"],
        ["--lr-drops", "3", "5", "--peers", "resnet8", "resnet14"],
    ],
)
def test_lists_with_commas(options):
    c = from_command_line("digits", options)
    assert (c.peers, c.lr_drops) == (("resnet8", "resnet14"), (3, 5))
    c = from_command_line("digits", ["--folder", "a,b", "--root=c,d"])
    assert (c.folder, c.root) == ("a,b", "c,d")


def test_command_line_over_file_over_preset(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("epochs: 7\nlr: 0.5\n")
    c = from_command_line("digits", ["--config", str(file), "--lr", "0.25", "--independent"])
    assert (c.data, c.epochs, c.lr, c.independent, c.flip) == ("digits", 7, 0.25, True, False)
    c = from_command_line("cifar100", ["--peers", "resnet20", "wrn_16_4", "--no-flip"])
    assert (c.peers, c.flip, c.epochs) == (("resnet20", "wrn_16_4"), False, 200)
    with pytest.raises(InputError, match="--config needs the name"):
        from_command_line("digits", ["--config"])
    with pytest.raises(InputError, match="cannot train on data 'cifar10'"):
        from_command_line("digits", ["--data", "cifar10"])


def test_command_line_and_python_agree():
    assert from_command_line("digits", []) == resolve("digits", {}) == preset("digits")
    assert from_command_line("digits", ["--lr", "0.3"]) == resolve("digits", {"lr": 0.3})


def test_help_names_units_and_the_papers_values(capsys):
    with pytest.raises(SystemExit) as stop:
        from_command_line("cifar100", ["--help"])
    assert stop.value.code == 0
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    for name in FIELDS:
        assert f"--{name.replace('_', '-')}" in text
    assert "Paper: 200. (default: 200)" in text
    assert "Pixels of reflected border" in text
    assert "Minutes between" in text


def test_resume_takes_the_settings_of_the_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for number in (1, 3):
        Path(f"runs/digits-resnet8-resnet8-{number:03d}").mkdir(parents=True)
    Path("runs/digits-resnet8-resnet8-note").mkdir()
    folder = "runs/digits-resnet8-resnet8-003"
    preset("digits", lr=0.3, epochs=9, folder=folder).save(Path(folder) / "config.yaml")
    expected = preset("digits", lr=0.3, epochs=9, folder=folder, resume=True)
    assert resolve("digits", {"resume": True}) == expected
    assert from_command_line("digits", ["--resume"]) == expected
    assert from_command_line("digits", ["--resume", "--lr", "0.2"]).lr == 0.2
    assert sorted(numbered_folders(expected)) == [1, 3]
    with pytest.raises(InputError, match="no folder runs/cifar10-resnet32-resnet32-NNN"):
        resolve("cifar10", {"resume": True})
    with pytest.raises(InputError, match="is a run on digits, not on cifar10"):
        resolve("cifar10", {"resume": True, "folder": folder})
    with pytest.raises(
        InputError, match=r"nothing to resume in elsewhere: it holds no config\.yaml"
    ):
        from_command_line("digits", ["--resume", "--folder", "elsewhere"])


def test_a_resumed_run_keeps_the_recipe_that_it_had(tmp_path):
    """What is given changes the run's settings, not those of a preset."""
    saved = preset("market1501", standin=True, epochs=3, root="pictures", schedule="step")
    saved.save(tmp_path / "config.yaml")
    folder = str(tmp_path)
    expected = saved.replace(folder=folder, resume=True, epochs=9)
    assert resolve("market1501", {"resume": True, "folder": folder, "epochs": 9}) == expected
    options = ["--resume", "--folder", folder, "--epochs", "9"]
    assert from_command_line("market1501", options) == expected
    file = tmp_path / "more.yaml"
    file.write_text(f"resume: true\nfolder: {folder}\nepochs: 7\n")
    options = ["--config", str(file), "--epochs", "9"]
    assert from_command_line("market1501", options) == expected
    with pytest.raises(InputError, match="is a run on market1501, not on digits"):
        from_command_line("digits", ["--resume", "--folder", folder])


def test_what_may_change_on_resume():
    saved = TrainConfig(epochs=10).to_dict()
    check_resumable(saved, TrainConfig(epochs=10, log_every=3, device="cpu", folder="x"))
    check_resumable(saved, TrainConfig(epochs=20))  # prolongs a step schedule
    for name, value in [("lr", 0.2), ("seed", 1), ("peers", ("resnet20",)), ("kl_weight", 0.5)]:
        with pytest.raises(InputError, match=f"cannot resume: {name} was .* and is now"):
            check_resumable(saved, TrainConfig(epochs=10, **{name: value}))
    cosine = TrainConfig(epochs=10, schedule="cosine")
    with pytest.raises(InputError, match="cannot resume: epochs was 10 and is now 20"):
        check_resumable(cosine.to_dict(), cosine.replace(epochs=20))


def test_a_run_of_a_number_of_steps():
    saved = TrainConfig(epochs=0, iterations=10, warmup_epochs=3)
    check_resumable(saved.to_dict(), saved.replace(iterations=20))
    assert saved.to_dict()["lr_drops"] == []


def test_the_papers_recipe_is_the_default_of_market1501():
    c = preset("market1501")
    assert c == ReidConfig()
    assert (c.recipe, c.peers, c.batch_size, c.iterations) == (
        "paper", ("mobilenet", "mobilenet"), 16, 100_000,
    )  # fmt: skip
    assert (c.optimizer, c.lr, c.momentum) == ("adam", 2e-4, 0.5)
    assert not any((c.label_smoothing, c.ema, c.kl_sum, c.triplet_weight, c.center_weight))


def test_the_strong_recipe_is_the_bag_of_tricks():
    c = preset("market1501", recipe="strong")
    assert (c.size, c.batch_size, c.images_per_id) == ((256, 128), 64, 4)
    assert (c.epochs, c.iterations, c.warmup_epochs, c.lr_drops) == (120, 0, 10, (40, 70))
    assert (c.optimizer, c.lr, c.weight_decay) == ("adam", 3.5e-4, 5e-4)
    assert (c.neck, c.last_stride, c.pretrained, c.label_smoothing) == (True, 1, True, 0.1)
    assert (c.triplet_weight, c.margin, c.center_weight) == (1, 0.3, 5e-4)
    assert (c.erasing, c.pad) == (0.5, 10)


def test_command_line_over_file_over_recipe(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("recipe: strong\nlr: 0.5\nmargin: null\n")
    c = from_command_line("market1501", ["--config", str(file), "--lr-drops", "30", "60"])
    assert (c.recipe, c.lr, c.margin, c.lr_drops, c.neck) == ("strong", 0.5, None, (30, 60), True)
    c = from_command_line("market1501", ["--config", str(file), "--recipe=paper"])
    assert (c.recipe, c.lr, c.neck, c.iterations) == ("paper", 0.5, False, 100_000)
    c = from_command_line("market1501", ["--recipe", "strong", "--margin", "None"])
    assert (c.neck, c.margin) == (True, None)
    file.write_text("data: market1501\nrecipe: strong\n")
    assert load_config(file) == preset("market1501", recipe="strong")
    assert load_config(file).triplet_weight == 1


@pytest.mark.parametrize("data", ["market1501", "cifar100"])
@pytest.mark.parametrize(
    ("given", "length"),
    [
        ({"epochs": 2}, (2, 0)),
        ({"iterations": 7}, (0, 7)),
        ({"epochs": 2, "iterations": 0}, (2, 0)),
    ],
)
def test_the_length_that_is_given_wins_over_the_other_of_a_recipe(tmp_path, data, given, length):
    """However it is given: in Python, by a file, on the command line, over a file's."""
    file = tmp_path / "c.yaml"
    file.write_text(yaml.safe_dump({"data": data, **given}))
    options = [f"--{name}={value}" for name, value in given.items()]
    found = [
        preset(data, **given),
        preset(data).replace(**given),
        resolve(data, given),
        load_config(file),
        from_command_line(data, ["--config", str(file)]),
        from_command_line(data, options),
        from_command_line(data, " ".join(options).replace("=", " ").split()),
    ]
    file.write_text("iterations: 50\n" if "epochs" in given else "epochs: 50\n")
    found.append(from_command_line(data, ["--config", str(file), *options]))
    assert {(c.epochs, c.iterations) for c in found} == {length}
    with pytest.raises(InputError, match=r"epochs \(2\) and iterations \(7\) both say how long"):
        preset(data, epochs=2, iterations=7)


def test_the_standin_is_small_and_strong_unless_told_otherwise():
    c = from_command_line("market1501", ["--standin"])
    assert c == preset("market1501", standin=True)
    assert (c.recipe, c.peers, c.pretrained) == ("strong", ("resnet20", "resnet20"), False)
    assert 0 < c.triplet_weight < 1
    assert c.height < 128
    c = from_command_line("market1501", ["--standin", "--recipe", "paper", "--epochs", "3"])
    assert (c.recipe, c.triplet_weight, c.epochs, c.iterations) == ("paper", 0, 3, 0)


def test_settings_of_another_kind_of_run_are_refused(tmp_path):
    with pytest.raises(InputError, match="unknown setting 'recipe'"):
        preset("cifar100", recipe="strong")
    file = tmp_path / "c.yaml"
    file.write_text("data: cifar100\ntriplet_weight: 1\n")
    with pytest.raises(InputError, match="unknown setting 'triplet_weight'"):
        load_config(file)
    with pytest.raises(InputError, match=r"unknown setting 'heigth'.*did you mean height"):
        preset("market1501", heigth=3)


def test_help_of_re_identification(capsys):
    with pytest.raises(SystemExit):
        from_command_line("market1501", ["--recipe", "strong", "--help"])
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    for field in dataclasses.fields(ReidConfig):
        assert f"--{field.name.replace('_', '-')}" in text
    assert "Paper: 100,000; strong: 0. (default: 0)" in text
    assert "Weight of the batch-hard triplet loss. Strong: 1. (default: 1.0)" in text


def test_run_names_are_safe_as_folders():
    assert run_name(TrainConfig()) == "cifar100-resnet32-resnet32"
    assert run_name(TrainConfig(peers=["resnet8"] * 5)) == "cifar100-5xresnet8"
    assert run_name(TrainConfig(peers=["my.mod:../f"])) == "cifar100-my.mod_.._f"
    assert len(run_name(TrainConfig(peers=[f"wrn_{i}_1" for i in range(99)]))) <= 100


def test_no_preset_has_an_unknown_setting():
    for data in dataset_names():
        assert preset(data).data == data
