"""The model registry: versions, the aliases `candidate`, `champion` and `previous`, and a ledger of every move.

MLflow keeps no history of aliases, so each decision is also a line of `<home>/promotions.jsonl`, which is only ever
appended to. A version's files stay where its artifact is; the registry holds a reference.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from ling_flow.config import StrictModel, parse
from ling_flow.errors import UserError
from ling_flow.evaluation.gate import GateVerdict
from ling_flow.flow import mlflow_store as store
from ling_flow.flow.context import Context
from ling_flow.flow.identity import code_version

if TYPE_CHECKING:
    from mlflow import MlflowClient

LEDGER = "promotions.jsonl"
_METRIC_TAG = "ling_flow.metric."
_GATE_TAG = "ling_flow.gate."


class Version(StrictModel):
    """A registered version of a model."""

    name: str = Field(description="registered model")
    number: int = Field(description="version number, counted from 1")
    fingerprint: str = Field(description="fingerprint of the artifact")
    artifact: str = Field(description="reference of the artifact's output that holds the checkpoint")
    code_version: str = Field(description="version of the code that registered it")
    metrics: dict[str, float] = Field(description="what its evaluation measured")

    @property
    def uri(self) -> str:
        """`models:/<name>/<number>`, understood by MLflow and by `lingflow lineage`."""
        return f"models:/{self.name}/{self.number}"


class LedgerEntry(StrictModel):
    """One decision about a model."""

    time: str = Field(description="when, UTC, ISO 8601")
    action: Literal["promote", "reject", "rollback"] = Field(description="what was decided")
    model_name: str = Field(description="registered model")
    version: int = Field(description="the version decided about; for a rollback the one that became champion again")
    champion_before: int | None = Field(description="champion before the decision, null where there was none")
    fingerprint: str = Field(description="fingerprint of the version's artifact")
    reasons: list[str] = Field(description="verdicts of the gates, or why it was rolled back")
    code_version: str = Field(description="version of the code that decided")
    tracking_uri: str = Field(description="the registry")


class Ledger:
    """The append-only record of decisions in the home directory."""

    def __init__(self, home: Path) -> None:
        self.path = home / LEDGER

    def append(self, entry: LedgerEntry) -> None:
        """Add a line and sync it to disk."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a") as file:
            file.write(entry.model_dump_json() + "\n")
            file.flush()
            os.fsync(file.fileno())

    def read(self, model_name: str | None = None) -> list[LedgerEntry]:
        """All entries, oldest first, or those of one model.

        Raises:
            UserError: a line is damaged; the message names it.
        """
        if not self.path.exists():
            return []
        lines = self.path.read_text().splitlines()
        entries = [parse(LedgerEntry, line, f"{self.path}:{number}") for number, line in enumerate(lines, start=1)]
        return [entry for entry in entries if model_name in (None, entry.model_name)]

    def rolled_back(self, version: Version) -> LedgerEntry | None:
        """The entry that took the championship from a version, None where that is not the last word on it."""
        last = None
        for entry in self.read(version.name):
            if entry.version == version.number:
                last = None
            elif entry.action == "rollback" and entry.champion_before == version.number:
                last = entry
        return last


