"""The old address of `common.ct.scheduler`, by which saved models' cards import it."""

from common.ct.scheduler import PreconditionedConsistencyScheduler as PreconditionedConsistencyScheduler
