import importlib
import json
import math
import shlex
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from conftest import demo_overrides

import ablate
from common import stages
from common.errors import UserError
from common.stages import Record, Stage, run_chains
from configs.loading import knobs, load_config
from report.ablation import markdown, mean_and_error, plot_arms, summarise

ROOT = Path(__file__).parents[2]
OVERLAYS = sorted((ROOT / "configs" / "ablations").glob("*.yaml"))
RESULTS = {
    "base": {0: {"fd": 3.0, "c": None}, 1: {"fd": 5.0, "c": None}, 2: {"fd": 4.0, "c": None}},
    "arm": {0: {"fd": 2.0, "c": 0.5}, 1: {"fd": 4.5, "c": 0.7}, 2: {"fd": 2.5, "c": 0.6}},
}


@pytest.mark.parametrize("path", OVERLAYS, ids=lambda path: path.stem)
def test_an_overlay_is_small_and_fits_on_the_real_config(path):
    settings = yaml.safe_load(path.read_text())
    if not path.stem.startswith("crepa_"):  # these have the names of CREPA's users
        assert set(settings) == {"align"}  # nothing but the method differs
        assert len(settings["align"]) <= 3
    config, a = load_config([ROOT / "configs" / "A.yaml", path]), load_config(ROOT / "configs" / "A.yaml")
    assert config.model_copy(update={"align": a.align}) == a
    assert all(f"align.{name}" in knobs() for name in settings.get("align", ()))


def test_the_recommended_settings_of_crepa_are_there():
    """video_crepa: image to video, text to video, and single-coloured backgrounds."""
    align = {path.stem: load_config([ROOT / "configs" / "A.yaml", path]).align for path in OVERLAYS}
    for name in ("crepa_i2v", "crepa_t2v", "crepa_flat"):
        found = align[name]
        assert (found.coeff, found.manifold_coeff, found.neighbours, found.neighbour_tau) == (0.5, 0, 1, 1)
    i2v, t2v, flat = align["crepa_i2v"], align["crepa_t2v"], align["crepa_flat"]
    assert (i2v.schedule, i2v.cutoff_step, i2v.similarity_threshold) == ("constant", 0, None)
    assert (t2v.schedule, t2v.warmup_steps, t2v.decay_steps, t2v.coeff_end) == ("cosine", 100, 0, 0.1)
    assert (t2v.similarity_threshold, t2v.threshold_mode) == (0.85, "permanent")
    assert flat.cutoff_step == 2000


def test_the_plans_ablations_are_there():
    """Section 5.3 of the plan, token Gram, the heads, and the early stop."""
    align = {path.stem: load_config([ROOT / "configs" / "A.yaml", path]).align for path in OVERLAYS}
    assert align["baseline"].coeff == 0
    assert align["token_only"].manifold_coeff == 0
    assert align["multi_layer"].taps == ("enc_last", "mid", "dec_first")
    assert {align[name].coeff for name in ("lambda_0.5", "urepa", "lambda_1.0")} == {0.5, 0.8, 1.0}
    assert align["token_gram"].manifold == "token"
    assert {a.head for a in align.values()} == {"conv1x1", "linear", "mlp", "conv3x3"}
    assert align["early_stop"].cutoff_step == 15_000


def test_mean_and_standard_error_are_those_of_the_statistics_module():
    values = [3.0, 5.0, 4.5, 2.0]
    mean, error = mean_and_error(values)
    assert mean == pytest.approx(statistics.mean(values))
    assert error == pytest.approx(statistics.stdev(values) / math.sqrt(4))
    assert math.isnan(mean_and_error([1.0])[1])


def test_differences_are_taken_seed_by_seed():
    table = summarise(RESULTS, "base")
    row = table["arm"]["fd"]
    pairs = [2.0 - 3.0, 4.5 - 5.0, 2.5 - 4.0]
    assert row["difference"] == pytest.approx(statistics.mean(pairs))
    assert row["difference_error"] == pytest.approx(statistics.stdev(pairs) / math.sqrt(3))
    assert row["n"] == 3
    assert "difference" not in table["base"]["fd"]
    assert "c" not in table["base"]  # a baseline has no head
    assert "difference" not in table["arm"]["c"]


