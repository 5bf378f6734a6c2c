"""Profiles: what is refused, and how a component's settings are laid over those of all steps."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from ling_flow.config import parse
from ling_flow.errors import UserError
from ling_flow.flow.job_settings import JobSettings
from ling_flow.flow.kubeflow_tasks import check_components
from ling_flow.flow.profile import LAUNCHER, Profile, Retries, read_profile

SMALL: dict[str, Any] = {"image": "ling:1", "artifacts": "s3://bucket/artifacts"}


def read(directory: Path, **changes: Any) -> Profile:
    path = directory / "p.yaml"
    path.write_text(yaml.safe_dump({**SMALL, **changes}))
    return read_profile(str(path))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"imge": "x"}, "p.yaml.imge: unknown field; did you mean 'image'?"),
        ({"steps": {"node_selectr": {}}}, "p.yaml.steps.node_selectr: unknown field; did you mean 'node_selector'?"),
        ({"components": {"pretrain": {"resource": {}}}}, "components.pretrain.resource: unknown field; did you mean"),
        ({"steps": {"resources": {"cpus": 0}}}, "p.yaml.steps.resources.cpus: input should be greater than 0"),
        ({"steps": {"run_on": "ray"}}, "p.yaml.steps.run_on: input should be 'process', 'ray-job' or 'rayjob'"),
        ({"steps": {"run_on": "ray-job"}}, "p.yaml.steps.ray_address: is needed with run_on: ray-job"),
        ({"components": {"pretrain": {"run_on": "ray-job"}}}, "components.pretrain.ray_address: is needed"),
        ({"artifacts": "/data/artifacts"}, "p.yaml.artifacts: /data/artifacts is a directory on none of the volumes"),
        (
            {"artifacts": "/database", "volumes": [{"claim": "data", "path": "/data"}]},
            "p.yaml.artifacts: /database is a directory on none",
        ),
        ({"mlflow": "sqlite:///mlflow.db"}, "p.yaml.mlflow: must be a server's URL"),
        ({"steps": {"env": {"LING_FLOW_RUN_ON": "x"}}}, "p.yaml.steps.env.LING_FLOW_RUN_ON: is set by the profile"),
        (
            {"steps": {"env": {"A": "x"}, "secrets": [{"env": "A", "secret": "s", "key": "k"}]}},
            "p.yaml.steps.env.A: comes from a secret already",
        ),
        (
            {"steps": {"tolerations": [{"key": "spot", "operator": "Exists", "value": "yes"}]}},
            "p.yaml.steps.tolerations: spot: with operator Exists there is no value",
        ),
        ({"mlflow": "https://a:b@mlflow"}, "p.yaml.mlflow: user and password would be readable"),
        ({"artifacts": "s3://a:b@bucket/x"}, "p.yaml.artifacts: user and password would be readable"),
        (
            {"steps": {"env": {"AWS_SECRET_ACCESS_KEY": "x"}}},
            "p.yaml.steps.env.AWS_SECRET_ACCESS_KEY: would be readable",
        ),
        ({"steps": {"env": {"PROXY": "http://a:b@proxy"}}}, "p.yaml.steps.env.PROXY: would be readable"),
        ({"steps": {"job": {"env": {"HF_TOKEN": "x"}}}}, "p.yaml.steps.job.env.HF_TOKEN: would be readable"),
        (
            {"components": {"pretrain": {"run_on": "ray-job", "ray_address": "http://a:b@head"}}},
            "p.yaml.components.pretrain.ray_address: user and password would be readable",
        ),
        ({"kfp": {"host": "kubeflow"}}, "p.yaml.kfp.host"),
        ({"image": None}, "p.yaml.image"),
    ],
)
def test_what_is_wrong_is_one_line(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError) as error:
        read(tmp_path, **changes)
    assert said in str(error.value) and "\n" not in str(error.value)


def test_no_such_profile() -> None:
    with pytest.raises(UserError, match="--profile gpus: not found; known: gpu, local"):
        read_profile("gpus")
    with pytest.raises(UserError, match=r"nowhere\.yaml: no such file"):
        read_profile("nowhere.yaml")


def test_unknown_components_and_wishes_they_cannot_fulfil(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"p\.components\.pretran: no such component; did you mean 'pretrain'\?"):
        check_components(read(tmp_path, components={"pretran": {}}), "p", [])
    with pytest.raises(UserError, match=r"p\.components\.register\.run_on: register always runs in its step"):
        check_components(read(tmp_path, components={"register": {"run_on": "rayjob"}}), "p", [])


def test_a_components_settings_are_laid_over_those_of_all_steps(tmp_path: Path) -> None:
    from components.pretrain import pretrain
    from components.register import register

    profile = read(
        tmp_path,
        steps={
            "env": {"A": "1", "B": "2"},
            "secrets": [{"env": "S", "secret": "s", "key": "k"}],
            "run_on": "rayjob",
            "retries": {"count": 5, "wait_s": 1},
            "job": {"cluster": {"workers": 2, "service_account": "ray"}},
        },
        components={
            "pretrain": {
                "image": "ling:cuda", "env": {"B": "3"}, "retries": {"count": 1}, "resources": {"cpus": 8, "gpus": 2},
                "secrets": [{"env": "T", "secret": "t", "key": "k"}], "job": {"cluster": {"workers": 4}},
            }
        },
    )  # fmt: skip
    heavy, light = profile.of(pretrain), profile.of(register)
    assert heavy.env == {"A": "1", "B": "3"} and light.env == {"A": "1", "B": "2"}
    assert [secret.env for secret in heavy.secrets] == ["S", "T"]
    assert (heavy.retries.count, heavy.retries.wait_s, light.retries.count) == (1, 1, 5)
    assert (heavy.image, light.image) == ("ling:cuda", "ling:1")
    assert (heavy.run_on, light.run_on) == ("rayjob", "process")
    assert light.resources == register.resources and profile.pod_resources(light) == register.resources
    assert profile.pod_resources(heavy) == LAUNCHER

    job = parse(JobSettings, profile.environment(heavy)["LING_FLOW_JOB"], "LING_FLOW_JOB")
    assert job.resources is not None and (job.resources.cpus, job.resources.gpus) == (8, 2)
    assert (job.cluster.workers, job.cluster.service_account, job.cluster.image) == (4, "ray", "ling:cuda")
    assert [secret.env for secret in job.cluster.secrets] == ["S", "T"]
    assert job.env == {"A": "1", "B": "3"}
    assert "LING_FLOW_JOB" not in profile.environment(light)


def test_the_gpu_profile_reserves_no_gpu_that_a_step_cannot_use() -> None:
    from components.capability_pass import capability_pass
    from components.evaluate import evaluate
    from components.preference_pass import preference_pass

    profile = read_profile("gpu")
    for component in (capability_pass, preference_pass, evaluate):  # they use one device
        assert profile.of(component).resources.gpus == 1, component.name


def test_a_given_ray_cluster(tmp_path: Path) -> None:
    from components.pretrain import pretrain

    profile = read(tmp_path, steps={"run_on": "ray-job", "ray_address": "http://ray:8265"}, mlflow="http://m:5000")
    environment = profile.environment(profile.of(pretrain))
    assert environment["LING_FLOW_RUN_ON"] == "ray-job" and environment["RAY_ADDRESS"] == "http://ray:8265"
    assert environment["MLFLOW_TRACKING_URI"] == "http://m:5000"
    assert json.loads(environment["LING_FLOW_JOB"])["resources"]["cpus"] == pretrain.resources.cpus


def test_artifacts_on_a_volume(tmp_path: Path) -> None:
    assert read(tmp_path, artifacts="/data/a", volumes=[{"claim": "data", "path": "/data"}]).artifacts == "/data/a"


def test_the_window_holds_every_try_and_wait() -> None:
    assert Retries(count=0).window_s(100) == 100
    assert Retries(count=3, wait_s=10, factor=2).window_s(100) == 4 * 100 + 10 + 20 + 40


def test_deploy_is_told_the_namespace_of_its_rayservice(tmp_path: Path) -> None:
    from components.deploy import deploy

    file = tmp_path / "mine.yaml"
    own = {"job": {"cluster": {"namespace": "serving"}}}
    file.write_text(json.dumps({"image": "x", "artifacts": "s3://b/a", "components": {"deploy": own}}))
    profile = read_profile(str(file))
    environment = profile.environment(profile.of(deploy))
    assert environment["LING_FLOW_RUN_ON"] == "process"
    assert json.loads(environment["LING_FLOW_JOB"])["cluster"]["namespace"] == "serving"
