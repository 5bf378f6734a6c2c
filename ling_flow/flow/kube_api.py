"""The few calls to Kubernetes that steps make: KubeRay's objects, and the workflow that owns them."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from ling_flow.errors import LingFlowError, SystemFault, UserError
from ling_flow.flow.kuberay import API_VERSION, Owner

RAY_JOBS, RAY_SERVICES = "rayjobs", "rayservices"
REQUEST_SECONDS = (10, 60)  # to connect, and for an answer
_GROUP, _VERSION = API_VERSION.split("/")
_OWN_NAMESPACE = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")


class Kubernetes:
    """The few calls that are needed, from inside a cluster (service account) or outside (KUBECONFIG)."""

    def __init__(self) -> None:
        """
        Raises:
            UserError: there is no configuration to reach a cluster with.
        """
        from kubernetes import client, config

        self._errors = client.ApiException
        configuration = client.Configuration()
        try:
            if "KUBERNETES_SERVICE_HOST" in os.environ:
                config.load_incluster_config(client_configuration=configuration)
            else:
                # The package reads KUBECONFIG when it is imported, which may be long ago.
                config.load_kube_config(os.environ.get("KUBECONFIG"), client_configuration=configuration)
        except (config.ConfigException, yaml.YAMLError, OSError) as error:
            raise UserError(f"KUBECONFIG: no way to a cluster ({' '.join(str(error).split())})") from None
        configuration.retries = False  # ours are by the clock
        self._api = client.CustomObjectsApi(client.ApiClient(configuration))

    def get(self, plural: str, namespace: str, name: str) -> dict[str, Any] | None:
        """The object, None where there is none."""
        with self._told(f"{plural} {namespace}/{name}"):
            try:
                found: dict[str, Any] = self._api.get_namespaced_custom_object(
                    _GROUP, _VERSION, namespace, plural, name, _request_timeout=REQUEST_SECONDS
                )
                return found
            except self._errors as error:
                if error.status == 404:
                    return None
                raise

    def create(self, plural: str, namespace: str, manifest: dict[str, Any]) -> bool:
        """False: there is one of that name already."""
        with self._told(f"{plural} {namespace}/{manifest['metadata']['name']}"):
            try:
                self._api.create_namespaced_custom_object(
                    _GROUP, _VERSION, namespace, plural, manifest, _request_timeout=REQUEST_SECONDS
                )
                return True
            except self._errors as error:
                if error.status == 409:
                    return False
                raise

    def replace(self, plural: str, namespace: str, manifest: dict[str, Any]) -> None:
        """Put `manifest` in place of the object that it was read as.

        Raises:
            SystemFault: someone changed it in between.
        """
        name = manifest["metadata"]["name"]
        with self._told(f"{plural} {namespace}/{name}"):
            self._api.replace_namespaced_custom_object(
                _GROUP, _VERSION, namespace, plural, name, manifest, _request_timeout=REQUEST_SECONDS
            )

    def delete(self, plural: str, namespace: str, name: str) -> None:
        """Also when there is none."""
        with self._told(f"{plural} {namespace}/{name}"):
            try:
                self._api.delete_namespaced_custom_object(
                    _GROUP, _VERSION, namespace, plural, name,
                    propagation_policy="Background", _request_timeout=REQUEST_SECONDS,
                )  # fmt: skip
            except self._errors as error:
                if error.status != 404:
                    raise

    def workflow(self, namespace: str, name: str) -> Owner | None:
        """The Argo Workflow of that name; None where it may not be read."""
        with contextlib.suppress(LingFlowError), self._told(f"workflow {namespace}/{name}"):
            found = self._api.get_namespaced_custom_object(
                "argoproj.io", "v1alpha1", namespace, "workflows", name, _request_timeout=REQUEST_SECONDS
            )
            return Owner(name, found["metadata"]["uid"])
        return None

    @contextlib.contextmanager
    def _told(self, what: str) -> Iterator[None]:
        """Kubernetes' refusals are the user's to mend (rights, a wrong manifest); all else is the system's fault."""
        import urllib3

        try:
            yield
        except self._errors as error:
            reason = " ".join(str(error.body or error.reason).split())[:300]
            if error.status in (400, 401, 403, 404, 422):
                raise UserError(f"{what}: Kubernetes refuses: {error.status} {error.reason}: {reason}") from None
            raise SystemFault(f"{what}: Kubernetes answers {error.status} {error.reason}: {reason}") from None
        except (urllib3.exceptions.HTTPError, OSError) as error:
            raise SystemFault(f"{what}: Kubernetes does not answer ({' '.join(str(error).split())[:200]})") from None


def own_namespace() -> str:
    """That of the pod we run in; `default` outside a cluster."""
    with contextlib.suppress(OSError):
        return _OWN_NAMESPACE.read_text().strip()
    return "default"
