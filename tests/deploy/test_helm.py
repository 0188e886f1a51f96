"""The Helm chart: rendered by Helm's own library, held against Kubernetes' schemas, offline."""

from __future__ import annotations

import tomllib
from collections.abc import Iterator
from typing import Any

import pytest

helm = pytest.importorskip("helm_python", reason="make test installs helm-python-sdk")

import kubernetes_validate  # noqa: E402
import yaml  # noqa: E402

from kvstore.config import load  # noqa: E402
from tests.support.daemon import REPOSITORY  # noqa: E402

CHART = REPOSITORY / "deploy" / "helm" / "kvstore"
KUBERNETES = ("1.28", "1.34")
# Prometheus' operator brings this kind; Kubernetes' own schemas do not know it.
FOREIGN = {"PodMonitor"}
SEVERITY_WARNING = 2

EVERYTHING: dict[str, Any] = {
    "arena": {"kind": "memory"},
    "disk": {"enabled": True},
    "gpu": {"enabled": True, "runtimeClassName": "nvidia"},
    "admin": {"secret": "kvstore-admin", "allowedHosts": ["kv.example.org"]},
    "podMonitor": {
        "enabled": True,
        "tokenSecret": "scrape",
        "labels": {"release": "prometheus"},
        "tlsConfig": {"serverName": "kv.example.org"},
    },
    "networkPolicy": {
        "monitoring": [{"namespaceSelector": {"matchLabels": {"name": "monitoring"}}}],
        "egress": [{"to": [{"ipBlock": {"cidr": "10.0.0.0/8"}}]}],
    },
    "config": {
        "server": {"allowed_uids": [1000]},
        "tiers": {"host": {"capacity": "64GiB"}, "redis": {"url": "redis://cache:6379"}},
        "tenants": {"blue": {"quota": "8GiB"}},
    },
    "tolerations": [{"operator": "Exists"}],
    "nodeSelector": {"gpu": "yes"},
    "priorityClassName": "system-node-critical",
    "imagePullSecrets": [{"name": "registry"}],
    "podLabels": {"team": "serving"},
    "podAnnotations": {"note": "kept"},
}
CASES: dict[str, dict[str, Any]] = {
    "default": {},
    "everything": EVERYTHING,
    "hugepages": {
        "arena": {"kind": "hugepages"},
        "resources": {"cpu": "1", "memory": "1Gi", "hugepages-2Mi": "16Gi"},
    },
    "insecure": {"admin": {"insecure": True}, "podMonitor": {"enabled": True}},
    "closed": {"admin": {"enabled": False}, "networkPolicy": {"enabled": False}},
}


@pytest.fixture(scope="module")
def chart() -> Iterator[Any]:
    with helm.Chart.load(CHART) as loaded:
        yield loaded


def render(chart: Any, values: dict[str, Any]) -> dict[str, dict[str, Any]]:
    files = chart.render(values, name="kv", namespace="serving")
    texts = [text for name, text in files.items() if name.endswith(".yaml")]
    found = [made for text in texts for made in yaml.safe_load_all(text) if made]
    return {made["kind"]: made for made in found}


def config_of(made: dict[str, dict[str, Any]]) -> str:
    return str(made["ConfigMap"]["data"]["kvstore.toml"])


@pytest.mark.parametrize("case", CASES)
def test_what_is_rendered_is_what_kubernetes_knows(chart, case):
    made = render(chart, CASES[case])
    for kind, resource in made.items():
        if kind not in FOREIGN:
            for version in KUBERNETES:
                kubernetes_validate.validate(resource, version, strict=True)
    assert {"ConfigMap", "DaemonSet"} <= set(made)


@pytest.mark.parametrize("case", CASES)
def test_the_daemon_accepts_the_configuration(chart, case, tmp_path):
    file = tmp_path / "kvstore.toml"
    file.write_text(config_of(render(chart, CASES[case])))
    config = load(file, {}, ())
    assert str(config.server.socket) == "/run/kvstore/kvstore.sock"
    listens = config.admin.listen
    expected = {"default": "127.0.0.1:7411", "closed": "None"}.get(case, "")
    if case == "hugepages":
        expected = "127.0.0.1:7411"
    assert str(listens) == (expected or "0.0.0.0:7411")


def test_values_reach_the_configuration(chart):
    config = tomllib.loads(config_of(render(chart, EVERYTHING)))
    assert config["tiers"]["host"] == {"arena": "/memory/arena", "capacity": "64GiB"}
    assert config["tiers"]["disk"] == {"path": "/var/lib/kvstore/disk", "capacity": "200GiB"}
    assert config["tenants"]["blue"]["quota"] == "8GiB"
    assert config["admin"]["token_file"] == "/run/secrets/kvstore/tokens"


