"""What `align` measures of real, small runs, against forwards made here with other means."""

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from small_runs import train

import evaluate
from cache.image_list import read_samples
from cache.reader import FieldReader
from cache.text import TextReader, convert
from common.errors import UserError
from evaluation.align import measure_alignment
from evaluation.heldout import Bench, HeldOut, read_taps
from method.alignment import spatial_norm, token_loss
from method.sampler import initial_noise
from metrics.probes import ridge_alignment
from metrics.similarity import cknna, mispair, pool_tokens, unbiased_cka
from metrics.similarity_rows import row_of, value_of
from training.parts import build_model, family_for, load_run_model

CPU = torch.device("cpu")
TAPS = ("enc_last", "mid", "dec_first")
TWO_TAPS = ("align.taps=[mid,dec_first]", "align.spatial_norm=0.5")


def untrained(config, device):
    """The model as its training finds it, heads and all."""
    model = build_model(config.model, config.align, config.teacher, config.seed, family_for(config))
    return model.to(device).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def runs(miniature, tmp_path_factory):
    """A run with two heads and a normalised teacher, and one without any."""
    root = tmp_path_factory.mktemp("aligned")
    return {
        "urepa": train(miniature, root / "urepa", *TWO_TAPS),
        "baseline": train(miniature, root / "baseline", "align.coeff=0"),
    }


def evaluated(run, seed=5, **settings):
    """The run's config with other settings of `eval`."""
    return run.config.model_copy(
        update={"eval": run.config.eval.model_copy(update={"seed": seed, **settings})}
    )


def measured(run, *, step=6, timesteps=(250,), num_images=None, only=("run", "base"), **settings):
    config = evaluated(run, **settings)
    models = {"run": load_run_model(run, step, CPU), "base": untrained(config, CPU)}
    models = {name: models[name] for name in only}
    result, _ = measure_alignment(config, models, CPU, timesteps, num_images)
    return result


@pytest.fixture(scope="module")
def results(runs):
    return {name: measured(run, timesteps=(250, 50)) for name, run in runs.items()}


def rows_of(result, **wanted):
    return [row for row in result["rows"] if all(row[key] == value for key, value in wanted.items())]


def features_by_hand(model, config, timestep, seed):
    """Of every held-out image alone: the taps' features {tap: (n, C, h, w)}, read by hooks of this test."""
    samples = read_samples(config.eval.csv)
    ids = [sample.id for sample in samples]
    latents = FieldReader(config.eval.latents, "latents").read(ids).float()
    scheduler = DDPMScheduler.from_pretrained(config.model.base, subfolder="scheduler")
    null_text = TextReader(config.data.text).null["prompt_embeds"].float()
    unet = model.backbone
    blocks = {
        "enc_last": unet.down_blocks[3].resnets[-1],
        "mid": unet.mid_block.resnets[-1],
        "dec_first": unet.up_blocks[0].resnets[-1],
    }
    found = {tap: [] for tap in blocks}
    hooks = [
        block.register_forward_hook(lambda *a, tap=tap: found[tap].append(a[-1]))
        for tap, block in blocks.items()
    ]
    with torch.no_grad():
        for i, x_0 in enumerate(latents):
            noise = initial_noise([seed + i], x_0.shape)
            noisy = scheduler.add_noise(x_0[None], noise, torch.tensor([timestep]))
            unet(noisy, timestep, null_text[None])
    for hook in hooks:
        hook.remove()
    teacher = FieldReader(config.eval.tokens, "tokens").read(ids).float()
    return {tap: torch.cat(features) for tap, features in found.items()}, teacher


