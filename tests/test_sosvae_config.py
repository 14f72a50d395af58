"""The configuration: checked when it is made, faithful on disk, and the paper's where it is named so."""

import dataclasses
import math

import pytest

from sosvae import (
    PRESETS,
    VAE,
    Config,
    DataConfig,
    ModelConfig,
    ObjectiveConfig,
    TrainingConfig,
    beta_vae,
    from_dict,
    to_dict,
)
from sosvae.config import differences


@pytest.mark.parametrize("name", PRESETS)
def test_presets_survive_a_round_trip(name):
    config = PRESETS[name][1]
    assert from_dict(to_dict(config)) == config


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"modle": {}}, "modle"),
        ({"model": {"ranks": 3}}, "model.ranks"),
        ({"training": {"steps": "many"}}, "training.steps"),
        ({"training": {"steps": True}}, "training.steps"),
        ({"model": {"head": "dense"}}, "model.head"),
        ({"model": {"rank": 0}}, "model.rank is 0"),
        ({"training": {"checkpointing": [1]}}, "training.checkpointing"),
        ({"data": 3}, "data"),
    ],
)
def test_what_is_not_a_configuration_is_named(values, named):
    with pytest.raises(ValueError, match=named):
        from_dict(values)


@pytest.mark.parametrize(("written", "read"), [(False, "none"), (True, "blocks"), ("stages", "stages")])
def test_checkpointing_of_earlier_versions_is_read(written, read):
    assert from_dict({"training": {"checkpointing": written}}).training.checkpointing == read
    with pytest.raises(ValueError, match=r"training\.accumulate"):
        from_dict({"training": {"accumulate": written}})


def test_all_unknown_keys_are_named_at_once():
    with pytest.raises(ValueError, match=r"model\.a, model\.b"):
        from_dict({"model": {"a": 1, "b": 2}})


@pytest.mark.parametrize(
    ("kind", "values", "named"),
    [
        (DataConfig, {"height": 15}, "16×16"),
        (DataConfig, {"channels": 2}, "channels"),
        (DataConfig, {"validation": 1.0}, "validation"),
        (ModelConfig, {"rank": 0}, "rank"),
        (ModelConfig, {"depth": 0}, "depth"),
        (ModelConfig, {"width": 0.0}, "width"),
        (ModelConfig, {"diagonal": 0.0}, "diagonal"),
        (ObjectiveConfig, {"damping": -1.0}, "damping"),
        (TrainingConfig, {"steps": 0}, "steps"),
        (TrainingConfig, {"mean_only_steps": -1}, "mean_only_steps"),
        (TrainingConfig, {"skip_limit": -1}, "skip_limit"),
        (TrainingConfig, {"decay": 2.0}, "decay"),
        (TrainingConfig, {"lr": 0.0}, "lr"),
        (TrainingConfig, {"clip": -1.0}, "clip is -1.0, expected a positive norm"),
        (TrainingConfig, {"accumulate": 2.0}, "accumulate is 2.0, expected int"),
        (TrainingConfig, {"precision": "bf16"}, "precision is 'bf16', expected 'float32' or 'bfloat16'"),
        (TrainingConfig, {"checkpointing": "stage"}, "expected 'none' or 'blocks' or 'stages'"),
        (TrainingConfig, {"memory_format": "nhwc"}, "memory_format is 'nhwc'"),
        (ModelConfig, {"factor": "lazy"}, "factor is 'lazy', expected 'linear' or 'materialised'"),
        (ModelConfig, {"head": "structural"}, "head is 'structural'"),
        (TrainingConfig, {"accumulate": 0}, "accumulate"),
        (TrainingConfig, {"batch": 8, "accumulate": 3}, "accumulate is 3 and does not divide the batch of 8"),
        (TrainingConfig, {"seed": -1}, "seed is -1, expected 0 to 2⁶⁴ − 1"),
        (TrainingConfig, {"seed": 2**64}, "seed is 18446744073709551616, expected 0 to"),
        (ModelConfig, {"diagonal": 1e-320}, "diagonal is 1e-320, expected a positive variance from 1.2e-38 to 3.4e"),
        (ModelConfig, {"diagonal": 1e-40}, "diagonal is 1e-40"),
        (ModelConfig, {"diagonal": 1e39}, "diagonal is 1e"),
        (ObjectiveConfig, {"kl_slack": -1.0}, "kl_slack is -1.0, expected at least 0, finite"),
        (ObjectiveConfig, {"beta": 10**400}, "beta is 1000.*expected float"),
    ],
)
def test_values_out_of_range_are_named(kind, values, named):
    with pytest.raises(ValueError, match=named):
        kind(**values)


