"""A cohort's teachers: what they are not part of, what is refused, and whose images they get."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from torch import nn

from fastdml import Cohort
from fastdml.cohort_teachers import Teacher, digest
from fastdml.engine import make_optimizer, make_step
from fastdml.errors import InputError
from fastdml.loss import MutualLoss
from fastdml.models import create_model
from fastdml.predictor import Predictor

C = 5


def net(name="resnet8", seed=7, classes=C):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return create_model(name, classes)


def record(shape=(3, 8, 8), mean=(100.0, 120.0, 140.0), std=(50.0, 60.0, 70.0), classes=None):
    return {
        "image_shape": shape and [*shape],
        "mean": mean and [*mean],
        "std": std and [*std],
        "classes": classes,
        "resize": None,
        "stored": None,
    }


def test_a_teacher_is_no_part_of_the_cohort_and_moves_with_it():
    alone = Cohort(["resnet8"], C)
    cohort = Cohort(["resnet8"], C, teachers=[net()])
    (teacher,) = cohort.teachers
    assert cohort.state_dict().keys() == alone.state_dict().keys()
    assert len([*cohort.parameters()]) == len([*alone.parameters()])
    assert len([*cohort.buffers()]) == len([*alone.buffers()])
    assert len(cohort) == 1
    assert teacher.name == "ResNetCifar"
    assert not any(m.training for m in teacher.modules())
    cohort.train()
    teacher.train()
    assert not any(m.training for m in teacher.modules())
    assert not any(w.requires_grad for w in teacher.parameters())
    cohort.double()
    assert all(w.dtype == torch.float64 for w in teacher.parameters())
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    assert len(cohort(x)) == 1
    assert len(cohort.to("meta").teachers) == 1
    assert all(w.is_meta for w in teacher.parameters())


def test_a_copy_of_a_cohort_has_teachers_of_its_own():
    cohort = Cohort(["resnet8"], C, teachers=[net()])
    twin = copy.deepcopy(cohort)
    assert twin.teachers[0] is not cohort.teachers[0]
    assert twin.taught_by == cohort.taught_by


def with_shared(part):
    """Two networks that have one layer in common, or one of its weights."""
    first, second = (nn.Sequential(nn.Flatten(), nn.Linear(192, C)) for _ in range(2))
    if part == "layer":
        second[1] = first[1]
    else:
        second[1].weight = first[1].weight
    return first, second


def test_what_belongs_to_a_peer_is_refused():
    peer = net()
    with pytest.raises(
        InputError, match=r"teacher ResNetCifar and peer ResNetCifar-1 share all their weights"
    ):
        Cohort([peer, net(seed=1)], C, teachers=[peer])
    first, second = with_shared("layer")
    with pytest.raises(InputError, match=r"teacher .* and peer Sequential share the module 1"):
        Cohort([first], C, teachers=[second])
    first, second = with_shared("weight")
    with pytest.raises(InputError, match=r"share the weight 1\.weight: a teacher is a network of"):
        Cohort([first], C, teachers=[second])
    one = net()
    with pytest.raises(InputError, match=r"teacher .* and teacher .* share all their weights"):
        Cohort(["resnet8"], C, teachers=[one, one])


@pytest.mark.parametrize(
    ("teachers", "message"),
    [
        ("resnet8", r"teachers must be a list, such as \['timm:resnet18'\], not 'resnet8'"),
        (["resnet8"], r"teacher 'resnet8' has no trained weights: name one of timm's"),
        ([3], "teacher 0 is a int, neither timm:NAME nor a torch module"),
        ([net(classes=7)], "teacher ResNetCifar tells 7 classes apart, and the peers 5"),
        ([Cohort(["resnet8"], C)], r"teacher 0 is a Cohort, which gives no logits \(N, C\)"),
        ([Predictor(Cohort(["resnet8"], C))], "teacher 0 is a Predictor"),
        ([nn.LazyLinear(C)], "weight of teacher 0 is of a lazy layer"),
    ],
)
def test_what_cannot_teach_is_refused_in_one_line(teachers, message):
    with pytest.raises(InputError, match=message) as error:
        Cohort(["resnet8"], C, teachers=teachers)
    assert "\n" not in str(error.value)


def test_files_name_teachers_by_their_digest_and_hold_none_of_their_weights(tmp_path):
    teacher = Teacher(net(), name="t", source="runs/1:resnet8", model="resnet8")
    cohort = Cohort(["resnet8"], C, teachers=[teacher])
    cohort.save(tmp_path / "taught")
    Cohort(["resnet8"], C).save(tmp_path / "alone")
    names = ({p.name for p in (tmp_path / n).rglob("*")} for n in ("taught", "alone"))
    assert next(names) == next(names)
    said = json.loads((tmp_path / "taught" / "cohort.json").read_text())
    sha256 = digest(teacher.network)
    entry = {"name": "t", "source": "runs/1:resnet8", "model": "resnet8", "sha256": sha256}
    assert said.pop("teachers") == [entry]
    assert said == json.loads((tmp_path / "alone" / "cohort.json").read_text())
    loaded = Cohort.load(tmp_path / "taught")
    assert loaded.teachers == ()
    assert [t._asdict() for t in loaded.taught_by] == [entry]
    loaded.save(tmp_path / "again")
    assert Cohort.load(tmp_path / "again").taught_by == loaded.taught_by


@pytest.mark.parametrize("entry", [{"name": "t"}, 3, {"name": 1, "source": None, "model": None,
                                                      "sha256": ""}])  # fmt: skip
def test_damaged_names_of_teachers_are_refused(tmp_path, entry):
    Cohort(["resnet8"], C).save(tmp_path)
    said = json.loads((tmp_path / "cohort.json").read_text())
    (tmp_path / "cohort.json").write_text(json.dumps({**said, "teachers": [entry]}))
    with pytest.raises(InputError, match="does not describe a cohort"):
        Cohort.load(tmp_path)


def test_a_digest_is_of_all_that_a_network_computes_with():
    one = net()
    before = digest(one)
    assert digest(copy.deepcopy(one)) == before
    one.eval().requires_grad_(False)
    assert digest(one) == before
    with torch.no_grad():
        next(one.buffers()).add_(1)
    assert digest(one) != before


def test_another_normalisation_is_undone_and_redone():
    own = record(mean=(10.0, 20.0, 30.0), std=(30.0, 40.0, 50.0))
    theirs = record()
    network = net()
    teacher = Teacher(network, name="t", record=own)
    pixels = torch.randint(0, 256, (4, 3, 8, 8)).float()

    def normalised(images):
        m, s = (torch.tensor(images[key]).view(3, 1, 1) for key in ("mean", "std"))
        return (pixels - m) / s

    teacher.match(theirs)
    torch.testing.assert_close(teacher(normalised(theirs)), network(normalised(own)))
    assert not torch.allclose(teacher(normalised(own)), network(normalised(own)), atol=1e-3)
    teacher.match(own)  # as it was trained: nothing is computed
    assert torch.equal(teacher(normalised(own)), network(normalised(own)))
    assert teacher.scale is None
    Teacher(network, name="t").match(theirs)  # a module of the caller's, who knows


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"shape": (3, 16, 16)}, "trained on images of 3x16x16, and those of the peers are 3x8x8"),
        ({"classes": list("abdce")}, "class 2 is 'd' for it and 'c' for the peers"),
        ({"mean": None}, "nothing says how those of teacher t were normalised: give its module"),
    ],
)
def test_what_was_trained_on_other_images_is_refused(changes, message):
    teacher = Teacher(net(), name="t", record=record(**{"classes": list("abcde"), **changes}))
    for _ in range(2):  # asked again, too
        with pytest.raises(InputError, match=message):
            teacher.match(record(classes=list("abcde"), std=(1.0, 2.0, 3.0)))


def test_images_that_are_refused_leave_it_as_it_was_fitted():
    teacher = Teacher(net(), name="t", record=record())
    fitting = record(mean=(1.0, 2.0, 3.0))
    teacher.match(fitting)
    before = teacher.scale, teacher.shift
    for bad in (record(shape=(3, 16, 16)), record(mean=None)):
        with pytest.raises(InputError):
            teacher.match(bad)
        teacher.match(fitting)
        assert teacher.scale is before[0]
        assert teacher.shift is before[1]


def test_two_cohorts_have_the_same_teacher_by_names_and_images_of_their_own():
    first = Cohort(["resnet8"], C, teachers=[Teacher(net(), name="resnet8", record=record())])
    second = Cohort([net(seed=3)], C, teachers=first.teachers)
    (one,), (other,) = first.teachers, second.teachers
    assert one.network is other.network
    assert (one.name, other.name) == ("resnet8-2", "resnet8-2")
    one.match(record())
    other.match(record(mean=(1.0, 2.0, 3.0)))
    assert one.scale is None
    assert other.scale is not None
    assert one.identity().sha256 == other.identity().sha256


def test_a_step_refuses_a_teacher_that_it_cannot_prove_right():
    teacher = Teacher(net(), name="t", record=record())
    cohort = Cohort(["resnet8"], C, teachers=[teacher])
    optimizer = make_optimizer(cohort, lr=0.1)
    with pytest.raises(InputError, match="how the peers' images were normalised: set mean and std"):
        make_step(cohort, MutualLoss(), optimizer)
    cohort.mean, cohort.std = record()["mean"], record()["std"]
    assert make_step(cohort, MutualLoss(), optimizer, execution="eager", amp="off")


class TestTimm:
    NAME = "test_resnet"

    @pytest.fixture(autouse=True)
    def _cache(self, tmp_path, monkeypatch, cache_weights):
        pytest.importorskip("timm")
        hub = pytest.importorskip("huggingface_hub")
        monkeypatch.setattr(hub.constants, "HF_HUB_CACHE", str(tmp_path))
        self.weights = cache_weights(self.NAME, tmp_path)

    @pytest.mark.parametrize("size", ["", "@32"])
    def test_a_pretrained_network_keeps_its_classifier(self, size):
        import timm

        name = f"timm:{self.NAME}{size}"
        cohort = Cohort(["resnet8"], 1000, teachers=[name])
        (teacher,) = cohort.teachers
        assert (teacher.name, teacher.source, teacher.model) == (name, name, name)
        config = timm.get_pretrained_cfg(self.NAME)
        own = [255 * m for m in config.mean], [255 * s for s in config.std]
        assert (teacher.record["mean"], teacher.record["std"]) == own
        assert teacher.record["image_shape"] == (None if size else [*config.input_size])
        plain = timm.create_model(self.NAME)
        plain.load_state_dict(self.weights)
        side = 32 if size else config.input_size[-1]
        cohort.mean, cohort.std = own
        cohort.image_shape = (3, side, side)
        teacher.match(cohort.record())
        x = torch.randn(2, 3, side, side)
        torch.testing.assert_close(teacher(x), plain.eval()(x))

    def test_of_another_size_it_says_how_it_takes_ours(self):
        cohort = Cohort(["resnet8"], 1000, teachers=[f"timm:{self.NAME}"])
        cohort.image_shape, cohort.mean, cohort.std = (3, 32, 32), [1.0] * 3, [2.0] * 3
        with pytest.raises(InputError, match=rf"write timm:{self.NAME}@160 to have it resize"):
            cohort.teachers[0].match(cohort.record())

    def test_of_other_classes_it_is_refused(self):
        with pytest.raises(InputError, match="tells 1000 classes apart, and the peers 5"):
            Cohort(["resnet8"], C, teachers=[f"timm:{self.NAME}"])
