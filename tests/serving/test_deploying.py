"""What examples/serving gives to others: it is well formed, and says what the code takes."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from diffkiln.errors import Incompatible

FOLDER = Path(__file__).parents[2] / "examples" / "serving"
MANIFEST = yaml.safe_load((FOLDER / "rayservice.yaml").read_text())
CONFIGURATIONS = (
    yaml.safe_load((FOLDER / "serve.yaml").read_text()),
    yaml.safe_load(MANIFEST["spec"]["serveConfigV2"]),
)


def test_the_image_has_what_a_server_needs_and_no_compiler():
    text = (FOLDER / "Dockerfile").read_text()
    assert "ARG EXTRAS=serve\n" in text
    assert not re.search(r"^[^#]*compile", text, re.MULTILINE)
    copied = [path for line in re.findall(r"^COPY (?!--)(.*)$", text, re.MULTILINE) for path in line.split()[:-1]]
    assert all((FOLDER.parents[1] / path).exists() for path in copied)


def test_the_unit_starts_a_command_that_there_is():
    from diffkiln.cli import cli

    (line,) = re.findall(r"^ExecStart=(.*)$", (FOLDER / "diffkiln.service").read_text(), re.MULTILINE)
    words = line.split()
    known = {name for item in cli.commands["serve"].params for name in item.opts}
    assert words[1] == "serve"
    assert {word for word in words if word.startswith("--")} <= known


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not on this machine")
def test_systemd_reads_the_unit(tmp_path):
    unit = tmp_path / "diffkiln.service"
    text = (FOLDER / "diffkiln.service").read_text()
    unit.write_text(text.replace("/opt/diffkiln/bin/diffkiln", sys.executable))
    done = subprocess.run(["systemd-analyze", "verify", str(unit)], capture_output=True, text=True, check=False)
    about = [line for line in done.stderr.splitlines() if "diffkiln.service" in line]
    assert about == []


@pytest.mark.more
@pytest.mark.filterwarnings("ignore")  # Ray's own
def test_the_configurations_are_serves_and_ours():
    from ray.serve.schema import ServeDeploySchema

    from diffkiln.serving import ray

    for configuration in CONFIGURATIONS:
        ServeDeploySchema.model_validate(configuration)
        (application,) = configuration["applications"]
        module, _, name = application["import_path"].partition(":")
        assert module == ray.__name__
        assert getattr(ray, name) is ray.build
        ray.build(ray.Options.model_validate(application["args"]))


@pytest.mark.more
@pytest.mark.filterwarnings("ignore")  # Ray's own
def test_what_is_deployed_has_the_options_that_were_given():
    from diffkiln.serving.ray import app

    given = app("bundle", replicas=(2, 6), gpus=0.5, cpus=2, ongoing=8, queue=32, fronts=3, drain_seconds=45)
    front, replica = given._bound_deployment, given._bound_deployment.init_args[1]._bound_deployment
    scale = replica._deployment_config.autoscaling_config
    assert (scale.min_replicas, scale.max_replicas, scale.target_ongoing_requests) == (2, 6, 4)
    assert replica.ray_actor_options == {"num_cpus": 2, "num_gpus": 0.5}
    assert (replica.max_ongoing_requests, replica.max_queued_requests) == (8, 32)
    assert replica._deployment_config.graceful_shutdown_timeout_s == 45
    assert (front.num_replicas, front.ray_actor_options) == (3, {"num_cpus": 0})
    fixed = app("bundle", replicas=3, gpus=1)._bound_deployment.init_args[1]._bound_deployment
    assert (fixed.num_replicas, fixed._deployment_config.autoscaling_config) == (3, None)
    assert fixed.ray_actor_options["num_gpus"] == 1
    shared = app("bundle", processes=2, gpus=1, cpus=4)._bound_deployment.init_args[1]._bound_deployment
    assert shared._replica_config.placement_group_bundles == [{"CPU": 4, "GPU": 1}] * 2


@pytest.mark.more
@pytest.mark.filterwarnings("ignore")  # Ray's own
@pytest.mark.parametrize(
    "wrong",
    [
        {"replicas": (4, 2)},
        {"replicas": 0},
        {"gpus": -0.5},
        {"gpus": 1.5},
        {"ongoing": 0},
        {"processes": 0},
        {"processes": 10**9},
    ],
)
def test_options_that_cannot_be_are_refused(wrong):
    from pydantic import ValidationError

    from diffkiln.serving.ray import app

    with pytest.raises(ValidationError, match=next(iter(wrong))):
        app("bundle", **wrong)


@pytest.mark.more
def test_the_manifest_holds_pods_that_kubernetes_takes():
    import kubernetes_validate

    cluster = MANIFEST["spec"]["rayClusterConfig"]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "pod"}, **group["template"]}
        kubernetes_validate.validate(pod, kubernetes_validate.latest_version(), strict=True)
        assert group["rayStartParams"] is not None


@pytest.mark.more
def test_the_dockerfile_passes_hadolint():
    command = [str(Path(sys.executable).with_name("hadolint")), str(FOLDER / "Dockerfile")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


@pytest.mark.more
@pytest.mark.slow
def test_the_demo_draws(drawing, tmp_path):
    configuration = yaml.safe_load((FOLDER / "serve.yaml").read_text())
    configuration["applications"][0]["args"]["bundles"] = {"digits": str(drawing)}
    configuration["http_options"]["port"] = 8267
    (tmp_path / "serve.yaml").write_text(yaml.safe_dump(configuration))
    command = [sys.executable, str(FOLDER / "demo.py"), str(tmp_path / "serve.yaml")]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "10 digits by 2 replicas" in done.stdout
    assert len(list((tmp_path / "build" / "served-digits").glob("*.png"))) == 10


@pytest.mark.more
@pytest.mark.filterwarnings("ignore")  # Ray's own
def test_processes_without_a_share_of_their_machine_are_refused():
    from diffkiln.serving.ray import app

    with pytest.raises(Incompatible, match="Give cpus or gpus above 0"):
        app("bundle", processes=2, cpus=0)


@pytest.mark.more
@pytest.mark.filterwarnings("ignore")  # Ray's own
def test_a_bundle_that_is_here_is_asked_how_many_processes_it_has(tmp_path, monkeypatch):
    from diffkiln.serving import ray, ray_processes

    monkeypatch.setattr(ray_processes, "processes_of", lambda _: 1)
    assert ray.app(tmp_path, processes=1)
    with pytest.raises(Incompatible, match=r'runs in 1 process\(es\), and a replica has 2\. Say "processes": 1'):
        ray.app(tmp_path, processes=2)