FLOATS = [
    (kind, field.name)
    for kind in (DataConfig, ModelConfig, ObjectiveConfig, TrainingConfig)
    for field in dataclasses.fields(kind)
    if "float" in str(field.type)
]


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize(("kind", "name"), FLOATS, ids=[name for _, name in FLOATS])
def test_numbers_that_are_not_finite_are_named(kind, name, value):
    assert {"lr", "clip", "damping", "multiplier_lr", "diagonal", "kl_slack", "entropy_slack", "beta", "width"} < {
        name for _, name in FLOATS
    }
    with pytest.raises(ValueError, match=rf"^{name} is (inf|-inf|nan), expected .*"):
        kind(**{name: value})


def test_the_ends_of_the_ranges_are_accepted():
    TrainingConfig(seed=2**64 - 1, lr=1e30)
    ModelConfig(diagonal=2.0**-126)
    ObjectiveConfig(kl_slack=0.0, entropy_slack=-1e9, nats_per_rank=-1.0)
    for diagonal in (2.0**-126, 1e-5, 1000.0, 3e38):
        config = Config(model=ModelConfig(head="pixelwise", diagonal=diagonal, width=0.1, depth=1))
        assert math.isfinite(VAE(config).head.variance.bias.item())


@pytest.mark.parametrize(
    ("name", "pixels", "kl_slack", "entropy_slack", "half_log_det"),
    [
        ("celeba", 116_412, 45.0, -504_750.0, 190),
        ("brain", 45_901, 15.0, -198_906.0, 190),
        ("celeba-64-grey", 4_096, 45.0, -17_630.0, 136),
    ],
)
def test_presets_of_the_paper_have_its_settings(name, pixels, kl_slack, entropy_slack, half_log_det):
    config = PRESETS[name][1]
    model, objective, training = config.model, config.objective, config.training
    assert (config.pixels, objective.kl_slack, objective.entropy_slack) == (pixels, kl_slack, entropy_slack)
    assert (model.rank, model.latents, model.width, model.depth) == (25, 128, 1.0, 2)
    assert (model.diagonal, model.fixed_diagonal, model.upsampling) == (1e-5, True, "transposed")
    assert (training.lr, objective.damping, objective.multiplier_lr) == (1e-4, 10.0, 1.0)
    assert training.mean_only_steps > 0
    # The total slack is the fixed diagonal's entropy and these nats, as DESIGN.md reads the paper's values.
    limit = objective.entropy_limit(config.pixels, model.rank, model.diagonal)
    assert limit - 0.5 * pixels * (1 + math.log(2 * math.pi * 1e-5)) == pytest.approx(half_log_det, abs=1)


def test_entropy_slack_is_counted_per_rank():
    objective = ObjectiveConfig(nats_per_rank=4.3)
    base = 0.5 * 1920 * (1 + math.log(2 * math.pi * 1e-4))
    assert objective.entropy_limit(1920, 10, 1e-4) == pytest.approx(base + 43)


def test_beta_vae_differs_in_the_head_alone():
    config = PRESETS["faces"][1]
    changed = [line.partition(":")[0] for line in differences(config, beta_vae(config))]
    assert changed == ["model.head", "objective.entropy_constraint"]


def test_every_field_of_every_section_has_help():
    import inspect

    for section in dataclasses.fields(Config):
        kind = section.default_factory
        source = inspect.getsource(kind)
        for field in dataclasses.fields(kind):
            after = source[source.index(f"    {field.name}:") :].splitlines()[1]
            assert after.strip().startswith('"""'), f"{section.name}.{field.name}"
