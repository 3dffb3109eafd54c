"""`ip2p evaluate`: score editors on a data set."""

from __future__ import annotations

from ip2p.evaluation.settings import EvaluateConfig


def run_evaluate(config: EvaluateConfig) -> None:
    """Score editors, or resume. Prints the table and the path of the report."""
    from ip2p.evaluation.metrics import METRICS  # imports torch
    from ip2p.evaluation.report import as_table

    if config.list_metrics:
        for name, metric in METRICS.items():
            if not metric.hidden:
                print(f"{name:<22}{'↑' if metric.higher else '↓'} {metric.about}")
        return
    from ip2p.evaluation.run import PAGE, evaluate

    report = evaluate(config)
    shown = {name: METRICS.get(name) for name in report["metrics"]}
    print(as_table(report["lines"], {name: metric for name, metric in shown.items() if metric is not None}))
    assert config.out is not None
    print(config.out / PAGE)