def test_the_table_shows_mean_error_and_difference():
    text = markdown(summarise(RESULTS, "base"), {"fd": ".2f", "c": ".1%"}, ["fd"])
    assert "| arm | n | fd | Δ | c |" in text
    assert "| base | 3 | 4.00 ± 0.58 | — | — |" in text
    assert "| arm | 3 | 3.00 ± 0.76 | -1.00 ± 0.29 | 60.0% ± 5.8% |" in text


def test_an_arms_name_stays_in_its_cell():
    table = {"a|b`\n<c": summarise(RESULTS, "base")["arm"]}
    assert markdown(table, {"fd": ".2f"}).splitlines()[2:] == [r"| a\|b\`\\n\<c | 3 | 3.00 ± 0.76 |"]


def test_the_figure_is_drawn_with_its_data(tmp_path):
    plot_arms(tmp_path / "arms.png", RESULTS, "base", {"fd": "Fréchet distance", "c": "cosine"}, "title")
    data = json.loads((tmp_path / "arms.json").read_text())
    assert data["measures"]["fd"]["arm"] == [2.0, 4.5, 2.5]
    assert data["measures"]["c"]["base"] == [None, None, None]


def in_this_process(chains, *, ended, **_):
    for stage in (stage for chain in chains for stage in chain):
        script, *arguments = shlex.split(stage.command)
        importlib.import_module(script.removesuffix(".py")).main(arguments)
        ended(stage, 0.1)


@pytest.fixture
def scripts(tmp_path, monkeypatch):
    """A place to run small scripts as stages."""
    monkeypatch.setattr(stages, "ROOT", tmp_path)
    (tmp_path / "append.py").write_text(
        "import sys, pathlib\n"
        "p = pathlib.Path(sys.argv[1]); p.open('a').write(sys.argv[2])\n"
        "sys.exit('broken' if sys.argv[2] == 'X' else 0)\n"
    )

    def stage(name, text):
        return Stage(name, f"append.py {tmp_path}/{name[0]} {text}", tmp_path / name[0])

    return stage


def test_chains_run_in_order_and_are_recorded(scripts, tmp_path):
    record = Record(tmp_path / "stages.json")
    chains = [[scripts(f"{chain}{i}", i) for i in range(3)] for chain in "ab"]
    run_chains(chains, jobs=2, logs=tmp_path / "logs", ended=record.add)
    assert [(tmp_path / name).read_text() for name in "ab"] == ["012", "012"]
    again = Record(tmp_path / "stages.json")
    assert all(again.of(stage)["seconds"] >= 0 for chain in chains for stage in chain)
    (tmp_path / "a").unlink()
    assert again.of(chains[0][0]) is None  # what it made is gone


def test_a_failing_stage_stops_its_chain_and_is_not_recorded(scripts, tmp_path, capfd):
    record = Record(tmp_path / "stages.json")
    chain = [scripts("a0", "0"), scripts("a1", "X"), scripts("a2", "2")]
    with pytest.raises(UserError, match="'a1' did not come to its end"):
        run_chains([chain], jobs=1, logs=tmp_path / "logs", ended=record.add)
    assert (tmp_path / "a").read_text() == "0X"
    assert [record.of(stage) is not None for stage in chain] == [True, False, False]
    assert "broken" in capfd.readouterr().out


