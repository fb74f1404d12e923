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
log = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
expected = {f"train/{k}": {l["step"]: l[k] for l in log} for k in ("loss", "lr", "gradNorm", "tokensPerSecond", "waited")}
for level in range(len(log[0]["coefficients"])):
    expected[f"coefficients/level_{level}"] = {l["step"]: l["coefficients"][level] for l in log}

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
