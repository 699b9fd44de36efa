"""deploy/rayjob.yaml: Ray's own reader of KubeRay clusters accepts it, and its pods are closed."""

from __future__ import annotations

import itertools
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr

from hqlabel.jobs.load_config import ConfigSources

ROOT = Path(__file__).resolve().parents[2]

# Fields of ray.io/v1 as the KubeRay 1.6 API reference lists them.
JOB_FIELDS = (
    "activeDeadlineSeconds backoffLimit rayClusterSpec submitterPodTemplate metadata clusterSelector "
    "submitterConfig managedBy deletionStrategy entrypoint runtimeEnvYAML jobId submissionMode "
    "entrypointResources entrypointNumCpus entrypointNumGpus ttlSecondsAfterFinished "
    "shutdownAfterJobFinishes suspend"
)
CLUSTER_FIELDS = (
    "suspend managedBy autoscalerOptions headServiceAnnotations enableInTreeAutoscaling "
    "gcsFaultToleranceOptions headGroupSpec rayVersion workerGroupSpecs authOptions"
)
GROUP_FIELDS = (
    "suspend groupName replicas minReplicas maxReplicas idleTimeoutSeconds rayStartParams template "
    "scaleStrategy numOfHosts headService enableIngress serviceType resources labels"
)


@pytest.fixture
def job() -> dict[str, Any]:
    documents = yaml.safe_load_all((ROOT / "deploy" / "rayjob.yaml").read_text())
    return next(d for d in documents if d["kind"] == "RayJob")


@pytest.fixture
def groups(job: dict[str, Any]) -> list[dict[str, Any]]:
    cluster = job["spec"]["rayClusterSpec"]
    return [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]


def test_every_field_is_one_that_the_operator_knows(
    job: dict[str, Any], groups: list[dict[str, Any]]
) -> None:
    assert job["apiVersion"] == "ray.io/v1"
    assert set(job["spec"]) <= set(JOB_FIELDS.split())
    assert set(job["spec"]["rayClusterSpec"]) <= set(CLUSTER_FIELDS.split())
    for group in groups:
        assert set(group) <= set(GROUP_FIELDS.split())


def test_ray_reads_the_groups_as_meant(job: dict[str, Any]) -> None:
    cluster = {"metadata": job["metadata"], "spec": job["spec"]["rayClusterSpec"]}

    kinds = _derive_autoscaling_config_from_ray_cr(cluster)["available_node_types"]

    assert kinds["headgroup"]["resources"]["CPU"] == 0  # no work on the head
    assert (kinds["gpu"]["resources"]["CPU"], kinds["gpu"]["resources"]["GPU"]) == (8, 1)
    assert kinds["decode"]["resources"]["CPU"] == 16
    assert {kinds[name]["min_workers"] for name in ("gpu", "decode")} == {0}


def test_the_version_is_the_pinned_one(job: dict[str, Any]) -> None:
    pinned = re.search(r"^ray==(.+)$", (ROOT / "constraints.txt").read_text(), flags=re.MULTILINE)

    assert pinned is not None
    assert job["spec"]["rayClusterSpec"]["rayVersion"] == pinned.group(1)


def test_the_cluster_goes_when_the_job_is_over_and_never_stays_for_ever(job: dict[str, Any]) -> None:
    assert job["spec"]["shutdownAfterJobFinishes"] is True
    assert job["spec"]["activeDeadlineSeconds"] > 0
    assert job["spec"]["backoffLimit"] > 0


def test_pods_are_pinned_closed_and_not_root(groups: list[dict[str, Any]]) -> None:
    for group in groups:
        pod = group["template"]["spec"]
        [container] = pod["containers"]
        assert re.search(r"@sha256:[0-9a-f]{64}$", container["image"])
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert container["securityContext"]["allowPrivilegeEscalation"] is False
        assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
        shm = next(v for v in pod["volumes"] if v["name"] == "shm")
        assert shm["emptyDir"]["medium"] == "Memory"


def test_the_token_is_the_operators_and_no_secret_stands_here(job: dict[str, Any]) -> None:
    assert job["spec"]["rayClusterSpec"]["authOptions"] == {"mode": "token"}
    text = (ROOT / "deploy" / "rayjob.yaml").read_text()
    assert not re.search(r"TOKEN|SECRET_|PASSWORD|ACCESS_KEY", text)


def test_a_network_policy_stands_around_rays_ports() -> None:
    documents = list(yaml.safe_load_all((ROOT / "deploy" / "rayjob.yaml").read_text()))
    [policy] = [d for d in documents if d["kind"] == "NetworkPolicy"]
    inner, outer, scrapes = policy["spec"]["ingress"]

    assert policy["spec"]["policyTypes"] == ["Ingress"]
    assert inner["from"] == [{"podSelector": policy["spec"]["podSelector"]}]
    assert outer["ports"] == [{"protocol": "TCP", "port": 8265}]
    assert scrapes["ports"] == [{"protocol": "TCP", "port": 8080}]
    assert "podSelector" not in scrapes["from"][0]


def test_the_entrypoint_waits_for_its_first_node_and_uses_all_that_may_come(job: dict[str, Any]) -> None:
    words = shlex.split(job["spec"]["entrypoint"])
    given = dict(zip(words[2::2], words[3::2], strict=True))
    sets = [word for flag, word in itertools.pairwise(words) if flag == "--set"]

    config = ConfigSources(sets=sets).load()

    assert words[:2] == ["hqlabel", "label"]
    assert set(given) == {"--images", "--boxes", "--checkpoint", "--output", "--set"}
    [gpu] = [g for g in job["spec"]["rayClusterSpec"]["workerGroupSpecs"] if g["groupName"] == "gpu"]
    assert gpu["minReplicas"] == 0, "so the job must wait, and must not take a decode node for its model"
    assert (config.cluster.gpus_per_actor, config.cluster.actors) == (1, gpu["maxReplicas"])
    assert config.cluster.actors_min == 1
    assert config.cluster.wait_for_nodes_s >= 600
