import re
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import yaml

from common.errors import UserError
from configs.dialect import parse_yaml
from configs.evaluation import FEWEST_MEASURED, Eval
from configs.loading import check_key, knobs, knobs_help, load_config, parse_config, read_yaml, resolved_yaml
from configs.schema import Config
from metrics.quality import precision_recall
from models.pipeline_parts import FLOW_SAMPLERS, SAMPLERS

CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.mark.parametrize("name", ["A", "B", "C", "demo"])
def test_shipped_configs_load_and_survive_a_round_trip(name):
    config = load_config(CONFIGS / f"{name}.yaml")
    assert parse_config(yaml.safe_load(resolved_yaml(config))) == config


def test_config_a_is_the_plan():
    a = load_config(CONFIGS / "A.yaml")
    assert (a.teacher.dim, a.teacher.grid) == (1024, 14)
    assert (a.align.coeff, a.align.manifold_coeff, a.align.taps) == (0.8, 3.0, ("mid",))
    assert (a.optim.lr, a.optim.betas, a.optim.weight_decay, a.optim.ema_decay) == (
        2e-4,
        (0.9, 0.999),
        0.01,
        0.9995,
    )
    assert (a.optim.warmup_fraction, a.data.caption_dropout, a.train.steps) == (0.1, 0.1, 60_000)
    assert (a.model.train, a.model.lora_rank, a.data.batch_size) == ("lora", 32, 48)
    assert (a.diffusion.prediction, a.diffusion.parameterization) == ("v", "auto")


def test_b_and_c_differ_from_a_only_where_the_plan_says():
    a, b, c = (load_config(CONFIGS / f"{name}.yaml") for name in "ABC")
    assert b.train.steps == 120_000
    assert c.train.steps == 200_000
    assert c.align.taps == ("enc_last", "mid", "dec_first")
    assert a.optim == b.optim == c.optim
    assert a.model == b.model == c.model


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("align.coef=0", "did you mean 'align.coeff'"),
        ("lr=1e-4", "did you mean 'optim.lr'"),
        ("aling={coeff: 1}", "did you mean 'align'"),
        ("align.coeff=-1", "align.coeff = -1: Input should be greater than or equal to 0"),
        ("align.coeff=.nan", "finite"),
        ("model.train=lara", "'lora', 'partial' or 'full'"),
        ("align.taps=[mid,mid]", "twice"),
        ("data.batch_size=1", "sample Gram of one image"),
        ("align.coeff", "key=value"),
        ("run.name=x", "run is a value, not a section"),
        ("data.csv=null", "data.csv"),
        ("optim.betas=[0.9, 1.5]", "betas"),
    ],
)
def test_a_wrong_setting_is_one_line_that_says_what_to_do(override, message):
    with pytest.raises(UserError, match=r"^[^\n]+$") as error:
        load_config(CONFIGS / "A.yaml", [override])
    assert message in str(error.value)


def test_names_of_samplers_are_those_of_their_table():
    assert set(get_args(Eval.model_fields["sampler"].annotation)) == {"auto", *SAMPLERS, *FLOW_SAMPLERS}


def test_overrides_win_over_the_file_and_zero_is_a_value():
    config = load_config(CONFIGS / "A.yaml", ["align.coeff=0", "align.manifold_coeff=0.0", "optim.lr=1e-5"])
    assert (config.align.coeff, config.align.manifold_coeff, config.optim.lr) == (0, 0, 1e-5)


def test_a_missing_or_broken_file_is_one_line(tmp_path):
    with pytest.raises(UserError, match=r"cannot read .*no\.yaml"):
        load_config(tmp_path / "no.yaml")
    (tmp_path / "broken.yaml").write_text("a: [1,\nb")
    with pytest.raises(UserError, match=r"^[^\n]*not valid YAML[^\n]*$"):
        load_config(tmp_path / "broken.yaml")
    (tmp_path / "key.yaml").write_text("[a, b]: 2\n")
    with pytest.raises(UserError, match="a key must be a name"):
        load_config(tmp_path / "key.yaml")
    (tmp_path / "empty.yaml").write_text("")
    with pytest.raises(UserError, match="no settings"):
        load_config(tmp_path / "empty.yaml")


def test_a_missing_section_is_named(tmp_path):
    (tmp_path / "c.yaml").write_text("run: x\n")
    with pytest.raises(UserError, match="section 'data' is missing"):
        load_config(tmp_path / "c.yaml")


def test_every_knob_is_explained():
    assert all(field.description for field in knobs().values())
    assert all(f"  {key} = " in knobs_help() for key in knobs())
    assert "align.taps" in knobs()
    assert set(Config.model_fields) == {key.split(".")[0] for key in knobs()}