class Registry:
    """The registry behind a tracking URI. Every method raises SystemFault, naming the URI, where it cannot be used."""

    def __init__(self, tracking_uri: str, home: Path) -> None:
        self.tracking_uri = tracking_uri
        self.home = home
        self.ledger = Ledger(home)
        self._api: MlflowClient | None = None

    @staticmethod
    def of(context: Context) -> Registry:
        """The registry of the environment: its tracking URI, or the store in its home directory."""
        return Registry(context.tracking_uri or store.default_tracking_uri(context.home), context.home)

    def register(
        self, name: str, artifact: str, fingerprint: str, metrics: Mapping[str, float], params: Mapping[str, Any]
    ) -> Version:
        """Make a version of `name` for an artifact, or find the one it has; the version becomes `candidate`.

        Args:
            artifact: reference of the output that holds the checkpoint.
            metrics: what the evaluation measured; the newest evaluation counts.
            params: what people look for in a model (architecture), shown beside it.
        """
        with self._reached() as client:
            number = self._find(client, name, fingerprint)
            if number is None:
                number = self._create(client, name, artifact, fingerprint, params)
            for metric, value in metrics.items():
                client.set_model_version_tag(name, str(number), f"{_METRIC_TAG}{metric}", repr(float(value)))
            client.set_registered_model_alias(name, "candidate", str(number))
            return self._version(client, name, number)

    def judged(self, version: Version, verdicts: Sequence[GateVerdict]) -> None:
        """Write `ling_flow.gate.<metric>=pass|fail` on the version; of several gates on a metric all must be passed."""
        with self._reached() as client:
            for metric in {verdict.gate.metric for verdict in verdicts}:
                passed = all(verdict.passed for verdict in verdicts if verdict.gate.metric == metric)
                tag, value = f"{_GATE_TAG}{metric}", "pass" if passed else "fail"
                client.set_model_version_tag(version.name, str(version.number), tag, value)

    def promote(self, version: Version, reasons: Sequence[str]) -> Version | None:
        """Make a version champion; the old champion becomes `previous`. The old champion, None where there was none."""
        with self._reached() as client, self._alone():
            old = self._by_alias(client, version.name, "champion")
            if old is not None and old.number == version.number:
                return old
            self._move(client, "promote", version, old, reasons)
            return old

    def reject(self, version: Version, reasons: Sequence[str]) -> None:
        """Record that a version did not pass; the champion stays."""
        champion = self.by_alias(version.name, "champion")
        self._record("reject", version, champion, reasons)

    def rollback(self, name: str, reason: str) -> Version:
        """Make `previous` champion again, and the champion `previous`; the new champion.

        Raises:
            UserError: there is no previous version.
        """
        with self._reached() as client, self._alone():
            previous = self._by_alias(client, name, "previous")
            if previous is None:
                raise UserError(f"{name}: there is no previous champion to roll back to")
            champion = self._by_alias(client, name, "champion")
            self._move(client, "rollback", previous, champion, [reason])
            return previous

    def by_alias(self, name: str, alias: str) -> Version | None:
        """The version an alias points to, None where there is no such alias or model."""
        with self._reached() as client:
            return self._by_alias(client, name, alias)

    def version(self, name: str, number: int) -> Version | None:
        """A version by its number, None where there is none."""
        with self._reached() as client:
            try:
                return self._version(client, name, number)
            except Exception as error:
                if store.missing(error):
                    return None
                raise

    def logged_model(self, model_id: str) -> Mapping[str, str] | None:
        """Tags of a LoggedModel (`m-…`), None where there is none."""
        with self._reached() as client:
            try:
                return dict(client.get_logged_model(model_id).tags)
            except Exception as error:
                if store.missing(error):
                    return None
                raise

    @contextmanager
    def _reached(self) -> Iterator[MlflowClient]:
        with store.reaching(self.tracking_uri):
            self._api = self._api or store.connect(self.tracking_uri)
            yield self._api

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Two promotions on this machine never mix their aliases."""
        self.home.mkdir(parents=True, exist_ok=True)
        with (self.home / f"{LEDGER}.lock").open("ab") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def _move(
        self,
        client: MlflowClient,
        action: Literal["promote", "rollback"],
        version: Version,
        old: Version | None,
        reasons: Sequence[str],
    ) -> None:
        if old is not None:
            client.set_registered_model_alias(version.name, "previous", str(old.number))
        client.set_registered_model_alias(version.name, "champion", str(version.number))
        now = self._record(action, version, old, reasons)
        client.set_model_version_tag(version.name, str(version.number), f"ling_flow.{action}d_at", now)

    def _record(
        self,
        action: Literal["promote", "reject", "rollback"],
        version: Version,
        champion: Version | None,
        reasons: Sequence[str],
    ) -> str:
        now = datetime.now(UTC).isoformat(timespec="seconds")
        entry = LedgerEntry(
            time=now,
            action=action,
            model_name=version.name,
            version=version.number,
            champion_before=champion.number if champion else None,
            fingerprint=version.fingerprint,
            reasons=list(reasons),
            code_version=code_version(),
            tracking_uri=self.tracking_uri,
        )
        self.ledger.append(entry)
        return now

    def _create(
        self, client: MlflowClient, name: str, artifact: str, fingerprint: str, params: Mapping[str, Any]
    ) -> int:
        from mlflow.exceptions import MlflowException

        try:
            client.create_registered_model(name)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        tags = {store.FINGERPRINT_TAG: fingerprint, store.CODE_TAG: code_version()}
        experiment = store.experiment_id(client, store.EXPERIMENT)
        model_id = self._logged_model_of(client, experiment, artifact)
        if model_id is None:
            model_id = store.log_model(client, experiment, None, name, artifact, params, tags)
        tags[store.ARTIFACT_TAG] = artifact
        with store.default_store(self.tracking_uri):
            made = client.create_model_version(name, f"models:/{model_id}", tags=tags, model_id=model_id)
        # What MLflow's own register_model leaves on the model, so that its page links to the version.
        known = json.loads(client.get_logged_model(model_id).tags.get("mlflow.modelVersions", "[]"))
        known.append({"name": name, "version": str(made.version)})
        client.set_logged_model_tags(model_id, {"mlflow.modelVersions": json.dumps(known)})
        return int(made.version)

    def _logged_model_of(self, client: MlflowClient, experiment: str, artifact: str) -> str | None:
        """The LoggedModel that the producing step made for this artifact."""
        condition = f"tags.`{store.ARTIFACT_TAG}` = '{artifact}'"
        found = client.search_logged_models([experiment], condition, max_results=1)
        return str(found[0].model_id) if found else None

    def _find(self, client: MlflowClient, name: str, fingerprint: str) -> int | None:
        condition = f"name = '{name}' and tags.`{store.FINGERPRINT_TAG}` = '{fingerprint}'"
        found = client.search_model_versions(condition)
        return max((int(item.version) for item in found), default=None)

    def _by_alias(self, client: MlflowClient, name: str, alias: str) -> Version | None:
        try:
            return self._version(client, name, int(client.get_model_version_by_alias(name, alias).version))
        except Exception as error:
            # MLflow calls an alias that a known model does not have an invalid parameter.
            if store.missing(error) or getattr(error, "error_code", None) == "INVALID_PARAMETER_VALUE":
                return None
            raise

    def _version(self, client: MlflowClient, name: str, number: int) -> Version:
        tags = client.get_model_version(name, str(number)).tags
        return Version(
            name=name,
            number=number,
            fingerprint=tags.get(store.FINGERPRINT_TAG, ""),
            artifact=tags.get(store.ARTIFACT_TAG, ""),
            code_version=tags.get(store.CODE_TAG, ""),
            metrics={
                key.removeprefix(_METRIC_TAG): float(value)
                for key, value in tags.items()
                if key.startswith(_METRIC_TAG)
            },
        )
