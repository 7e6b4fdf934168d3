"""The names of the files that describe a result."""

from __future__ import annotations


PAGE_NAME = "report.html"
EVALUATION_NAME = "evaluation.json"
SPEED_NAME = "speed.json"
TASKS_NAME = "tasks.json"