@pytest.mark.parametrize("which", ["run", "base"])
def test_rows_equal_those_of_forwards_made_by_hand(runs, results, which):
    run = runs["urepa"]
    model = load_run_model(run, 6, CPU) if which == "run" else untrained(run.config, CPU)
    features, teacher = features_by_hand(model, run.config, 250, seed=5)
    cells = pool_tokens(teacher.numpy(), (4, 4), (2, 2))
    for tap in TAPS:
        tokens = features[tap].flatten(2).transpose(1, 2).numpy()  # (n, 4, C)
        found = row_of(results["urepa"], model=which, tap=tap)
        kernels = unbiased_cka(tokens.mean(1), cells.mean(1), seed=5)
        assert found["cka"]["value"] == pytest.approx(kernels["cka"], abs=1e-4)
        neighbours = cknna(tokens.mean(1), cells.mean(1), seed=5)
        assert found["cknna"]["value"] == pytest.approx(neighbours["cknna"], abs=1e-3)
        ridge, _ = ridge_alignment(tokens, cells, seed=5)
        assert found["ridge_r2"]["value"] == pytest.approx(ridge["r2"], abs=1e-3)
    if which == "base":
        return
    target = spatial_norm(teacher, run.config.align.spatial_norm)
    other = torch.from_numpy(mispair(np.arange(len(target)), np.random.default_rng([5, 8])))
    for tap in ("mid", "dec_first"):
        with torch.no_grad():
            tokens = model.heads[tap](features[tap], (4, 4))
        cosine = row_of(results["urepa"], tap=tap, features="head")["cosine"]
        assert cosine["value"] == pytest.approx(1 - token_loss(tokens, target).item(), abs=1e-5)
        assert cosine["null"] == pytest.approx(1 - token_loss(tokens, target[other]).item(), abs=1e-5)


def test_base_rows_do_not_know_which_run_they_are_measured_for(results):
    bases = [rows_of(result, model="base") for result in results.values()]
    assert bases[0] == bases[1]
    assert len(bases[0]) == 6  # three taps at two timesteps
    assert results["urepa"]["teacher"] == results["baseline"]["teacher"]
    losses = {result["heldout_loss_diff_base"] for result in results.values()}
    assert len(losses) == 1
    assert losses != {results["urepa"]["heldout_loss_diff"]}


def test_head_rows_are_only_where_a_head_is(results):
    heads = rows_of(results["urepa"], features="head")
    assert {(row["model"], row["tap"]) for row in heads} == {("run", "mid"), ("run", "dec_first")}
    assert not rows_of(results["baseline"], features="head")
    for row in results["urepa"]["rows"]:
        assert ("cosine" in row["metrics"]) == (row["features"] == "head")
        assert ("ridge_r2" in row["metrics"]) == (row["features"] == "tap")


def test_untrained_weights_read_as_the_base_model_and_trained_ones_do_not(runs, results):
    config = evaluated(runs["urepa"])
    models = {"run": untrained(config, CPU), "base": untrained(config, CPU)}
    result, _ = measure_alignment(config, models, CPU, [250])
    ours, theirs = (
        [row["metrics"] for row in rows_of(result, model=model, features="tap")] for model in models
    )
    assert ours == theirs
    assert result["heldout_loss_diff"] == result["heldout_loss_diff_base"]
    trained = [row["metrics"] for row in rows_of(results["urepa"], model="run", timestep=250, features="tap")]
    assert all(a["cka"] != b["cka"] for a, b in zip(trained, theirs, strict=True))


@pytest.mark.parametrize("batch_size", [7, 60])
def test_rows_do_not_depend_on_the_batch_size(runs, results, batch_size):
    """Close, not bit-equal: convolutions sum in another order for another batch size."""
    result = measured(runs["urepa"], batch_size=batch_size)
    assert result["heldout_loss_diff"] == pytest.approx(results["urepa"]["heldout_loss_diff"], rel=1e-4)
    for row in result["rows"]:
        (same,) = rows_of(results["urepa"], **{key: row[key] for key in row if key != "metrics"})
        for name, found in row["metrics"].items():
            assert found["value"] == pytest.approx(same["metrics"][name]["value"], abs=2e-3), name
            assert found["null"] == pytest.approx(same["metrics"][name]["null"], abs=2e-3), name


def test_a_model_may_be_measured_alone(runs, results):
    alone = measured(runs["urepa"], only=("base",))
    assert alone["rows"] == rows_of(results["urepa"], model="base", timestep=250)
    assert alone["heldout_loss_diff"] is None
    assert alone["heldout_loss_diff_base"] == results["urepa"]["heldout_loss_diff_base"]


def test_a_run_that_starts_from_another_is_measured_beside_the_bare_base(runs, results, miniature, tmp_path):
    later = train(miniature, tmp_path / "later", *TWO_TAPS, f"model.init_from={runs['urepa'].path}")
    result = measured(later)
    assert rows_of(result, model="base") == rows_of(results["urepa"], model="base", timestep=250)


