"""What is made of results.json: a short table for the end of a run, and a page with everything."""

from collections import Counter
from typing import Any

from bnsurgery.text.tables import cell_text

WIDTH = 150
LINES, FAILURES = 4, 2  # of a step in the short table; the other key figures are on the page
TESTS = "tests"  # rows of this table are tests, of which the page counts the good ones


def short(data: dict[str, Any]) -> str:
    """Step, verdict, seconds and key figures."""
    lines = [f"{'step':12} {'verdict':11} {'s':>4}  key figures"]
    for step in data["steps"]:
        texts = [step["reason"]] if step["reason"] else []
        failures = step["failures"]
        texts += [f"failed: {failure['what']}" for failure in failures[:FAILURES]]
        if len(failures) > FAILURES:
            texts[-1] += f", and {len(failures) - FAILURES} more"
        texts = (texts + step["keys"])[:LINES]
        lines.append(f"{step['name']:12} {step['verdict']:11} {step['seconds']:4.0f}  {(texts or [''])[0]}")
        lines += [f"{'':31}{text}" for text in texts[1:]]
    return "\n".join(line[:WIDTH].rstrip() for line in lines)


def markdown(data: dict[str, Any]) -> str:
    """Everything: a summary, then each step with its failures and tables."""
    facts = {row["what"]: row["value"] for step in data["steps"] for row in step["rows"] if row["table"] == "machine"}
    title = facts.get("GPU") or facts.get("processor") or data["device"]
    told = [f"`python -m benchmarks.gpu` on {data['device']}{', quick' if data['quick'] else ''}"]
    told.append(f"commit {data['commit'] or 'not known'}")
    lines = [f"# {title}", "", f"{', '.join(told)}, {data['started']} to {data.get('finished', 'no end')}.", ""]
    summary = [
        {"step": s["name"], "verdict": s["verdict"], "seconds": s["seconds"], "what": s["description"],
         "key figures": "; ".join([*([s["reason"]] if s["reason"] else []), *s["keys"]])}
        for s in data["steps"]
    ]  # fmt: skip
    lines += _table(summary)
    for step in data["steps"]:
        if step["rows"] or step["failures"]:
            lines += [f"## {step['name']}: {step['description']}", ""]
        for failure in step["failures"]:
            lines += [f"Failed: {failure['what']}", "", "```", failure["why"].strip(), "```", ""]
        for name in dict.fromkeys(row["table"] for row in step["rows"]):
            rows = [{k: v for k, v in row.items() if k != "table"} for row in step["rows"] if row["table"] == name]
            lines += [f"### {name}", "", *_table(_counted(rows) if name == TESTS else rows)]
    return "\n".join(lines)


def _counted(tests: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Tests by function; those with figures of their own, or with a reason, also alone."""
    groups: dict[str, Counter[str]] = {}
    for test in tests:
        groups.setdefault(test["test"].partition("[")[0], Counter())[test["outcome"]] += 1
    counted = [{"test": name, **counts} for name, counts in groups.items()]
    return counted + [test for test in tests if len(test) > 3 and test["outcome"] != "failed"]


def _table(rows: list[dict[str, Any]]) -> list[str]:
    columns = list(dict.fromkeys(key for row in rows for key in row))
    cells = [[_cell(row.get(column, "")) for column in columns] for row in rows]
    return ["| " + " | ".join(line) + " |" for line in (columns, ["---"] * len(columns), *cells)] + [""]


def _cell(value: Any) -> str:
    text = ", ".join(map(str, value)) if isinstance(value, list) else cell_text(value)
    return text.replace("|", "\\|").replace("\n", " ")
