"""The schemas in KubeRay's custom resource definitions, as strict as the API server takes them."""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema  # type: ignore[import-untyped]  # comes with Ray
import pytest
import yaml

from tests.unit.deploy.overlays import ROOT

PLACE = "QUATRO_KUBERAY_CRDS"
"""Environment variable with the folder of ray.io_rayjobs.yaml and ray.io_rayclusters.yaml (KubeRay 1.7, helm chart)."""
_FILES = {"RayJob": "ray.io_rayjobs.yaml", "RayCluster": "ray.io_rayclusters.yaml"}


@cache
def schema_of(kind: str) -> dict[str, Any]:
    """The strict schema of a kind in version v1."""
    path = Path(os.environ.get(PLACE, ROOT / "../shared/kuberay")) / _FILES[kind]
    if not path.is_file():
        pytest.skip(f"{path} is missing: set {PLACE} to a folder with KubeRay's custom resource definitions")
    definition = yaml.load(path.read_text(), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))  # 40,000 lines
    (version,) = (each for each in definition["spec"]["versions"] if each["name"] == "v1")
    schema = _strict(version["schema"]["openAPIV3Schema"])
    schema["properties"]["metadata"] = {"type": "object"}  # Kubernetes checks it for all kinds alike
    return schema


def problems(manifest: dict[str, Any]) -> list[str]:
    """What the API server would refuse, or drop; rules in CEL (x-kubernetes-validations) are not evaluated."""
    schema = schema_of(manifest["kind"])
    validator = jsonschema.Draft202012Validator(schema)
    return [f"{error.json_path}: {error.message}" for error in validator.iter_errors(_with_defaults(schema, manifest))]


def _strict(schema: Any) -> Any:
    """Refuse fields that the schema does not name, which the API server drops, unless it says that they are kept."""
    if isinstance(schema, list):
        return [_strict(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    strict = {key: _strict(value) for key, value in schema.items()}
    names_fields = isinstance(schema.get("properties"), dict) and schema.get("type") == "object"
    if names_fields and not schema.get("x-kubernetes-preserve-unknown-fields"):
        strict.setdefault("additionalProperties", False)
    if schema.get("x-kubernetes-int-or-string"):
        strict.pop("type", None)
        strict["anyOf"] = [{"type": "integer"}, {"type": "string"}]
    return strict


def _with_defaults(schema: dict[str, Any], value: Any) -> Any:
    """The value as it is stored: the API server fills in defaults before it looks for required fields."""
    if isinstance(value, list):
        return [_with_defaults(schema.get("items", {}), each) for each in value]
    if not isinstance(value, dict):
        return value
    fields = schema.get("properties", {})
    filled = {name: field["default"] for name, field in fields.items() if "default" in field} | value
    rest = schema.get("additionalProperties") or {}
    return {name: _with_defaults(fields.get(name, rest), each) for name, each in filled.items()}
