"""Telling people: an event for Prefect's automations, and a message through a notification block, if one is named."""

from __future__ import annotations

import datetime as dt
import logging
import statistics
import time
from collections.abc import Iterable, Mapping
from itertools import dropwhile, islice
from pathlib import Path
from typing import Any

from prefect import Flow
from prefect.blocks.abstract import NotificationBlock
from prefect.blocks.core import Block
from prefect.client.schemas.objects import FlowRun, State
from prefect.events import emit_event
from prefect.logging.loggers import flow_run_logger

from pipelines.common import read_job
from pipelines.messengers import post
from vlmflow.catalog import Catalog
from vlmflow.catalog.folder import Folder
from vlmflow.catalog.messages import Message, MessageStore
from vlmflow.catalog.runs import RunInfo
from vlmflow.config import CatalogConfig
from vlmflow.engine import RunReport
from vlmflow.errors import UnsentError, VlmflowError

logger = logging.getLogger("vlmflow")

FLAGGED_JUMP = "vlmflow.flagged-share.jumped"
UNRECONCILED = "vlmflow.rows.unreconciled"
REGRESSION = "vlmflow.gate.closed"

MIN_ROWS = 50  # of fewer, a share says little
# A messenger that refuses for a moment is asked again: what it is not told now waits for another flow.
_SEND_DELAYS_S = (3.0, 15.0)
_MOST_REFUSED = 2
_MAX_CHARS = 1000  # of what a state says
_NIGHTS = 7
_LOOKED_THROUGH = 200  # runs, for so many nights of the same policy


def emit(event: str, catalog: str, subject: str, body: str, facts: Mapping[str, Any] | None = None) -> None:
    """Emits an event about a catalog, for automations.

    Args:
        catalog: its uri; the event's resource.
    """
    logger.warning("%s: %s", subject, body)
    resource = {"prefect.resource.id": f"vlmflow.catalog.{catalog}", "prefect.resource.name": catalog}
    emit_event(event, resource=resource, payload={"subject": subject, "body": body, **(facts or {})})


def send(notify: str | None, subject: str, body: str, catalog: CatalogConfig | None = None) -> bool:
    """Sends a message through a notification block. A message that cannot be sent is logged and fails nothing.

    Args:
        notify: the block, as ``type/name``, such as ``slack-webhook/moderation``; None: no message.
        catalog: the one it is about. It keeps a message that cannot be sent, for :func:`send_kept`; one that can be
            sent takes along what is kept.

    Returns:
        False: there was a message to be sent, and it is neither sent nor kept.
    """
    if notify is None:
        return True
    try:
        block = Block.load(notify)
        if not isinstance(block, NotificationBlock):
            logger.error("%s is no notification block: nobody was told of: %s", notify, subject)
            return _is_kept(catalog, subject, body)
        _deliver(block, subject, body)
    except Exception as error:  # noqa: BLE001 - whatever a messenger raises, the run is what matters
        logger.error("nobody was told of %r: block %s failed with %s", subject, notify, _said(error))
        return _is_kept(catalog, subject, body)
    if catalog is not None:
        send_kept(notify, catalog)
    return True


def _is_kept(catalog: CatalogConfig | None, subject: str, body: str) -> bool:
    """Keeps a message with its catalog, if it can be."""
    try:
        if catalog is None or not Catalog.exists(catalog):  # it is not for a message to begin one
            return False
        MessageStore(Folder(catalog)).keep(subject, body)
    except VlmflowError as error:
        logger.error("the message %r could not be kept for later either: %s", subject, error)
        return False
    logger.warning("the message %r is kept in the catalog; the next flow over it that can sends it", subject)
    return True


def send_kept(notify: str | None, catalog: CatalogConfig) -> None:
    """Sends what could not be sent before, saying of when it is, the oldest first. Fails nothing.

    Of flows at once each message is sent by one; it may come twice if that one is killed between sending and removing
    it. A messenger that refuses two is not asked again: the next flow does that. One alone may be a message that it
    never takes, and keeps no other.
    """
    try:
        store = MessageStore(Folder(catalog))
        store.give_up()
        if notify is None:  # one that can send them is not to find them claimed
            _tell_undelivered(store)
            return
        kept, refused = store.left(), 0
        for message in kept:
            with store.claimed(message) as is_mine:
                if is_mine and _is_sent_late(notify, message.message):
                    store.drop(message)
                elif is_mine:
                    refused += 1
            if refused == _MOST_REFUSED:
                break
        if refused:
            _tell_undelivered(store)
    except VlmflowError as error:
        logger.warning("whether the catalog keeps messages that nobody was sent is not known: %s", error)


def _tell_undelivered(store: MessageStore) -> None:
    if left := len(store.left()):
        logger.error("%d messages of earlier flows are still undelivered; `vlmflow show` lists them", left)