def test_a_set_is_trained_measured_and_tabulated_and_the_second_call_repeats_nothing(
    miniature, tmp_path, monkeypatch
):
    overlay = {"a": {"coeff": 0.8}, "b": {"coeff": 0}}
    for name, align in overlay.items():
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump({"align": align}))
    settings = [
        o
        for o in demo_overrides(miniature, "unused", "train.steps=2", "eval.num_samples=12")
        if "run=" not in o
    ]
    arguments = [
        *[tmp_path / "a.yaml", tmp_path / "b.yaml", "--base", ROOT / "configs" / "demo.yaml"],
        *["--seeds", 0, 1, "--out", tmp_path / "out", "--reference", "b", "--jobs", 2, "--set", *settings],
    ]
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(ablate, "run_chains", in_this_process)  # each process would import torch again
    monkeypatch.setattr("evaluation.align.draw_alignment", lambda *_: None)  # test_evaluate.py looks at it
    ablate.main(list(map(str, arguments)))
    first = json.loads((tmp_path / "out" / "results.json").read_text())
    assert set(first["results"]) == {"a", "b"}
    assert set(first["results"]["a"]) == {"0", "1"}
    assert all(value["n"] == 2 for value in first["summary"]["a"].values())
    assert first["results"]["b"]["0"]["head cosine"] is None
    assert (tmp_path / "out" / "arms.png").exists()
    assert "±" in (tmp_path / "out" / "table.md").read_text()
    written = (tmp_path / "out" / "stages.json").read_bytes()
    ablate.main(list(map(str, arguments)))
    assert (tmp_path / "out" / "stages.json").read_bytes() == written
    assert len(json.loads(written)) == 12


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nowhere.yaml"], "cannot read nowhere.yaml"),
        (["--reference", "nobody"], "--reference nobody is none of the arms"),
        (["--set", "align.coef=1"], "did you mean 'align.coeff'"),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_trained(tmp_path, arguments, said, monkeypatch):
    monkeypatch.setattr(ablate, "run_chains", lambda *_, **__: pytest.fail("trained"))
    own = [str(OVERLAYS[0])] if "nowhere.yaml" not in arguments else []
    with pytest.raises(UserError, match=said):
        ablate.main([*own, *arguments, "--base", str(ROOT / "configs" / "demo.yaml"), "--out", str(tmp_path)])


