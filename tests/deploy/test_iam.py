"""The policies give each role what it needs, no more; the bucket refuses what the product never does."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
IAM = ROOT / "deploy" / "iam"


def statements(name: str) -> list[dict[str, Any]]:
    document = json.loads((IAM / f"{name}.json").read_text())
    assert document["Version"] == "2012-10-17"
    return document["Statement"]


def as_list(value: str | list[str]) -> list[str]:
    return [value] if isinstance(value, str) else value


def actions(name: str) -> set[str]:
    return {action for statement in statements(name) for action in as_list(statement["Action"])}


@pytest.mark.parametrize("name", ["worker", "head", "clean"])
def test_no_role_has_a_wildcard_action(name: str) -> None:
    assert not [action for action in actions(name) if "*" in action]


@pytest.mark.parametrize("name", ["worker", "head", "clean"])
def test_everything_but_looking_around_is_bound_to_named_things(name: str) -> None:
    unbound = {
        action
        for statement in statements(name)
        for action in as_list(statement["Action"])
        if as_list(statement["Resource"]) == ["*"]
    }

    assert not {a for a in unbound if not re.match(r"ec2:Describe|ecr:GetAuthorizationToken$", a)}


@pytest.mark.parametrize("name", ["worker", "head"])
def test_a_running_job_can_delete_nothing(name: str) -> None:
    assert not [action for action in actions(name) if action.startswith("s3:Delete")]


def test_workers_touch_no_machine() -> None:
    assert not [action for action in actions("worker") if action.startswith(("ec2:", "iam:"))]


@pytest.mark.parametrize("name", ["worker", "head"])
def test_writes_go_to_the_output_alone_and_listing_is_by_prefix(name: str) -> None:
    for statement in statements(name):
        granted = as_list(statement["Action"])
        if "s3:PutObject" in granted:
            assert as_list(statement["Resource"]) == ["arn:aws:s3:::OUTPUT-BUCKET/OUTPUT-PREFIX/*"]
        if "s3:ListBucket" in granted:
            assert statement["Condition"]["StringLike"]["s3:prefix"].endswith("-PREFIX/*")


def test_the_head_launches_only_what_cluster_yaml_lists() -> None:
    cluster = yaml.safe_load((ROOT / "cluster.yaml").read_text())
    launch = next(s for s in statements("head") if s["Sid"].startswith("LaunchListed"))
    conditions = launch["Condition"]["StringEquals"]
    kinds = cluster["available_node_types"]

    workers = {
        kind["node_config"]["InstanceType"]
        for name, kind in kinds.items()
        if name != cluster["head_node_type"]
    }
    assert set(conditions["ec2:InstanceType"]) == workers
    assert conditions["aws:RequestTag/ray-cluster-name"] == cluster["cluster_name"]
    assert conditions["ec2:MetadataHttpTokens"] == "required"


def test_the_head_ends_only_machines_of_its_own_cluster_and_passes_only_the_workers_role() -> None:
    by_action = {action: s for s in statements("head") for action in as_list(s["Action"])}

    end = by_action["ec2:TerminateInstances"]
    assert end["Condition"] == {"StringEquals": {"aws:ResourceTag/ray-cluster-name": "hqlabel"}}
    assert by_action["iam:PassRole"]["Resource"].endswith(":role/hqlabel-worker")


def test_deleting_is_a_role_of_its_own_that_cannot_write() -> None:
    assert "s3:DeleteObject" in actions("clean")
    assert "s3:PutObject" not in actions("clean")


def test_the_bucket_wants_tls_and_refuses_to_replace_a_commit() -> None:
    tls, commits = statements("output-bucket")

    assert tls["Effect"] == commits["Effect"] == "Deny"
    assert tls["Condition"] == {"Bool": {"aws:SecureTransport": "false"}}
    assert commits["Condition"]["Null"] == {"s3:if-none-match": "true"}
    assert commits["Condition"]["Bool"] == {
        "s3:ObjectCreationOperation": "true"
    }  # parts of uploads are exempt
    assert {resource.rpartition("OUTPUT-PREFIX/")[2] for resource in commits["Resource"]} == {
        "job.json",
        "plan/*",
        "units/*",
    }
