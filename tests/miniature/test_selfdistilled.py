"""The second teacher: no labels, no collapse, and nobody else's weights change for it."""

import copy
import importlib
import inspect
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.errors import UserError
from miniature import digits
from miniature import make as miniature
from miniature import selfdistilled as distilled
from miniature.models import reproducible
from models.teachers.table import load_teacher

make_demo = importlib.import_module("preprocessing.0_make_demo")
NAME = "dinov2-selfdistilled"


def run(out: Path, *more: str) -> Path:
    make_demo.main(["--out", str(out), "--quick", *more])
    return out


def contents(out: Path) -> dict[str, bytes]:
    """Every file but the records of seconds."""
    files = (path for path in out.rglob("*") if path.is_file() and path.name != "quality.json")
    return {str(path.relative_to(out)): path.read_bytes() for path in files}


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Path:
    return run(tmp_path_factory.mktemp("plain") / "demo")


@pytest.fixture(scope="module")
def both(tmp_path_factory) -> Path:
    return run(tmp_path_factory.mktemp("both") / "demo", "--self-distilled")


def test_the_encoder_reads_the_folder_and_gives_16_tokens(both: Path) -> None:
    teacher = load_teacher(str(both / "models" / NAME), grid=4)
    images, _ = digits.load_images(both, "val")
    tokens = teacher(images[:5])
    assert tokens.shape == (5, 16, 64)
    assert tokens.isfinite().all()


def test_both_teachers_are_one_architecture_and_differ_in_the_initial_width_alone(both: Path) -> None:
    one, other = (
        json.loads((both / "models" / n / "config.json").read_text()) for n in ("dinov2-mini", NAME)
    )
    assert {key for key in one.keys() | other.keys() if one.get(key) != other.get(key)} == {
        "initializer_range"
    }
    one, other = (
        (both / "models" / n / "preprocessor_config.json").read_bytes() for n in ("dinov2-mini", NAME)
    )
    assert one == other


def test_the_training_takes_no_labels() -> None:
    assert list(inspect.signature(distilled.train_self_distilled).parameters) == ["images", "steps"]
    assert "label" not in inspect.getsource(distilled.train_self_distilled)


def test_the_option_changes_nothing_else_byte_for_byte(plain: Path, both: Path) -> None:
    without, with_ = contents(plain), contents(both)
    own = {name: data for name, data in with_.items() if f"/{NAME}/" in name}
    assert len(own) == 3
    assert {name: data for name, data in with_.items() if name not in own} == without
    # The index is the seed.
    assert list(miniature.MODELS)[:4] == ["dinov2-mini", "sd15-mini", "classifier", NAME]