@pytest.fixture
def ablation(miniature, tmp_path, monkeypatch):
    """Run an ablation of overlays {name: settings} in this process; returns what was run, in order."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("evaluation.align.draw_alignment", lambda *_: None)
    settings = [
        o
        for o in demo_overrides(miniature, "unused", "train.steps=2", "eval.num_samples=12")
        if "run=" not in o
    ]

    def run(arms, *more, seeds=(0,)):
        for name, overlay in arms.items():
            (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(overlay))
        ran = []

        def note(chains, *, ended, **_):
            ran.extend(
                stage.name.split()[0] + " " + stage.name.split()[1] for chain in chains for stage in chain
            )
            in_this_process(chains, ended=ended)

        monkeypatch.setattr(ablate, "run_chains", note)
        files = [tmp_path / f"{name}.yaml" for name in arms]
        given = [*files, "--base", ROOT / "configs/demo.yaml", "--seeds", *seeds, "--out", tmp_path / "out"]
        ablate.main(list(map(str, [*given, "--set", *settings, *more])))
        return ran, json.loads((tmp_path / "out" / "results.json").read_text())

    return run


def test_other_evaluation_settings_are_measured_anew_without_training(ablation, capsys):
    ran, first = ablation({"baseline": {"align": {"coeff": 0}}})
    assert ran == ["train baseline", "metrics baseline", "align baseline"]
    ran, second = ablation({"baseline": {"align": {"coeff": 0}}}, "eval.num_samples=16")
    assert ran == ["train baseline", "metrics baseline", "align baseline"]
    assert "16 samples" in second["note"]
    assert (
        first["results"]["baseline"]["0"]["Fréchet distance ↓"]
        != second["results"]["baseline"]["0"]["Fréchet distance ↓"]
    )
    assert capsys.readouterr().out.count("is complete") == 2  # the second training had nothing to do


def test_a_changed_arm_is_not_passed_off_as_the_old_one(ablation):
    ablation({"baseline": {"align": {"coeff": 0}}})
    with pytest.raises(UserError, match=r"started with another config \(optim\.lr"):
        ablation({"baseline": {"align": {"coeff": 0}, "optim": {"lr": 1e-5}}})


def test_what_cannot_be_compared_is_marked_and_has_no_difference(ablation):
    arms = {
        "baseline": {"align": {"coeff": 0}},
        "other": {"align": {"coeff": 0}, "diffusion": {"snr_gamma": 1}},
    }
    _, found = ablation(arms)
    rows = found["summary"]["other"]
    assert rows["held-out loss ↓"]["comparable"] is False
    assert "difference" not in rows["held-out loss ↓"]
    assert "difference" in rows["Fréchet distance ↓"]
    assert "†" in found["note"]


def test_an_arm_that_its_own_block_taught_is_compared_with_the_outside_teacher(ablation):
    own = {"teacher": {"source": "backbone", "block": "dec_first"}, "align": {"head": "linear"}}
    _, found = ablation({"baseline": {"align": {"coeff": 0}}, "own": own})
    rows = found["summary"]["own"]
    assert rows["CKNNA ↑"]["comparable"] is True
    assert "difference" in rows["CKNNA ↑"]
    assert "head cosine" not in rows


def test_metrics_of_whole_clips_have_columns_of_their_own():
    entry = {"value": 0.5, "error": None, "error_kind": None, "notes": [], "real": 0.25}
    names = [
        "classifier_fd16",
        "classifier_accuracy16",
        "video_accuracy4",
        "video_warping_error4",
        "video_fd1k",
    ]
    found = ablate.clip_metrics(dict.fromkeys(names, entry))
    assert list(found) == ["accuracy of clips ↑", "Fréchet distance of clips ↓", "warping error"]
    assert ablate.clip_metrics(dict.fromkeys(names[:2], entry)) == {}


@pytest.mark.parametrize(
    "options",
    [
        ["--timesteps", "900"],
        pytest.param(["--timesteps", "250", "--num-images", "16"], marks=pytest.mark.thorough),
    ],
)
def test_results_that_another_command_replaced_are_not_read(ablation, tmp_path, options):
    ablation({"baseline": {"align": {"coeff": 0}}})
    run = str(tmp_path / "out/baseline/seed0")
    importlib.import_module("evaluate").main(["align", run, *options])
    with pytest.raises(UserError, match="changed by other commands"):
        ablation({"baseline": {"align": {"coeff": 0}}})


@pytest.mark.parametrize("key", ["seed=3", "run=elsewhere", "eval.extractor=nowhere", "eval.tokens=null"])
def test_settings_that_an_ablation_decides_or_needs(ablation, key):
    with pytest.raises(UserError, match=r"--seeds and --out decide it|cannot be evaluated: set|at nowhere"):
        ablation({"baseline": {"align": {"coeff": 0}}}, key)


def test_a_stage_that_ends_well_without_its_product_has_not_ended(scripts, tmp_path):
    """As a training does that was asked to stop."""
    stage = Stage("a0", f"append.py {tmp_path}/a 0", tmp_path / "never")
    record = Record(tmp_path / "stages.json")
    with pytest.raises(UserError, match="'a0' did not come to its end"):
        run_chains([[stage], [stage]], jobs=1, logs=tmp_path / "logs", ended=record.add)
    assert not record.entries


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_lets_the_running_stages_save_once(tmp_path, number):
    """To this process alone: it passes one signal on and waits; a second would stop a training in its saving."""
    (tmp_path / "slow.py").write_text(
        "import pathlib, signal, sys, time\n"
        "heard = []\n"
        "for s in (signal.SIGTERM, signal.SIGINT): signal.signal(s, lambda *a: heard.append(a[0]))\n"
        f"pathlib.Path(r'{tmp_path}/ready').touch()\n"
        "while not heard: time.sleep(0.05)\n"
        "time.sleep(0.5)\n"
        f"pathlib.Path(r'{tmp_path}/saved').write_text(str(len(heard)))\n"
    )
    (tmp_path / "run.py").write_text(
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from pathlib import Path\nfrom common import stages\n"
        f"here = Path(r'{tmp_path}')\nstages.ROOT = here\n"
        "s = stages.Stage('slow', 'slow.py', here / 'never')\n"
        "stages.run_chains([[s], [s]], jobs=1, logs=here / 'logs', ended=print)\n"
    )
    process = subprocess.Popen([sys.executable, tmp_path / "run.py", ROOT], stderr=subprocess.PIPE, text=True)
    while not (tmp_path / "ready").exists():
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(number)
    process.communicate(timeout=30)
    assert process.returncode != 0
    assert (tmp_path / "saved").read_text() == "1"
