"""The model registry: versions, the aliases `candidate`, `champion` and `previous`, promotion and rollback.

A version's files stay where its artifact is; the registry holds a reference. Every decision is first written to the
ledger (`ling_flow.flow.ledger`), then the aliases are moved. An alias that somebody moved by hand counts: the next
decision starts from it.
"""

from __future__ import annotations

import getpass
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, TypeAdapter

from ling_flow.config import StrictModel
from ling_flow.errors import SystemFault, UserError
from ling_flow.evaluation.gate import Gate, GateVerdict, judge
from ling_flow.flow import ledger
from ling_flow.flow import mlflow_store as store
from ling_flow.flow.artifact import Ref
from ling_flow.flow.context import Context
from ling_flow.flow.identity import code_version

if TYPE_CHECKING:
    from mlflow import MlflowClient

_METRICS_TAG = "ling_flow.metrics"
_ASKED_TAG = "ling_flow.asked"
_GATE_TAG = "ling_flow.gate."
_GATES_TAG = "ling_flow.gates"
_GATES = TypeAdapter(tuple[Gate, ...])
_TRIES = 20  # decisions that may come first before ours is given up


class Version(StrictModel):
    """A registered version of a model."""

    name: str = Field(description="registered model")
    number: int = Field(description="version number, counted from 1")
    fingerprint: str = Field(description="fingerprint of the artifact")
    artifact: str = Field(description="reference of the artifact's output that holds the checkpoint")
    code_version: str = Field(description="version of the code that registered it")
    metrics: dict[str, float] = Field(description="what its evaluation measured")
    asked: str = Field(default="", description="digest of what its evaluation asked; empty where that is not known")
    gates: tuple[Gate, ...] = Field(default=(), description="what it takes to become champion")

    @property
    def uri(self) -> str:
        """`models:/<name>/<number>`, understood by MLflow and by `lingflow lineage`."""
        return f"models:/{self.name}/{self.number}"


@dataclass(frozen=True)
class Decision:
    """What became of a version that was put up for promotion.

    Attributes:
        promoted: whether it is the champion now.
        verdicts: one for each gate.
        sentences: the verdicts, and what else counted.
        champion_before: the champion it was held against.
    """

    promoted: bool
    verdicts: list[GateVerdict]
    sentences: list[str]
    champion_before: Version | None


