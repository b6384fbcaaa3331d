from dataclasses import replace
from pathlib import Path

import pytest
from conftest import composed
from generated import judge_commands
from hydra import compose, initialize_config_dir

from gaplab import config as configs
from gaplab.errors import UserError

CONF = configs.PROJECT / "conf"
GROUPS = ["model", "data", "optimizer", "scheduler", "trainer", "tracking", "experiment"]
SHIPPED = [f"{group}={path.stem}" for group in GROUPS for path in sorted((CONF / group).glob("*.yaml"))]
NEEDS = {"model=custom": ["model._target_=torch.nn.Identity"], "data=image_folder": ["data.root=here"]}


@pytest.mark.parametrize("choice", SHIPPED)
def test_every_shipped_config_composes_and_passes_the_checks(choice):
    assert composed(choice, *NEEDS.get(choice, []))


def test_resolved_config_file_runs_again_as_the_same_config(tmp_path: Path):
    config = composed("model=resnet", "model.bn=true", "data=cifar10", "scheduler=one_cycle", "seed=7")
    (tmp_path / "config.yaml").write_text(configs.to_yaml(config))
    with initialize_config_dir(str(tmp_path), version_base="1.3"):
        # train.py adds its own conf/ to the search path; here that is done by hand
        again = configs.from_hydra(compose("config", [f"hydra.searchpath=[file://{CONF}]"]))
    assert again == config


def test_condition_is_shared_by_seeds_and_ignores_where_things_lie():
    one, other = composed("seed=1"), composed("seed=2", "paths.outputs=elsewhere", "tracking=none", "name=mine")
    assert configs.condition(one) == configs.condition(other)
    assert configs.config_hash(one) != configs.config_hash(other)
    assert configs.condition(one) != configs.condition(composed("seed=1", "model.bn=true"))


def test_experiments_override_what_stands_before_them():
    assert composed("experiment=bn").model.bn
    assert composed("experiment=bn", "model.bn=false").model.bn is False


def test_the_papers_figure_1_is_one_condition_toggled_by_batchnorm():
    plain, normalized = (
        composed("experiment=ioffe_szegedy_fig1"),
        composed("experiment=ioffe_szegedy_fig1", "model.bn=true"),
    )
    assert (plain.model.bn, plain.model.activation, plain.data.normalize) == (False, "sigmoid", "binary")
    assert replace(plain, model=replace(plain.model, bn=True)) == normalized
    train, _ = configs.sizes(plain.data, 60000)
    assert 50_000 <= plain.trainer.max_epochs * -(-train // plain.data.batch_size) < 51_000
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("train", ["experiment=ioffe_szegedy_fig1"], return_hydra_config=True)
    assert dict(cfg.hydra.sweeper.params) == {"model.bn": "false,true"}


@pytest.mark.parametrize(
    ("overrides", "name"),
    [
        (["model.bn=true", "model.dropout=0.5", "model.init=orthogonal"], "mlp bn dropout=0.5 orthogonal s0"),
        (["model=resnet", "data=cifar10", "seed=3"], "resnet20 cifar10 s3"),
        (["name=my run"], "my run"),
    ],
)
def test_run_names_are_readable(overrides, name):
    assert configs.run_name(composed(*overrides)) == name


@pytest.mark.parametrize(
    ("value", "available", "expected"),
    [(5000, 60000, (55000, 5000)), (0.1, 1000, (900, 100)), (0.25, 10, (8, 2))],
)
def test_valid_size_is_a_count_or_a_fraction(value, available, expected):
    data = replace(composed().data, valid_size=value)
    assert configs.sizes(data, available) == expected


@pytest.mark.parametrize(
    ("typed", "kept", "trained"),
    [("0.01", 0.01, 600), ("0.1", 0.1, 6000), ("1.0", None, 55000), ("null", None, 55000), ("1", 1, 1),
     ("500", 500, 500), ("500.0", 500, 500), ("5e2", 500, 500)],
)  # fmt: skip
def test_a_train_size_has_one_form_and_1_0_means_all(typed: str, kept: float | None, trained: int):
    config = composed(f"data.train_size={typed}")
    assert (config.data.train_size, type(config.data.train_size)) == (kept, type(kept))
    assert configs.sizes(config.data, 60000) == (trained, 5000)
    assert configs.config_hash(config) == configs.config_hash(composed(f"data.train_size={kept or 'null'}"))


@pytest.mark.parametrize(
    "word", ["data.valid_size=1.0", "data.valid_size=1.5", "data.train_size=1.5", "data.train_size=1e-12"]
)
def test_a_size_that_is_neither_a_count_nor_a_fraction_is_refused_before_any_data_are_read(word: str):
    with pytest.raises(UserError, match=word.partition("=")[0]):
        composed("data=image_folder", "data.root=here", word)


@pytest.mark.parametrize("value", [1.5, 60000, 70000, 0.000001])
def test_impossible_valid_size_is_refused(value):
    with pytest.raises(UserError, match="valid_size"):
        configs.sizes(replace(composed().data, valid_size=value), 60000)


def test_a_file_cannot_allow_packages_by_itself():
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("train", ["allowed_targets=[os]", "model._target_=os.system"])
    with pytest.raises(UserError, match="said by a file"):
        configs.from_hydra(cfg)
    with pytest.raises(UserError, match=r"package 'gaplab|package 'torch"):
        configs.from_hydra(cfg, ["allowed_targets=[os]"])


def test_passwords_do_not_reach_the_config_file():
    uri = "postgresql://user:secret@host/db"
    assert "secret" not in configs.to_yaml(composed(f"tracking.uri={uri}"))
    assert configs.masked(f"{uri} x") == "postgresql://***@host/db x"


def test_every_field_says_what_it_is():
    classes = [schema for group in configs.SCHEMAS.values() for schema in group]
    for schema in [*classes, configs.Paths]:
        for name, item in schema.__dataclass_fields__.items():
            assert item.metadata.get("doc", "").endswith((".", "…")), f"{schema.__name__}.{name}"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("postgresql://u:p@ss@h/db", "postgresql://***@h/db"),
        ("https://tok:a/b@h", "https://***@h"),
        ("mysql://h/db?user=u&password=geheim&x=1", "mysql://h/db?user=u&password=***&x=1"),
        ("sqlite:////a/b.db", "sqlite:////a/b.db"),
    ],
)
def test_addresses_are_shown_without_what_is_secret(text, shown):
    assert configs.masked(text) == shown


