"""What SQLAlchemy tells the sessions of units; one set of listeners for all sessions of the process.

Sessions that are in no unit are passed over.
"""

from sqlalchemy import event
from sqlalchemy.engine import Connection
from sqlalchemy.orm import Session, SessionTransaction

from ._engines import KEY
from ._lines import Lines
from ._refusal import Refusal
from ._slot import Slot
from .errors import ContextClosedError


def _slot_of(session: Session) -> Slot | None:
    slot = session.info.get(KEY)
    return slot if isinstance(slot, Slot) else None


@event.listens_for(Session, "after_begin")
def _after_begin(session: Session, transaction: SessionTransaction, connection: Connection) -> None:
    slot = session.info.get(KEY)
    if isinstance(slot, Slot):
        if not transaction.nested:
            slot.began(connection)
    elif isinstance(slot, Lines):
        slot.add(connection)
    elif isinstance(slot, Refusal):
        slot.close_late(session)
        raise ContextClosedError(slot.message)


@event.listens_for(Session, "before_attach")
def _before_attach(session: Session, instance: object) -> None:
    refusal = session.info.get(KEY)
    if isinstance(refusal, Refusal):
        raise ContextClosedError(refusal.message)


@event.listens_for(Session, "before_commit")
def _before_commit(session: Session) -> None:
    slot = session.info.get(KEY)
    if isinstance(slot, Slot):
        if not session.in_nested_transaction():
            slot.before()
    elif isinstance(slot, Refusal):
        raise ContextClosedError(slot.message)


@event.listens_for(Session, "after_commit")
def _after_commit(session: Session) -> None:
    if (slot := _slot_of(session)) is not None and not session.in_nested_transaction():
        slot.after()


@event.listens_for(Session, "after_soft_rollback")
def _after_soft_rollback(session: Session, transaction: SessionTransaction) -> None:
    if (slot := _slot_of(session)) is not None:
        slot.callbacks.drop(transaction)


@event.listens_for(Session, "after_transaction_end")
def _after_transaction_end(session: Session, transaction: SessionTransaction) -> None:
    if transaction.parent is not None:
        return
    slot = session.info.get(KEY)
    if isinstance(slot, Slot):
        slot.over()
    elif isinstance(slot, Lines):
        slot.clear()
