"""Reads a run's event files with the real TensorBoard and compares them with its log.jsonl.

    python scripts/bench/tensorboard_check.py RUN

RUN is the folder of a run with `tensorboard: true`; the Python has tensorboard. Ends with status 1 when the two do not agree.
"""
import json
import sys
from pathlib import Path

import numpy as np
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

run = Path(sys.argv[1])
lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
log = [l for l in lines if "evaluation" not in l]
expected = {f"train/{k}": {l["step"]: l[k] for l in log} for k in ("loss", "lr", "gradNorm", "tokensPerSecond", "waited")}
for level in range(len(log[0]["coefficients"])):
    expected[f"coefficients/level_{level}"] = {l["step"]: l["coefficients"][level] for l in log}
for line in lines:
    evaluation = line.get("evaluation", {})
    groups = {f"level_{i}": g for i, g in enumerate(evaluation.get("levels", []))}
    groups |= {f"task_{task}": g for task, g in evaluation.get("tasks", {}).items()}
    values = {f"eval/{name}": g["loss"] for name, g in groups.items() if g["loss"] is not None}
    for task, g in evaluation.get("tasks", {}).items():
        values |= {f"gate/{task}/level_{level}": c for level, c in enumerate(g["coefficients"] or [])}
    if evaluation:
        values["eval/loss"] = evaluation["loss"]
    for tag, value in values.items():
        expected.setdefault(tag, {})[line["step"]] = value

events = EventAccumulator(str(run), size_guidance={"scalars": 0}).Reload()  # 0: all points, not a sample
tags = events.Tags()["scalars"]
agrees = sorted(tags) == sorted(expected)
if not agrees:
    print(f"tags: expected {sorted(expected)}, got {sorted(tags)}")
for tag in sorted(expected.keys() & set(tags)):
    got = [(e.step, np.float32(e.value)) for e in events.Scalars(tag)]
    same = got == [(step, np.float32(value)) for step, value in expected[tag].items()]
    agrees &= same
    print(f"{tag}: {len(got)} points, {'agrees' if same else 'MISSED'}")
sys.exit(0 if agrees else 1)