def _is_sent_late(notify: str, message: Message) -> bool:
    at = f"{message.at.astimezone(dt.UTC):%Y-%m-%d %H:%M} UTC"
    try:
        block = Block.load(notify)
        if not isinstance(block, NotificationBlock):
            return False
        post(block, f"{message.subject} (of {at})", f"This is of {at} and could not be sent then. {message.body}")
    except Exception as error:  # noqa: BLE001 - whatever a messenger raises, the run is what matters
        logger.warning("block %s failed with %s", notify, _said(error))
        return False
    logger.info("%r of %s was sent now", message.subject, at)
    return True


def _said(error: Exception) -> str:
    """Of an error in loading a block the class: its text may hold the address with its token."""
    return str(error) if isinstance(error, UnsentError) else type(error).__name__


def _deliver(block: NotificationBlock, subject: str, body: str) -> None:
    """Sends a message, after a failure once more and once more; raises what the last failure was."""
    for delay_s in (*_SEND_DELAYS_S, None):
        try:
            post(block, subject, body)
        except UnsentError as error:
            if delay_s is None:
                raise
            logger.info("%r is sent again in %g s: the messenger failed with %s", subject, delay_s, error)
            time.sleep(delay_s)
        else:
            return


def check_messenger(flow: Flow[..., Any], flow_run: FlowRun, state: State[Any]) -> None:
    """A hook for the start of a flow: logs that its ``notify`` could send nothing. The work is done all the same."""
    notify = flow_run.parameters.get("notify")
    if notify is None:
        return
    try:
        found = isinstance(Block.load(notify), NotificationBlock)
    except Exception:  # noqa: BLE001 - whatever loading it raises, the run is what matters
        found = False
    if not found:
        flow_run_logger(flow_run, flow).error(
            "notify: %r is no notification block that can be loaded, so nobody will be told of a failure or an alert. "
            "Name one as type/name; `prefect block ls` lists them",
            notify,
        )


def tell_failure(flow: Flow[..., Any], flow_run: FlowRun, state: State[Any]) -> None:
    """A hook for the failure or crash of a flow: sends what the state says, unreconciled rows among it.

    What can be done about it, which no state says, is sent too, and logged for those who look at the flow run.
    """
    message = _shortened(" ".join((state.message or "no message").split()))
    error = state.result(raise_on_failure=False) if state.is_failed() else None
    remedy = error.remedy if isinstance(error, VlmflowError) else ""
    if state.is_crashed() and (
        unknown := [name for name in flow_run.parameters if name not in flow.parameters.properties]
    ):
        # Prefect deploys such a parameter, and ends the run's process before the flow begins.
        remedy = f"The flow has no parameter {', '.join(unknown)}: leave it out of the deployment, and deploy it again."
    if remedy:
        flow_run_logger(flow_run, flow).error("What to do: %s", remedy)
        message += f" - {remedy}"
    notify = flow_run.parameters.get("notify")
    if notify is not None:
        send(notify, f"{flow.name} {flow_run.name} {state.name}", message, _catalog_of(flow_run.parameters))


def _shortened(text: str) -> str:
    """Cut before a word: part of an address would outlive an erasure."""
    return text if len(text) <= _MAX_CHARS else text[: _MAX_CHARS + 1].rpartition(" ")[0] or text[:_MAX_CHARS]


def _catalog_of(given: Mapping[str, Any]) -> CatalogConfig | None:
    """The catalog that a flow run is about, by its parameters; None: its job cannot be read."""
    over = {name: {"uri": given.get(name)} for name in ("source", "catalog")}
    try:
        return read_job(Path(given["job_file"]), {**over, "profile": given.get("profile")}).catalog
    except (KeyError, TypeError, VlmflowError):
        return None


def flagged_share(decisions: Mapping[str, int]) -> float | None:
    """Share of ``review`` and ``block`` among decisions; None: of too few rows."""
    total = sum(decisions.values())
    return None if total < MIN_ROWS else (total - decisions.get("allow", 0)) / total


def flagged_jump(report: RunReport, runs: Iterable[RunInfo], max_jump: float) -> tuple[float, float] | None:
    """Whether a run flagged many more images than the runs before it, over the same source under the same policy.

    Of one catalog may be sources of which very different shares are usual.

    Args:
        runs: of the catalog, the newest first, this one among them. They are read no further back than needed: there
            may be years of them.
        max_jump: how much the share may exceed the median of up to seven runs before.

    Returns:
        The share and that median, if it jumped; None: it did not, or there is nothing to compare with.
    """
    share = flagged_share(report.decisions)
    older = islice(dropwhile(lambda run: run.run_id != report.run_id, runs), 1, 1 + _LOOKED_THROUGH)
    shares = (
        found
        for run in older
        if run.state == "finished"
        and (run.record.get("source"), run.record.get("policy")) == (report.source, report.policy)
        and (found := flagged_share(run.record.get("decisions") or {})) is not None
    )
    before = list(islice(shares, _NIGHTS))
    if share is None or not before:
        return None
    usual = statistics.median(before)
    return (share, usual) if share - usual > max_jump else None