def test_the_result_says_how_it_was_measured(results):
    result = results["urepa"]
    assert (result["num_images"], result["n_fit"], result["n_test"], result["seed"]) == (60, 30, 30, 5)
    assert result["timesteps"] == [50, 250]
    assert result["taps"] == list(TAPS)
    assert result["tap_grids"] == {tap: [2, 2] for tap in TAPS}
    assert (result["teacher_grid"], result["prompt"]) == ([4, 4], "null")
    assert (result["cca_k"], result["cknna_k"]) == (30, 10)
    teacher = result["teacher"]["mid"]
    assert teacher["lds"] == {"value": None, "null": None}  # 2 × 2 cells
    assert 0 < teacher["rmsc"]["value"] < 1
    assert 8 <= teacher["probe"]["num_classes"] <= 10  # a class may lie in one half altogether
    assert 0 <= teacher["probe"]["value"] <= 1


def test_fewer_images_are_the_first_of_the_list_and_may_be_too_few_to_probe(runs, tmp_path):
    run = runs["baseline"]
    result = measured(run, num_images=24, only=("base",))
    assert (result["num_images"], result["num_available"]) == (24, 60)
    assert value_of(result, "probe", model="base") is None
    lines = run.config.eval.csv.read_text().splitlines(keepends=True)
    (tmp_path / "few.csv").write_text("".join(lines[:25]))
    short = measured(run, csv=tmp_path / "few.csv", only=("base",))
    assert short["rows"] == result["rows"]


def test_features_that_collapsed_have_no_cca_and_say_why(runs):
    config = runs["baseline"].config
    model = untrained(config, CPU)
    last = model.backbone.mid_block.resnets[-1]
    last.register_forward_hook(lambda module, args, output: torch.ones_like(output))
    result, _ = measure_alignment(config, {"base": model}, CPU, [250])
    found = row_of(result, model="base")
    assert found["cca"]["value"] is None
    assert "rank" in found["cca"]["reason"]
    assert found["cka"]["value"] is None
    assert found["rmsc"]["value"] == pytest.approx(0, abs=1e-6)


def test_a_run_that_diverged_is_said_to_have(runs):
    config = runs["baseline"].config
    model = untrained(config, CPU)
    model.backbone.conv_in.weight.fill_(float("nan"))
    with pytest.raises(UserError, match="not finite: the run has diverged"):
        measure_alignment(config, {"run": model}, CPU, [250])


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--timesteps", "250", "1000"], "from 0 (clean) to 999 (noise), got 1000"),
        (["--timesteps", "-1"], "got -1"),
        (["--num-images", "61"], "61 are more than the 60 held-out images"),
        (["--num-images", "15"], "16 or more are needed"),
        (["eval.seed=-1"], "eval.seed = -1"),
    ],
)
def test_wrong_options_are_one_line_that_says_what_to_do(runs, options, said):
    with pytest.raises(UserError) as error:
        evaluate.main(["align", str(runs["baseline"].path), *options])
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_a_tap_finer_than_the_teachers_grid_is_averaged_over_the_teachers_cells(runs):
    config = runs["urepa"].config
    text, model = convert(TextReader(config.data.text).null, CPU, torch.float32), untrained(config, CPU)
    latents, teacher = np.random.default_rng(0).normal(size=(2, 4, 64, 96)), np.ones((2, 16, 64))
    held = HeldOut(latents.astype(np.float32), teacher.astype(np.float32), np.zeros(2), text, 2, "", "")
    bench = Bench(config, held, 0, CPU, lambda: None)
    with torch.no_grad():
        features, grids, heads = read_taps(bench, model, {"mid": model.heads["mid"]}, 250)
        ((_, x_0, noise, null),) = bench.batches()
        t = torch.full((2,), 250)
        model.predict(bench.path(x_0, noise, t)[0], t, null, capture=True)
    own = model.taps.captured["mid"]  # (2, 64, 8, 12)
    assert own.shape[-2:] == (8, 12)
    assert grids["mid"] == (4, 4)
    expected = torch.nn.functional.avg_pool2d(own, (2, 3)).flatten(2).transpose(1, 2)
    np.testing.assert_allclose(features["mid"], expected, atol=1e-5)
    assert heads["mid"].pooled.shape == (2, 16, 64)