class Registry:
    """The registry behind a tracking URI. Every method raises SystemFault, naming the URI, where it cannot be used."""

    def __init__(self, tracking_uri: str) -> None:
        self.tracking_uri = tracking_uri
        self._api: MlflowClient | None = None

    @staticmethod
    def of(context: Context) -> Registry:
        """The registry of the environment: its tracking URI, or the store in its home directory."""
        return Registry(context.tracking_uri or store.default_tracking_uri(context.home))

    def register(
        self,
        name: str,
        artifact: str,
        fingerprint: str,
        metrics: Mapping[str, float],
        params: Mapping[str, Any],
        gates: Sequence[Gate] = (),
        asked: str = "",
    ) -> Version:
        """Make a version of `name` for an artifact, or find the one it has; the version becomes `candidate`.

        Args:
            artifact: reference of the output that holds the checkpoint.
            metrics: what the evaluation measured; the newest evaluation counts.
            params: what people look for in a model (architecture), shown beside it.
            gates: what it takes to become champion; the newest gates count.
            asked: digest of what the evaluation asked; where it is known and not the champion's, the verdict says so.
        """
        with self._reached() as client:
            number = self._find(client, name, fingerprint)
            if number is None:
                number = self._create(client, name, artifact, fingerprint, params)
            measured = json.dumps({metric: float(value) for metric, value in metrics.items()})
            client.set_model_version_tag(name, str(number), _METRICS_TAG, measured)
            client.set_model_version_tag(name, str(number), _ASKED_TAG, asked)
            client.set_model_version_tag(name, str(number), _GATES_TAG, _GATES.dump_json(tuple(gates)).decode())
            client.set_registered_model_alias(name, "candidate", str(number))
            return self._version(client, name, number)

    def promote(
        self, version: Version, gates: Sequence[Gate], force: str | None = None, by_hand: bool = False
    ) -> Decision:
        """Judge a version against gates and champion; if it passes, it becomes champion and the champion `previous`.

        A version that was rolled back stays back. Nothing is decided, and nothing recorded, about the champion itself.

        Args:
            by_hand: somebody asks for just this version. Without it, one that was champion before stays where the
                later decision put it: a pipeline that runs again does not undo it.
            force: a reason to promote the version whatever the gates say, recorded.

        Raises:
            UserError: a gate names a metric that the version's evaluation does not report.
        """
        outcome: list[Decision] = []

        def decide(champion: Version | None, records: Sequence[ledger.Recorded]) -> _Move | None:
            # The same artifact registered again is not held against itself.
            rival = champion if champion and champion.fingerprint != version.fingerprint else None
            other = rival is not None and rival.asked and version.asked and rival.asked != version.asked
            caveat = "whose evaluation asked something else, or had another corpus" if other else ""
            verdicts = judge(gates, version.metrics, rival.metrics if rival else None, caveat)
            sentences = [verdict.sentence for verdict in verdicts]
            passed = all(verdict.passed for verdict in verdicts)
            back = ledger.rolled_back(records, version.number)
            if champion is not None and champion.number == version.number:
                outcome.append(Decision(True, verdicts, sentences, champion))
                return None
            if back is not None:
                passed = False
                sentences.append(f"not promoted: rolled back on {back.time} ({'; '.join(back.reasons)})")
            elif not by_hand and (later := ledger.displaced(records, version.number)):
                passed = False
                sentences.append(f"not promoted: version {later.version} took its place on {later.time}")
            if not passed and force:
                passed = True
                sentences.append(f"promoted all the same: {force}")
            outcome.append(Decision(passed, verdicts, sentences, champion))
            previous = champion.number if champion else None
            if not passed:
                return _Move("reject", version, None, sentences)
            return _Move("promote", version, previous, sentences)

        with self._reached() as client:
            self._decide(client, version.name, decide)
            decision = outcome[-1]
            self._judged(client, version, decision)
            return decision

    def rollback(self, name: str, reason: str) -> Version:
        """Make `previous` champion again; `previous` becomes the champion that it had followed. The new champion.

        Raises:
            UserError: there is no previous version.
        """
        outcome: list[Version] = []

        with self._reached() as client:

            def decide(champion: Version | None, records: Sequence[ledger.Recorded]) -> _Move:
                target = self._by_alias(client, name, "previous")
                if target is None:
                    raise UserError(f"{name}: there is no previous champion to roll back to")
                outcome.append(target)
                further = ledger.before(records, target.number)
                if champion is not None and further == champion.number:
                    further = None
                return _Move("rollback", target, further, [reason])

            self._decide(client, name, decide)
            return outcome[-1]

    def promotions(self, name: str) -> list[ledger.Recorded]:
        """Every decision about a model, oldest first."""
        with self._reached() as client:
            return ledger.read(client, name)

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

    def _judged(self, client: MlflowClient, version: Version, decision: Decision) -> None:
        """Write `ling_flow.gate.<metric>=pass|fail` on the version, and the sentences as its description.

        Of several gates on a metric all must be passed.
        """
        verdicts, number = decision.verdicts, str(version.number)
        for metric in {verdict.gate.metric for verdict in verdicts}:
            passed = all(verdict.passed for verdict in verdicts if verdict.gate.metric == metric)
            tag, value = f"{_GATE_TAG}{metric}", "pass" if passed else "fail"
            client.set_model_version_tag(version.name, number, tag, value)
        client.update_model_version(version.name, number, "; ".join(decision.sentences))

    def _decide(
        self,
        client: MlflowClient,
        name: str,
        decide: Callable[[Version | None, Sequence[ledger.Recorded]], _Move | None],
    ) -> None:
        """Take a decision that knows every decision before it; where another comes first, take it again."""
        for _ in range(_TRIES):
            records = ledger.read(client, name)
            self._carry_out(client, records)
            champion = self._by_alias(client, name, "champion")
            move = decide(champion, records)
            if move is None:
                return
            last = ledger.last_move(records)
            entry = ledger.LedgerEntry(
                time=datetime.now(UTC).isoformat(timespec="seconds"),
                action=move.action,
                model_name=name,
                version=move.version.number,
                champion_before=champion.number if champion else None,
                previous=move.previous,
                fingerprint=move.version.fingerprint,
                reasons=move.reasons,
                code_version=code_version(),
                decided_by=_user(),
                after=last.number if last else 0,
            )
            number = ledger.append(client, entry)
            records = ledger.read(client, name)
            self._carry_out(client, records)
            if not next(record for record in records if record.number == number).void:
                return
        raise SystemFault(f"{name}: {_TRIES} other decisions came first; try again")

    def _carry_out(self, client: MlflowClient, records: Sequence[ledger.Recorded]) -> None:
        """Move the aliases as the last move says, if that is still to do; again, where another came meanwhile."""
        move = ledger.last_move(records)
        while move is not None and not move.done:
            entry = move.entry
            store.settled(client.set_registered_model_alias, entry.model_name, "champion", str(entry.version))
            if entry.previous is None:
                client.delete_registered_model_alias(entry.model_name, "previous")
            else:
                store.settled(client.set_registered_model_alias, entry.model_name, "previous", str(entry.previous))
            tag = "ling_flow.promoted_at" if entry.action == "promote" else "ling_flow.rolled_back_to_at"
            store.settled(client.set_model_version_tag, entry.model_name, str(entry.version), tag, entry.time)
            ledger.mark_done(client, move)
            latest = ledger.last_move(ledger.read(client, entry.model_name))
            # A machine that slept may have undone a later move: that one is made again, done or not.
            move = latest.model_copy(update={"done": False}) if latest and latest.number != move.number else None

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
        model_id = store.find_model(client, experiment, artifact)
        if model_id is None:
            # The step that made it could not tell the store of it.
            made_by = {"ling_flow.component": Ref.parse(artifact).component}
            model_id = store.log_model(client, experiment, None, name, artifact, params, tags | made_by)
        tags[store.ARTIFACT_TAG] = artifact
        with store.default_store(self.tracking_uri):
            made = client.create_model_version(name, f"models:/{model_id}", tags=tags, model_id=model_id)
        # What MLflow's own register_model leaves on the model, so that its page links to the version.
        known = json.loads(client.get_logged_model(model_id).tags.get("mlflow.modelVersions", "[]"))
        known.append({"name": name, "version": str(made.version)})
        client.set_logged_model_tags(model_id, {"mlflow.modelVersions": json.dumps(known)})
        return int(made.version)

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
            metrics=json.loads(tags.get(_METRICS_TAG, "{}")),
            asked=tags.get(_ASKED_TAG, ""),
            gates=_GATES.validate_json(tags.get(_GATES_TAG, "[]")),
        )


@dataclass(frozen=True)
class _Move:
    """A decision before it is written down; `previous` as in the ledger's entry."""

    action: Literal["promote", "reject", "rollback"]
    version: Version
    previous: int | None
    reasons: list[str]


def _user() -> str:
    """Who decides: the registry's user, or the machine's."""
    if name := os.environ.get("MLFLOW_TRACKING_USERNAME"):
        return name
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user without a name
        return f"uid {os.getuid()}"
