"""The engine: what a scan will do (plan), and doing it (scan)."""

from fastinterp.engine.catalogue import CATALOGUE, choose_analyses
from fastinterp.engine.plan import Plan, plan
from fastinterp.engine.run import scan
from fastinterp.prompts.given import accepting
from fastinterp.store import describe_store as describe
from fastinterp.store import open_store as open

plan = accepting(plan, paths=True)
scan = accepting(scan, paths=True)

__all__ = ["CATALOGUE", "Plan", "choose_analyses", "describe", "open", "plan", "scan"]
