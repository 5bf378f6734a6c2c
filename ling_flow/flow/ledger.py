"""The record of decisions about a model, kept where every machine that decides can see it: in the registry.

MLflow keeps no history of aliases. Each decision about model `NAME` is a version of the registered model
`NAME.promotions`; the server numbers versions one after the other, so all machines see the same order. An entry says
after which entry its author decided; it counts only if that is the last move before it. Of two decisions made at once
the first counts and the second is void, with no lock that could be left behind. Aliases follow the ledger: whoever
finds a move that was written down and not carried out carries it out.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from ling_flow.config import StrictModel, parse
from ling_flow.errors import UserError
from ling_flow.flow import mlflow_store as store

if TYPE_CHECKING:
    from mlflow import MlflowClient

_SUFFIX = ".promotions"  # a model's own name holds no dot
_ENTRY_TAG = "ling_flow.entry"
_DONE_TAG = "ling_flow.aliases_moved"
_ABOUT = "Decisions about {name}, in order: one version for each. Written by ling_flow, not a model."


class LedgerEntry(StrictModel):
    """One decision about a model."""

    time: str = Field(description="when, UTC, ISO 8601")
    action: Literal["promote", "reject", "rollback"] = Field(description="what was decided")
    model_name: str = Field(description="registered model")
    version: int = Field(description="the version decided about; for a rollback the one that became champion again")
    champion_before: int | None = Field(description="champion before the decision, null where there was none")
    previous: int | None = Field(description="what a rollback would lead back to after the decision, null for nothing")
    fingerprint: str = Field(description="fingerprint of the version's artifact")
    reasons: list[str] = Field(description="verdicts of the gates, or why it was rolled back or promoted against them")
    code_version: str = Field(description="version of the code that decided")
    decided_by: str = Field(description="user of the registry, or of the machine")
    after: int = Field(description="number of the last move its author knew, 0 for none")


class Recorded(StrictModel):
    """An entry in its place in the ledger."""

    number: int = Field(description="place in the ledger, counted from 1")
    entry: LedgerEntry = Field(description="the decision")
    void: bool = Field(description="whether another decision came first, so that this one moved nothing")
    done: bool = Field(description="whether the aliases have been moved")

    @property
    def moves(self) -> bool:
        """Whether it changed the champion."""
        return self.entry.action != "reject" and not self.void


def read(client: MlflowClient, model_name: str) -> list[Recorded]:
    """All entries about a model, oldest first.

    Raises:
        UserError: an entry is damaged; the message names it.
    """
    found = client.search_model_versions(f"name = '{model_name}{_SUFFIX}'")
    records: list[Recorded] = []
    last = 0  # number of the last move that counts
    for item in sorted(found, key=lambda item: int(item.version)):
        where = f"models:/{item.name}/{item.version}: tag {_ENTRY_TAG}"
        text = item.tags.get(_ENTRY_TAG)
        if text is None:
            raise UserError(f"{where}: missing; was this version made by hand? Delete it")
        entry = parse(LedgerEntry, text, where)
        void = entry.action != "reject" and entry.after != last
        records.append(Recorded(number=int(item.version), entry=entry, void=void, done=_DONE_TAG in item.tags))
        if records[-1].moves:
            last = records[-1].number
    return records


def last_move(records: Sequence[Recorded]) -> Recorded | None:
    """The last entry that changed the champion."""
    return next((record for record in reversed(records) if record.moves), None)


def append(client: MlflowClient, entry: LedgerEntry) -> int:
    """Write an entry down; its number."""
    from mlflow.exceptions import MlflowException

    name = entry.model_name + _SUFFIX
    source = f"models:/{entry.model_name}/{entry.version}"
    text = f"{entry.action} version {entry.version}: {'; '.join(entry.reasons)}"
    for again in (True, False):
        try:
            with store.default_store(client.tracking_uri):
                made = client.create_model_version(
                    name, source, tags={_ENTRY_TAG: entry.model_dump_json()}, description=text
                )
            return int(made.version)
        except MlflowException as error:
            if not (again and store.missing(error)):
                raise
        try:
            client.create_registered_model(name, description=_ABOUT.format(name=entry.model_name))
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
    raise AssertionError("unreachable")


def mark_done(client: MlflowClient, record: Recorded) -> None:
    """Note that the aliases are where the entry wants them."""
    store.settled(
        client.set_model_version_tag, record.entry.model_name + _SUFFIX, str(record.number), _DONE_TAG, "true"
    )


def rolled_back(records: Sequence[Recorded], version: int) -> LedgerEntry | None:
    """The entry that took the championship from a version, None where that is not the last word on it."""
    word = None
    for record in records:
        if not record.moves:
            continue
        if record.entry.version == version:
            word = None
        elif record.entry.action == "rollback" and record.entry.champion_before == version:
            word = record.entry
    return word


def displaced(records: Sequence[Recorded], version: int) -> LedgerEntry | None:
    """The move that made another version champion after this one had been it, None where there is none."""
    moves = [record.entry for record in records if record.moves]
    numbers = [entry.version for entry in moves]
    if version not in numbers or numbers[-1] == version:
        return None
    last = len(numbers) - 1 - numbers[::-1].index(version)
    return moves[last + 1]


def before(records: Sequence[Recorded], version: int) -> int | None:
    """The champion that a version followed when it was promoted, None where there is none worth going back to."""
    for record in reversed(records):
        if record.moves and record.entry.action == "promote" and record.entry.version == version:
            earlier = record.entry.champion_before
            return None if earlier is None or rolled_back(records, earlier) else earlier
    return None