def test_a_saved_config_is_read_back_as_it_was(tmp_path):
    config = composed("model=resnet", "optimizer=sgd", "scheduler=step", "model.bn=true", "tracking=none", "seed=3")
    path = tmp_path / "config.yaml"
    path.write_text(configs.to_yaml(config))
    assert configs.load(path) == config
    text = path.read_text()
    path.write_text(text.replace("\nseed: 3\n", "\nseed: 4\n"))  # a replicate
    assert configs.load(path) == replace(config, seed=4)
    path.write_text(text.replace("\nseed: 3\n", "\nseed: 99999999999999999999\n"))
    with pytest.raises(UserError, match="seed=99999999999999999999"):
        configs.load(path)
    path.write_text("foo: 1")
    with pytest.raises(UserError, match="not a config that gaplab wrote"):
        configs.load(path)


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("name: null", "name: ${oc.env:HOME}", r"\$\{oc\.env:HOME\} is still to be filled in"),
        ("name: null", "name: !!python/object/apply:os.getcwd []", "os.getcwd would make an object"),
        ("gaplab.nn.mlp.MLP", "os.system", "package 'os' is not in allowed_targets"),
        ("- lightning", "- os", "said by a file"),
    ],
)
def test_a_config_of_a_tracking_server_is_somebody_elses(old, new, said):
    config = composed("tracking=none")
    assert configs.loads(configs.to_yaml(config), "run 1") == config
    with pytest.raises(UserError, match=f"run 1: .*{said}"):
        configs.loads(configs.to_yaml(config).replace(old, new), "run 1")
    own = configs.to_yaml(replace(config, allowed_targets=[*config.allowed_targets, "my_package"]))
    assert configs.loads(own, "run 1", ["allowed_targets=[my_package]"])


def test_too_large_a_number_is_out_of_range():
    assert 10**400 not in configs.POSITIVE
    assert -(10**400) not in configs.Range(-1)


@pytest.mark.full
def test_generated_commands_train_or_are_refused_in_a_line(tmp_path):
    """`make test-faults` judges 600."""
    counts = judge_commands(12, tmp_path)
    assert counts["trained"] >= 1
    assert counts["refused"] >= 1
