"""cluster.yaml is valid to Ray and to AWS, and keeps each line of the hygiene list in SECURITY.md."""

from __future__ import annotations

import copy
import ipaddress
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from botocore.session import Session
from botocore.validate import ParamValidator
from jsonschema import ValidationError
from ray.autoscaler._private.util import prepare_config, validate_config

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "cluster.yaml").read_text()


@pytest.fixture
def cluster() -> dict[str, Any]:
    return yaml.safe_load(TEXT)


@pytest.fixture
def nodes(cluster: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {name: kind["node_config"] for name, kind in cluster["available_node_types"].items()}


def validate(cluster: dict[str, Any]) -> dict[str, Any]:
    prepared = prepare_config(copy.deepcopy(cluster))
    validate_config(prepared)
    return prepared


def test_rays_own_schema_accepts_it(cluster: dict[str, Any]) -> None:
    validate(cluster)


def test_rays_own_schema_would_refuse_an_unknown_key(cluster: dict[str, Any]) -> None:
    cluster["available_node_types"]["head"]["idle_timeout"] = 3

    with pytest.raises(ValidationError, match="idle_timeout"):
        validate(cluster)


def test_aws_knows_every_parameter_of_every_node(nodes: dict[str, dict[str, Any]]) -> None:
    shape = Session().get_service_model("ec2").operation_model("RunInstances").input_shape
    for name, config in nodes.items():
        # Ray itself adds the counts and turns SubnetIds into one SubnetId.
        request = {k: v for k, v in config.items() if k != "SubnetIds"} | {"MinCount": 1, "MaxCount": 1}

        report = ParamValidator().validate(request, shape)

        assert not report.has_errors(), f"{name}: {report.generate_report()}"


def test_nothing_of_rays_defaults_for_aws_is_inherited(cluster: dict[str, Any]) -> None:
    commands = validate(cluster)

    for key in ("initialization_commands", "setup_commands", "head_setup_commands", "worker_setup_commands"):
        assert cluster[key] == [], f"{key} must be there and empty: missing means Ray's defaults"
    assert "ray-wheels" not in str(commands)
    assert "pip install" not in str(commands)


def test_the_head_does_no_work(cluster: dict[str, Any]) -> None:
    assert cluster["available_node_types"][cluster["head_node_type"]]["resources"] == {"CPU": 0}


def test_spot_first_then_a_few_on_demand(cluster: dict[str, Any], nodes: dict[str, dict[str, Any]]) -> None:
    kinds = cluster["available_node_types"]

    assert nodes["gpu_spot"]["InstanceMarketOptions"]["MarketType"] == "spot"
    assert "InstanceMarketOptions" not in nodes["gpu_ondemand"]
    assert kinds["gpu_spot"]["priority"] > kinds["gpu_ondemand"]["priority"]
    assert kinds["gpu_spot"]["max_workers"] > kinds["gpu_ondemand"]["max_workers"]
    assert "--env RAY_enable_autoscaler_v2=1" in cluster["docker"]["run_options"]  # priorities need it


def test_ssh_is_open_to_nobody_but_a_named_range(
    cluster: dict[str, Any], nodes: dict[str, dict[str, Any]]
) -> None:
    assert "security_group" not in cluster["provider"], "Ray adds SSH from 0.0.0.0/0 to a group it manages"
    assert all(config["SecurityGroupIds"] for config in nodes.values())
    group = network()["Resources"]["Nodes"]["Properties"]
    [ssh] = group["SecurityGroupIngress"]
    assert (ssh["FromPort"], ssh["ToPort"], ssh["CidrIp"]) == (22, 22, "SshFrom")
    pattern = network()["Parameters"]["SshFrom"]["AllowedPattern"]
    assert not re.fullmatch(pattern, "0.0.0.0/0")
    assert not re.fullmatch(pattern, "10.0.0.0/8")
    assert re.fullmatch(pattern, str(ipaddress.ip_network("203.0.113.0/24")))


def test_no_node_has_a_public_address(cluster: dict[str, Any], nodes: dict[str, dict[str, Any]]) -> None:
    assert cluster["provider"]["use_internal_ips"] is True
    for config in nodes.values():
        assert config["SubnetIds"]
        assert "NetworkInterfaces" not in config


def test_every_node_has_a_profile_of_its_own_kind(nodes: dict[str, dict[str, Any]]) -> None:
    profiles = {
        name: config["IamInstanceProfile"]["Arn"].rpartition("/")[2] for name, config in nodes.items()
    }

    assert profiles.pop("head") == "hqlabel-head"
    assert set(profiles.values()) == {"hqlabel-worker"}


def test_metadata_wants_a_token_and_goes_one_hop(nodes: dict[str, dict[str, Any]]) -> None:
    for config in nodes.values():
        assert config["MetadataOptions"]["HttpTokens"] == "required"
        assert config["MetadataOptions"]["HttpPutResponseHopLimit"] == 1


def test_image_and_machine_are_pinned(cluster: dict[str, Any], nodes: dict[str, dict[str, Any]]) -> None:
    assert re.search(r"@sha256:[0-9a-f]{64}$", cluster["docker"]["image"])
    for config in nodes.values():
        assert re.fullmatch(r"ami-[0-9a-f]{17}", config["ImageId"])


def test_disks_are_encrypted(nodes: dict[str, dict[str, Any]]) -> None:
    for config in nodes.values():
        assert all(disk["Ebs"]["Encrypted"] is True for disk in config["BlockDeviceMappings"])


def test_nothing_is_fetched_and_run_and_no_file_is_carried(cluster: dict[str, Any]) -> None:
    commands = [line for key, lines in cluster.items() if key.endswith("_commands") for line in lines]

    assert cluster["file_mounts"] == {}
    assert not [line for line in commands if re.search(r"curl|wget|\| *(ba)?sh", line)]


def test_dashboard_and_job_api_stay_on_loopback_and_want_the_token(cluster: dict[str, Any]) -> None:
    [start] = [line for line in cluster["head_start_ray_commands"] if "ray start" in line]

    assert "--dashboard-host=127.0.0.1" in start
    assert "--env RAY_AUTH_MODE=token" in cluster["docker"]["run_options"]
    for key in ("head_start_ray_commands", "worker_start_ray_commands"):
        lines = cluster[key]
        fetch = next(i for i, line in enumerate(lines) if "deploy/ray_token.py" in line)
        assert fetch < next(i for i, line in enumerate(lines) if "ray start" in line)


def test_every_node_offers_its_metrics_on_the_port_that_the_page_names(cluster: dict[str, Any]) -> None:
    starts = [
        line
        for key in ("head_start_ray_commands", "worker_start_ray_commands")
        for line in cluster[key]
        if "ray start" in line
    ]

    assert len(starts) == 2
    assert all("--metrics-export-port=8080" in line for line in starts)
    assert "port 8080" in (ROOT / "docs" / "cluster.md").read_text()


def test_no_secret_stands_in_the_file(cluster: dict[str, Any]) -> None:
    assert set(cluster["auth"]) <= {"ssh_user", "ssh_proxy_command", "ssh_proxy_use_node_id"}
    assert "aws_credentials" not in cluster["provider"]
    options = "\n".join(cluster["docker"]["run_options"])
    assert not re.search(r"TOKEN=|SECRET|PASSWORD|ACCESS_KEY|AUTH_TOKEN", options, flags=re.IGNORECASE)


def test_idle_machines_end_and_their_number_is_bounded(cluster: dict[str, Any]) -> None:
    assert 0 < cluster["idle_timeout_minutes"] <= 15
    assert cluster["provider"]["cache_stopped_nodes"] is False
    for name, kind in cluster["available_node_types"].items():
        if name != cluster["head_node_type"]:
            assert kind["min_workers"] == 0
            assert 0 < kind["max_workers"] <= cluster["max_workers"]
            assert 0 < kind["idle_timeout_s"] <= 900


class _Template(yaml.SafeLoader):
    """YAML with CloudFormation's `!Ref`, read as the name it refers to."""


_Template.add_constructor("!Ref", lambda loader, node: loader.construct_scalar(node))


def network() -> dict[str, Any]:
    return yaml.load((ROOT / "deploy" / "network.yaml").read_text(), Loader=_Template)


def test_the_network_template_is_sound_to_cloudformations_own_schema() -> None:
    cfnlint = pytest.importorskip("cfnlint.api")

    found = cfnlint.lint_file(ROOT / "deploy" / "network.yaml")

    assert [str(match) for match in found] == []


def test_the_group_lets_nothing_else_in() -> None:
    resources = network()["Resources"]
    inward = [r["Properties"] for r in resources.values() if r["Type"] == "AWS::EC2::SecurityGroupIngress"]

    assert [rule["SourceSecurityGroupId"] for rule in inward] == ["Nodes"]
    assert [rule["FromPort"] for rule in resources["Nodes"]["Properties"]["SecurityGroupEgress"]] == [443]