def test_the_pod_may_do_little_and_is_guaranteed(chart):
    for case in CASES.values():
        pod = render(chart, case)["DaemonSet"]["spec"]["template"]["spec"]
        (container,) = pod["containers"]
        held = container["securityContext"]
        assert held["readOnlyRootFilesystem"] is True
        assert held["allowPrivilegeEscalation"] is False
        assert held["capabilities"] == {"drop": ["ALL"]}
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["automountServiceAccountToken"] is False
        assert not {"hostIPC", "hostPID", "hostNetwork"} & set(pod)
        for each in (container, *pod["initContainers"]):
            assert each["resources"]["requests"] == each["resources"]["limits"]


def test_it_mounts_what_it_names_and_names_what_it_mounts(chart):
    for case in CASES.values():
        pod = render(chart, case)["DaemonSet"]["spec"]["template"]["spec"]
        volumes = {volume["name"] for volume in pod["volumes"]}
        mounted = {mount["name"] for mount in pod["containers"][0]["volumeMounts"]}
        assert mounted == volumes
        for container in pod["initContainers"]:
            assert {mount["name"] for mount in container["volumeMounts"]} <= volumes


def test_nothing_comes_in_unless_it_is_named(chart):
    assert render(chart, {})["NetworkPolicy"]["spec"]["ingress"] == []
    spec = render(chart, EVERYTHING)["NetworkPolicy"]["spec"]
    (rule,) = spec["ingress"]
    assert rule["ports"] == [{"port": 7411, "protocol": "TCP"}]
    assert spec["egress"][1] == {"to": [{"ipBlock": {"cidr": "10.0.0.0/8"}}]}


def test_other_daemons_come_in_where_they_are_named(chart):
    rule = {"ports": [{"port": 7412, "protocol": "TCP"}]}
    made = render(chart, {"networkPolicy": {"ingress": [rule]}})["NetworkPolicy"]
    kubernetes_validate.validate(made, KUBERNETES[-1], strict=True)
    assert made["spec"]["ingress"] == [rule]


def test_the_pod_answers_to_its_address_where_it_is_asked_from_elsewhere(chart, tmp_path):
    def environment(values: dict[str, Any]) -> list[dict[str, Any]]:
        (container,) = render(chart, values)["DaemonSet"]["spec"]["template"]["spec"]["containers"]
        return container.get("env", [])

    assert environment({}) == []
    address, hosts = environment(EVERYTHING)
    assert address["valueFrom"] == {"fieldRef": {"fieldPath": "status.podIP"}}
    assert hosts["value"] == "$(POD_IP),kv.example.org"
    file = tmp_path / "kvstore.toml"
    file.write_text(config_of(render(chart, EVERYTHING)))
    given = {"POD_IP": "10.1.2.3", hosts["name"]: "10.1.2.3,kv.example.org"}
    assert load(file, given, ()).admin.allowed_hosts == ("10.1.2.3", "kv.example.org")


def test_scraping_goes_over_tls_with_a_token(chart):
    (endpoint,) = render(chart, EVERYTHING)["PodMonitor"]["spec"]["podMetricsEndpoints"]
    assert endpoint["scheme"] == "https"
    assert endpoint["tlsConfig"] == {"serverName": "kv.example.org"}
    assert endpoint["authorization"]["credentials"] == {"name": "scrape", "key": "token"}


def test_a_change_of_the_configuration_changes_the_pod(chart):
    def mark(values: dict[str, Any]) -> str:
        template = render(chart, values)["DaemonSet"]["spec"]["template"]
        return str(template["metadata"]["annotations"]["checksum/config"])

    assert mark({}) == mark({})
    assert mark({}) != mark({"config": {"tiers": {"host": {"capacity": "1GiB"}}}})


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"arena": {"kind": "file"}}, "arena"),
        ({"imgae": {"repository": "x"}}, "imgae"),
        ({"admin": {"port": 80}}, "port"),
        ({"podMonitor": {"enabled": True}}, "podMonitor.enabled needs"),
    ],
)
def test_values_that_make_no_sense_are_refused_by_name(chart, values, said):
    with pytest.raises(helm.HelmError, match=said):
        chart.render(chart.merge_values(values))


def test_helm_has_nothing_to_say():
    report = helm.lint(CHART, strict=True, kube_version="v1.34.0")
    told = [one for one in report["messages"] if one["severity"] >= SEVERITY_WARNING]
    assert told == []
    assert report["errors"] == []
