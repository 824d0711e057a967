"""What a stranger's configuration makes a library build stays within the limits."""

from __future__ import annotations

import time

import pytest
import torch

from diffkiln.errors import LimitExceeded, ManifestInvalid
from diffkiln.guards.building import bounded_building, check_config
from diffkiln.guards.limits import Limits, applied


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"num_layers": 10**7}, r"num_layers: modules is 10,000,000, and 20,000 is allowed"),
        ({"text_config": {"num_hidden_layers": 10**9}}, "num_hidden_layers: modules is"),
        ({"transformer_layers_per_block": [1, 10**6]}, "transformer_layers_per_block: modules is"),
        ({"sample_size": 2**31}, "sample_size is 2,147,483,648"),
    ],
)
def test_number_beyond_all_models_is_refused(config: object, says: str) -> None:
    with pytest.raises(LimitExceeded, match=says):
        check_config(config, "transformer/config.json")


@pytest.mark.parametrize("name", ["load", "nn", "float33", "_dynamo"])
def test_type_that_is_none_is_refused_and_not_looked_up(name: str) -> None:
    for config in ({"dtype": name}, {"vision_config": {"torch_dtype": name}}):
        with pytest.raises(ManifestInvalid, match=f"is '{name}', which is not a type"):
            check_config(config, "text_encoder/config.json")


def test_usual_configuration_is_taken() -> None:
    check_config(
        {
            "num_layers": 57,
            "rope_theta": 10**12,
            "max_length": 10**30,
            "dtype": "bfloat16",
            "torch_dtype": "torch.float16",
        },
        "config.json",
    )
    check_config({"num_train_timesteps": 1000}, "scheduler_config.json", scheduler=True)
    check_config(None, "config.json")


def test_timesteps_beyond_the_limit_are_refused() -> None:
    with pytest.raises(LimitExceeded, match="num_train_timesteps: timesteps is 10,000,000,000, and 100,000 is allowed"):
        check_config({"num_train_timesteps": 10**10}, "scheduler_config.json", scheduler=True)


def test_modules_are_counted_while_they_are_built() -> None:
    begun = time.process_time()
    with pytest.raises(LimitExceeded, match="modules is 1,001"), applied(Limits(modules=1000)), bounded_building("x"):
        torch.nn.ModuleList(torch.nn.Sequential(torch.nn.Identity()) for _ in range(10**7))
    assert time.process_time() - begun < 5
    torch.nn.Sequential(*[torch.nn.Identity()] * 2000)  # none are counted any longer


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.arange(10**11),
        lambda: torch.linspace(0, 1, 10**11),
        lambda: torch.ones(10**6, 10**6),
        lambda: torch.arange(10**6)[:, None] * torch.arange(10**6)[None],
        lambda: torch.zeros(1).repeat(10**11),
    ],
)
def test_table_that_does_not_fit_is_refused_before_it_is_computed(make) -> None:
    with pytest.raises(LimitExceeded, match="buffer_bytes is"), bounded_building("component x"):
        make()


def test_parameters_are_reserved_and_small_tables_computed() -> None:
    with bounded_building("component x"):
        layer = torch.nn.utils.skip_init(torch.nn.Linear, 1000, 1000)
        table = torch.outer(torch.arange(10.0), torch.arange(5.0)).cos()
    assert layer.weight.shape == (1000, 1000)
    assert table[0].tolist() == [1.0] * 5