def test_files_that_extend_each_other_in_a_circle_are_refused(tmp_path):
    (tmp_path / "a.yaml").write_text("extends: b.yaml\n")
    (tmp_path / "b.yaml").write_text("extends: ./a.yaml\n")
    with pytest.raises(UserError, match="extends itself"):
        load_config(tmp_path / "a.yaml")


def test_a_wrong_override_is_not_blamed_on_the_file(tmp_path):
    for override, message in (
        ("train.stesp=5", r"^unknown key"),
        ("train.preview_every=-1", r"^train.preview_every"),
    ):
        with pytest.raises(UserError, match=message):
            load_config(CONFIGS / "A.yaml", [override])
    (tmp_path / "over.yaml").write_text("train: {stesp: 5}\n")
    with pytest.raises(UserError, match=r"over\.yaml: unknown key"):
        load_config([CONFIGS / "A.yaml", tmp_path / "over.yaml"], ["train.steps=5"])


def test_a_key_given_twice_is_refused(tmp_path):
    (tmp_path / "a.yaml").write_text("align:\n  coeff: 0.1\nalign:\n  power: 1\n")
    with pytest.raises(UserError, match="align is given twice"):
        load_config(tmp_path / "a.yaml")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("align.coeff: 1", "is written nested"),
        ("align: {lambda: 1}", "did you mean 'align.coeff'"),
        ("proj_coeff: 1", "did you mean 'align.coeff'"),
        ("align: 5\nurepa_lambda: 1", "align = 5"),
        ("teacher: {dim: 1000}", "choose another align.head"),
        ("align: {coeff_end: 0.4}", "has no effect while align.schedule is constant"),
        (
            "align: {coeff: 0, coeff_end: 0.4, schedule: linear}",
            r"^[^\n]*align.coeff_end = 0.4 has no effect while align.coeff = 0[^\n]*$",
        ),
        ("align: {cutoff_step: 60000}", "never reached in 60000 steps"),
        (
            "align: {similarity_threshold: 0.5, similarity_ema_decay: 0.99999}",
            "needs more than the 60000 steps",
        ),
        ("teacher: {decoder: madebyollin/taesd}", "is for teacher.source=online"),
        ("align: {spatial_norm: 1}", "takes away the mean tokens"),
    ],
)
def test_what_cannot_act_or_is_called_otherwise_is_said(tmp_path, text, said):
    (tmp_path / "over.yaml").write_text(text + "\n")
    with pytest.raises(UserError, match=said):
        load_config([CONFIGS / "A.yaml", tmp_path / "over.yaml"])


def test_a_path_with_a_hash_is_taken_whole():
    config = load_config(CONFIGS / "A.yaml", ["run=runs/try #2"])
    assert config.run == Path("runs/try #2")


def test_several_files_are_laid_over_one_another(tmp_path):
    (tmp_path / "one.yaml").write_text("align: {coeff: 0.1, power: 1.0}\n")
    (tmp_path / "two.yaml").write_text("align: {coeff: 0.2}\n")
    config = load_config([CONFIGS / "A.yaml", tmp_path / "one.yaml", tmp_path / "two.yaml"], ["seed=3"])
    assert (config.align.coeff, config.align.manifold_coeff, config.seed) == (0.2, 3.0, 3)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("align.coeff=true", "align.coeff = True: Input should be a valid number"),
        ("align.coeff='0.5'", "align.coeff = '0.5': Input should be a valid number"),
        ("align.coeff=yes", "align.coeff = 'yes'"),
        ("train.steps=6.0", "train.steps = 6.0: Input should be a valid integer"),
        ("train.steps=1:30", "train.steps = '1:30'"),
        ("train.compile=true", "train.compile = True"),
        ("model.gradient_checkpointing=1", "model.gradient_checkpointing = 1: Input should be a valid boolean"),
        ("run=7", "run = 7: a name was expected: write a number in quotes"),
        ("model.base=1.5", "model.base = 1.5: a name was expected: write a number in quotes"),
        ("data.csv=true", "data.csv = True: a name was expected: write a number in quotes"),
        ("eval.reference=[a.npz,7]", "eval.reference = 7: a name was expected"),
        ("eval.reference=7", "eval.reference = 7: a list was expected"),
        ("optim.betas=[0.9]", "optim.betas = (0.9,): it needs more values"),
        ("train=3", "train = 3: a section was expected"),
        ("data.csv=[a]", "data.csv = ['a']: a name was expected"),
        ("run=''", "run = '': it is empty"),
        ("run=~nobody_here/x", "run = '~nobody_here/x': there is no home folder for ~nobody_here/x"),
        ("run=" + "x" * 70_000, "cannot read the value of 'run=xxx"),
        ("run=a\udcff #2", "cannot read the value of 'run=a"),
        ("train.device=meta", "train.device = 'meta': device 'meta' cannot be used: choose auto, cpu, cuda or cuda:N"),
        ("train.device=cpu:7", "choose auto, cpu, cuda or cuda:N"),
        ("optim.lr=1e30", "optim.lr = 1e+30: Input should be less than or equal to 10"),
        ("align.coeff=1e400", "align.coeff"),
        ("a..b=1", "unknown key 'a'"),
        ("x" * 5000 + "=1", "unknown key 'xxx"),
        ("x" * 5000, "is not of the form key=value"),
        ("run.a=" + "x" * 5000, "run is a value, not a section"),
        (f"urepa_model=[{'x, ' * 5000}]", "teacher.model = ['x'"),
    ],
)  # fmt: skip
def test_a_value_of_another_kind_is_refused(override, message):
    with pytest.raises(UserError, match=r"^[^\n]{,300}$") as error:
        load_config(CONFIGS / "A.yaml", [override])
    assert message in str(error.value)


