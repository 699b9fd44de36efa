"""deploy/gcp.yaml is valid to Ray and keeps the rules of cluster.yaml that apply to GCP."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def cluster() -> dict[str, Any]:
    return yaml.safe_load((ROOT / "deploy" / "gcp.yaml").read_text())


@pytest.fixture
def twin() -> dict[str, Any]:
    return yaml.safe_load((ROOT / "cluster.yaml").read_text())


def test_rays_own_schema_accepts_it(cluster: dict[str, Any]) -> None:
    validate_config(prepare_config(copy.deepcopy(cluster)))


def test_it_has_the_node_types_limits_and_switches_of_its_twin(
    cluster: dict[str, Any], twin: dict[str, Any]
) -> None:
    for name in ("cluster_name", "max_workers", "idle_timeout_minutes", "head_node_type"):
        assert cluster[name] == twin[name]
    for name, kind in twin["available_node_types"].items():
        mine = cluster["available_node_types"][name]
        for setting in ("min_workers", "max_workers", "priority", "idle_timeout_s", "labels"):
            assert mine.get(setting) == kind.get(setting), (name, setting)
    assert cluster["docker"]["run_options"] == twin["docker"]["run_options"]


def test_the_head_does_no_work_and_nodes_have_accounts_of_their_own(cluster: dict[str, Any]) -> None:
    kinds = cluster["available_node_types"]
    accounts = {name: kind["node_config"]["serviceAccounts"][0]["email"] for name, kind in kinds.items()}

    assert kinds["head"]["resources"] == {"CPU": 0}
    assert accounts.pop("head").startswith("hqlabel-head@")
    assert all(account.startswith("hqlabel-worker@") for account in accounts.values())


def test_no_node_has_a_public_address_and_no_secret_stands_here(cluster: dict[str, Any]) -> None:
    assert cluster["provider"]["use_internal_ips"] is True
    for kind in cluster["available_node_types"].values():
        [network] = kind["node_config"]["networkInterfaces"]
        assert "accessConfigs" not in network
    assert not re.search(r"TOKEN=|SECRET_|PASSWORD|private_key", (ROOT / "deploy" / "gcp.yaml").read_text())


def test_the_token_is_fetched_before_ray_starts_and_the_dashboard_stays_on_loopback(
    cluster: dict[str, Any],
) -> None:
    for key in ("head_start_ray_commands", "worker_start_ray_commands"):
        fetch, start = cluster[key][1:]
        assert "ray_token.py gs://" in fetch
        assert "ray start" in start
        assert "--metrics-export-port=8080" in start
    assert "--dashboard-host=127.0.0.1" in cluster["head_start_ray_commands"][2]


def test_the_image_is_pinned(cluster: dict[str, Any]) -> None:
    assert re.search(r"@sha256:[0-9a-f]{64}$", cluster["docker"]["image"])