def test_it_joins_a_finished_folder_with_the_same_bytes_and_stays_there(
    plain: Path, both: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    made = []
    original = miniature.make_model
    out = run(tmp_path / "demo")
    before = json.loads((out / miniature.QUALITY).read_text())
    monkeypatch.setattr(
        miniature, "make_model", lambda name, *a, **k: made.append(name) or original(name, *a, **k)
    )
    run(out, "--self-distilled")
    assert made == [NAME]
    assert contents(out) == contents(both)
    quality = json.loads((out / miniature.QUALITY).read_text())
    assert list(quality["models"]) == list(miniature.MODELS)[:4]
    assert quality["own_floors"] == miniature.OWN_FLOORS
    assert list(before) == ["seed", "quick", "floors_enforced", "floors", "models"]
    assert {key: quality["models"][key] for key in before["models"]} == before["models"]
    capsys.readouterr()
    for more in ((), ("--self-distilled",)):
        run(out, *more)
        assert "already complete" in capsys.readouterr().out
    # Killed after the model, before the summary.
    (out / miniature.QUALITY).write_text(json.dumps(before))
    run(out)
    assert NAME in json.loads((out / miniature.QUALITY).read_text())["models"]
    assert made == [NAME]


def test_its_floors_are_its_own(tmp_path: Path, monkeypatch) -> None:
    def makes(probe: float):
        return lambda out, folder, steps: {"teacher_linear_probe": probe, "teacher_effective_rank": 20.0}

    floor = miniature.OWN_FLOORS[NAME]["teacher_linear_probe"]
    monkeypatch.setitem(miniature.MODELS, NAME, makes(floor - 0.01))
    with pytest.raises(UserError, match=rf"teacher_linear_probe is .*, floor {floor}"):
        miniature.make_model(NAME, tmp_path, quick=False, seed=0)
    monkeypatch.setitem(miniature.MODELS, NAME, makes(floor))
    miniature.make_model(NAME, tmp_path, quick=False, seed=0)
    monkeypatch.setitem(miniature.MODELS, "dinov2-mini", makes(floor))
    with pytest.raises(UserError, match=r"floor 0\.95"):
        miniature.make_model("dinov2-mini", tmp_path, quick=False, seed=0)


def test_same_seed_same_weights_and_other_seed_other_weights(both: Path) -> None:
    images, _ = digits.load_images(both, "train")

    def weights(seed: int) -> Tensor:
        with reproducible(seed):
            return nn.utils.parameters_to_vector(distilled.train_self_distilled(images, 3).parameters())

    assert torch.equal(weights(3), weights(3))
    assert not torch.equal(weights(3), weights(4))


def test_the_cross_entropy_is_that_of_a_hand_written_loop() -> None:
    logits, targets = torch.randn(3, 4), torch.rand(3, 4).softmax(-1)
    by_hand = 0.0
    for row, target in zip(logits.tolist(), targets.tolist(), strict=True):
        total = sum(math.exp(value / distilled.STUDENT_TEMPERATURE) for value in row)
        for value, t in zip(row, target, strict=True):
            by_hand -= t * math.log(math.exp(value / distilled.STUDENT_TEMPERATURE) / total) / 3
    assert distilled.distil(logits, targets).item() == pytest.approx(by_hand, rel=1e-4)


def test_balancing_is_sinkhorn_knopp_and_ignores_what_all_answers_share() -> None:
    logits = torch.rand(6, 4)
    q = np.exp(logits.double().numpy() / 0.1)
    for _ in range(3):
        for k in range(4):
            q[:, k] /= q[:, k].sum()
        for n in range(6):
            q[n] /= q[n].sum()
    targets = distilled.balance(logits, 0.1)
    np.testing.assert_allclose(targets.numpy(), q, rtol=1e-4, atol=1e-7)
    biased = logits + torch.tensor([0.3, 0.0, -0.2, 0.0])  # a favourite prototype
    torch.testing.assert_close(distilled.balance(biased, 0.1, 50), distilled.balance(logits, 0.1, 50))
    assert distilled.balance(logits, 0.1, 50).sum(0).std() < 1e-3


def test_a_lower_temperature_sharpens() -> None:
    entropies = [
        torch.special.entr(distilled.balance(torch.rand(32, 8), t)).sum(1).mean() for t in (1, 0.1, 0.02)
    ]
    assert entropies == sorted(entropies, reverse=True)


def test_the_moving_average_is_its_formula_and_its_momentum_rises_to_1() -> None:
    average, student = nn.Linear(3, 2), nn.Linear(3, 2)
    expected = [0.9 * a + 0.1 * s for a, s in zip(average.parameters(), student.parameters(), strict=True)]
    distilled.update_average(average, student, 0.9)
    torch.testing.assert_close(list(average.parameters()), expected, check_stride=False)
    assert distilled.momentum(0) == pytest.approx(distilled.MOMENTUM)
    assert distilled.momentum(0.5) == pytest.approx((1 + distilled.MOMENTUM) / 2)
    assert distilled.momentum(1) == 1


def answers_after_toy_training(targets_of) -> int:
    """Distil a linear map of 32 noisy points that have much in common; return the number of answers of 8."""
    with reproducible(0):
        points = 1 + 0.1 * torch.randn(32, 16)
        student = nn.Linear(16, 8)
        average = copy.deepcopy(student).requires_grad_(False)
        optimizer = torch.optim.Adam(student.parameters(), lr=1e-2)
        for _ in range(300):
            one, other = (points + 0.05 * torch.randn_like(points) for _ in range(2))
            targets = targets_of(F.normalize(average(other), dim=-1))
            optimizer.zero_grad()
            distilled.distil(F.normalize(student(one), dim=-1), targets).backward()
            optimizer.step()
            distilled.update_average(average, student, 0.9)
        return len(average(points).argmax(1).unique())


def test_balancing_prevents_the_constant_answer_that_sharpening_alone_ends_in() -> None:
    assert answers_after_toy_training(lambda logits: distilled.balance(logits, 0.05)) >= 6
    assert answers_after_toy_training(lambda logits: (logits / 0.05).softmax(-1)) == 1


def test_koleo_is_lower_for_spread_features() -> None:
    spread, crowded = torch.eye(8), torch.eye(8)[torch.arange(8) // 2] + 0.01 * torch.eye(8)
    assert distilled.koleo(spread) < distilled.koleo(crowded)
    unit = F.normalize(spread - spread.mean(0), dim=-1)
    distances = [min((unit[i] - unit[j]).norm() for j in range(8) if j != i) for i in range(8)]
    by_hand = -sum(math.log(d) for d in distances) / 8
    assert distilled.koleo(spread).item() == pytest.approx(by_hand, abs=1e-5)


def test_views_differ_in_place_but_keep_the_size_and_the_scale() -> None:
    gray = torch.zeros(64, 1, 32, 32)
    gray[:, :, 12:20, 12:20] = 1
    with reproducible(0):
        one, other = distilled.augment(gray), distilled.augment(gray)
    assert one.shape == (64, 3, 32, 32)
    assert not torch.equal(one, other)
    std, mean = (torch.tensor(v)[:, None, None] for v in (distilled.IMAGENET_STD, distilled.IMAGENET_MEAN))
    light = (one * std + mean).mean((1, 2, 3)) / gray.mean((1, 2, 3))
    assert light.min() > 0.4
    assert light.max() < 1.7


def test_the_measures_know_a_collapsed_teacher() -> None:
    with reproducible(0):
        images, place = torch.rand(400, 3, 32, 32), torch.randn(16, 8)
        pixels = distilled._patches(images)  # (N, 16, 64)
        honest = pixels @ torch.randn(64, 64)
        lost = torch.randn(400, 1, 8) + place  # each token says the same, but for its position
        blurred = pixels.mean(1, keepdim=True).expand(-1, 16, -1) + 0.01 * torch.randn(400, 16, 64)

    def spatial(tokens: Tensor) -> float:
        return distilled.measure_spatial_detail((tokens[:300], images[:300]), (tokens[300:], images[300:]))

    assert spatial(honest) > 0.6
    assert spatial(blurred) < 0.05
    assert distilled.measure_detail_share(lost) == pytest.approx(0, abs=1e-6)
    assert distilled.measure_detail_share(honest) > 0.9
    assert distilled.measure_effective_rank(torch.randn(400, 1) * torch.randn(8)) == pytest.approx(
        1, abs=1e-3
    )
    assert distilled.measure_effective_rank(torch.randn(4000, 8)) == pytest.approx(8, abs=0.1)
