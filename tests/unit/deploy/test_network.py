"""NetworkPolicy, PodMonitor, ports of containers and docs/security.md agree; only an autoscaler gets an API token."""

from __future__ import annotations

import re
from typing import Any

import pytest

from tests.unit.deploy.overlays import ROOT, Group, Overlay

pytestmark = pytest.mark.process

INSTANCE, COMPONENT = "app.kubernetes.io/instance", "app.kubernetes.io/component"


def ports_of(group: Group) -> dict[str, int]:
    return {port["name"]: port["containerPort"] for port in group.container["ports"]}


def documented() -> dict[tuple[str, int], str]:
    """Name and port in the table of docs/security.md, and who reaches it."""
    rows = re.findall(r"^\| `([\w-]+)` \| (\d+) \| (.+) \|$", (ROOT / "docs/security.md").read_text(), re.MULTILINE)
    return {(name, int(port)): who for name, port, who in rows}


def selects(peer: dict[str, Any], labels: dict[str, str]) -> bool:
    return peer.get("podSelector", {}).get("matchLabels", {}).items() <= labels.items()


def rules(overlay: Overlay) -> dict[str, list[int] | None]:
    """The ports that each peer may reach; None: all of them."""
    found: dict[str, list[int] | None] = {}
    for rule in overlay.one("NetworkPolicy")["spec"]["ingress"]:
        (peer,) = rule["from"]
        ports = [port["port"] for port in rule["ports"]] if "ports" in rule else None
        assert all(port["protocol"] == "TCP" for port in rule.get("ports", []))
        if "namespaceSelector" in peer:
            (expression,) = peer["namespaceSelector"]["matchExpressions"]
            assert expression["key"] == "kubernetes.io/metadata.name" and expression["operator"] == "In"
            (name,) = expression["values"]
        else:
            assert peer["podSelector"]["matchLabels"][INSTANCE] == overlay.ray["metadata"]["name"]
            name = peer["podSelector"]["matchLabels"][COMPONENT]
        assert name not in found
        found[name] = ports
    return found


def test_every_pod_of_ray_is_guarded(overlay: Overlay) -> None:
    spec = overlay.one("NetworkPolicy")["spec"]
    assert spec["policyTypes"] == ["Ingress"]
    for group in overlay.groups:
        assert spec["podSelector"]["matchLabels"].items() <= group.labels.items()
        assert group.labels[INSTANCE] == overlay.ray["metadata"]["name"]  # other runs have other names


def test_who_reaches_what(overlay: Overlay) -> None:
    ports = ports_of(overlay.head)
    expected: dict[str, list[int] | None] = {
        "ray": None,
        "submitter": [ports["dashboard"]],
        "kuberay-operator": [ports["dashboard"]],
    }
    if overlay.all_of("PodMonitor"):
        expected["monitoring"] = [ports["metrics"]]
    assert rules(overlay) == expected


def test_the_submitter_is_the_one_that_the_policy_lets_in(overlay: Overlay) -> None:
    if overlay.job is not None:
        labels = overlay.job["submitterPodTemplate"]["metadata"]["labels"]
        peers = [rule["from"][0] for rule in overlay.one("NetworkPolicy")["spec"]["ingress"]]
        own = [peer for peer in peers if "namespaceSelector" not in peer and selects(peer, labels)]
        assert [peer["podSelector"]["matchLabels"][COMPONENT] for peer in own] == ["submitter"]


def test_only_pods_of_ray_reach_redis(overlay: Overlay) -> None:
    policies = [each for each in overlay.all_of("NetworkPolicy") if each != overlay.one("NetworkPolicy")]
    assert len(policies) == len(overlay.all_of("StatefulSet"))
    for policy, redis in zip(policies, overlay.all_of("StatefulSet"), strict=True):
        template = redis["spec"]["template"]
        assert policy["spec"]["podSelector"]["matchLabels"].items() <= template["metadata"]["labels"].items()
        (container,) = template["spec"]["containers"]
        (rule,) = policy["spec"]["ingress"]
        assert [port["port"] for port in rule["ports"]] == [port["containerPort"] for port in container["ports"]]
        (peer,) = rule["from"]
        assert selects(peer, overlay.head.labels) and not selects(peer, template["metadata"]["labels"])


def test_metrics_are_scraped_where_they_are(overlay: Overlay) -> None:
    assert bool(overlay.all_of("PodMonitor")) == (overlay.name != "cpu-demo")
    for monitor in overlay.all_of("PodMonitor"):
        (endpoint,) = monitor["spec"]["podMetricsEndpoints"]
        for group in overlay.groups:
            assert monitor["spec"]["selector"]["matchLabels"].items() <= group.labels.items()
            assert endpoint["port"] in ports_of(group)


def test_the_documents_name_each_port(overlay: Overlay) -> None:
    ports = {pair for group in overlay.groups for pair in ports_of(group).items()}
    for redis in overlay.all_of("StatefulSet"):
        ports |= {(p["name"], p["containerPort"]) for p in redis["spec"]["template"]["spec"]["containers"][0]["ports"]}
    assert ports <= set(documented())
    for name in ("dashboard", "metrics"):
        (who,) = (who for (documented_name, _), who in documented().items() if documented_name == name)
        allowed = [peer for peer, reached in rules(overlay).items() if reached == [ports_of(overlay.head)[name]]]
        assert all(peer in who for peer in allowed)


def test_only_a_head_with_an_autoscaler_has_a_token_for_the_kubernetes_api(overlay: Overlay) -> None:
    account = overlay.one("ServiceAccount")
    assert account["automountServiceAccountToken"] is False
    pods = [group.pod for group in overlay.groups]
    pods += [overlay.job["submitterPodTemplate"]["spec"]] if overlay.job else []
    for pod in pods:
        assert pod["serviceAccountName"] == account["metadata"]["name"]
        has_autoscaler = pod is overlay.head.pod and overlay.is_autoscaled
        assert pod.get("automountServiceAccountToken", False) == has_autoscaler
    for redis in overlay.all_of("StatefulSet"):
        assert redis["spec"]["template"]["spec"]["automountServiceAccountToken"] is False