def test_values_of_the_right_kind_are_taken(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    given = [
        "run='7'",
        "optim.lr=1",
        "train.steps=010",
        "data.csv=~/a.csv",
        "model.base=~/sd",
        "train.device=cuda:1",
    ]
    config = load_config(CONFIGS / "A.yaml", [*given, "eval.reference=~/r.npz"])
    assert (config.run, config.optim.lr, config.train.steps) == (Path("7"), 1.0, 10)
    assert (config.data.csv, config.model.base) == (Path("/home/me/a.csv"), "/home/me/sd")
    assert config.eval.reference == (Path("/home/me/r.npz"),)
    assert parse_config(parse_yaml(resolved_yaml(config), "it")) == config


NUMBERS = [key for key, field in knobs().items() if re.search(r"\b(int|float)\b", str(field.annotation))]


@pytest.mark.parametrize("key", NUMBERS)
def test_every_number_has_limits(key):
    for value in ("1e300", "-1e300", str(10**30), str(-(10**30))):
        with pytest.raises(UserError, match=re.escape(key)):
            load_config(CONFIGS / "A.yaml", [f"{key}={value}"])


def test_an_evaluation_in_training_needs_enough_samples_for_its_metrics():
    with pytest.raises(UserError, match=f"choose {FEWEST_MEASURED} or more"):
        load_config(CONFIGS / "A.yaml", ["train.eval_every=2", f"eval.num_samples={FEWEST_MEASURED - 1}"])
    load_config(CONFIGS / "A.yaml", ["train.eval_every=2", f"eval.num_samples={FEWEST_MEASURED}"])
    few, enough = np.random.default_rng(0).normal(size=(2, FEWEST_MEASURED, 5))
    precision_recall(few, enough)
    with pytest.raises(ValueError, match="neighbours need more"):
        precision_recall(few[:-1], enough)


def test_a_section_is_no_setting_to_change():
    check_key("train.steps")
    wrong = {
        "train": "such as train.steps",
        "train.step": "did you mean 'train.steps'",
        "x": "unknown key 'x'",
    }
    for key, message in wrong.items():
        with pytest.raises(UserError, match=message):
            check_key(key)


def test_extends_names_a_file(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "below.yaml").write_text("seed: 3\n")
    (tmp_path / "a.yaml").write_text("extends: ~/below.yaml\n")
    assert read_yaml(tmp_path / "a.yaml") == {"seed": 3}
    for extends in ("3", "[x]", "''", "true"):
        (tmp_path / "a.yaml").write_text(f"extends: {extends}\n")
        with pytest.raises(UserError, match=r"a\.yaml: extends = [^\n]*: give the name of a file$"):
            read_yaml(tmp_path / "a.yaml")
    (tmp_path / "a.yaml").write_text("extends: no.yaml\n")
    with pytest.raises(UserError, match=r"a\.yaml extends no\.yaml: cannot read [^\n]*no\.yaml"):
        read_yaml(tmp_path / "a.yaml")


def test_a_long_chain_of_files_is_read(tmp_path):
    for i in range(1, 1500):
        (tmp_path / f"{i}.yaml").write_text(f"extends: {i - 1}.yaml\n")
    (tmp_path / "0.yaml").write_text("seed: 3\n")
    assert read_yaml(tmp_path / "1499.yaml") == {"seed": 3}
