"""The PyTorch side of `npm run bench:torch`.

A resident process: one JSON request a line on stdin, one JSON reply a line on stdout. It builds cases, runs them when it
is told to, and otherwise sleeps, so that the other side is timed on an idle machine.

  {"op": "hello"}                                  -> versions
  {"op": "make", "id": 1, "kind": "gemm", ...}     -> builds a case (peer_kernels.py and peer_model.py have the kinds)
  {"op": "time", "id": 1, "reps": 3}               -> {"seconds": one run, mean over the repetitions}
  {"op": "values", "id": 1}                        -> digest of the results of the last run, by name
  {"op": "drop", "id": 1}

With --memory KIND and a JSON object of arguments it builds one case in this fresh process, runs it twice, forgets the
peak so far, runs it twice again and prints {"base": bytes resident before the first run, "peak": at most in the last}.
"""
import argparse
import ctypes
import gc
import json
import os
import sys
import time


def libraries():
    """Imports what is needed; names what is missing instead of a traceback."""
    try:
        import numpy  # noqa: F401
        import safetensors  # noqa: F401
        import torch
        import transformers
    except ImportError as e:
        raise SystemExit(f"missing Python module {e.name}: pip install torch transformers numpy safetensors")
    return torch, transformers


def status_bytes(key):
    """A size of /proc/self/status in bytes. ru_maxrss would not do: it inherits the parent's size from before exec."""
    with open("/proc/self/status") as f:
        return next(int(line.split()[1]) * 1024 for line in f if line.startswith(key + ":"))


def digest(tensor):
    """What two programs compare of a result: size, norm over all elements (f64), and 256 elements spread over it."""
    import numpy as np

    flat = tensor.detach().float().reshape(-1).numpy()
    n = flat.size
    at = (np.arange(min(256, n), dtype=np.int64) * 2654435761) % n
    norm = float(np.sqrt(np.sum(flat.astype(np.float64) ** 2)))
    return {"n": n, "norm": norm, "samples": [float(v) for v in flat[at]]}


def release():
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


class Server:
    def __init__(self, torch, transformers, threads):
        import peer_kernels
        import peer_model

        self.kinds = {**peer_kernels.KINDS, **peer_model.KINDS}
        self.cases = {}
        self.versions = {"torch": torch.__version__, "transformers": transformers.__version__, "threads": threads}

    def handle(self, request):
        op = request.pop("op")
        if op == "hello":
            return self.versions
        case_id = request.pop("id")
        if op == "make":
            self.cases[case_id] = self.kinds[request.pop("kind")](**request)
            return {}
        case = self.cases[case_id]
        if op == "time":
            start = time.perf_counter()
            for _ in range(request["reps"]):
                case.run()
            return {"seconds": (time.perf_counter() - start) / request["reps"]}
        if op == "values":
            return {name: v if isinstance(v, list) else digest(v) for name, v in case.values().items()}
        if op == "drop":
            del self.cases[case_id], case
            release()
            return {}
        raise ValueError(f"unknown request {op}")


def serve(server, out):
    for line in sys.stdin:
        try:
            reply = server.handle(json.loads(line))
        except Exception as e:  # the other side decides what an error means for its row
            reply = {"error": f"{type(e).__name__}: {e}"}
        out.write(json.dumps(reply) + "\n")
        out.flush()


def measure_memory(server, kind, args, out):
    case = server.kinds[kind](**args)
    release()
    base = status_bytes("VmRSS")
    for run in range(4):
        if run == 2:  # after warm-up (a first run may compile) the peak starts again
            with open("/proc/self/clear_refs", "w") as f:
                f.write("5")
        case.run()
    out.write(json.dumps({"base": base, "peak": status_bytes("VmHWM")}) + "\n")


def main():
    p = argparse.ArgumentParser(description="PyTorch side of the benchmark; started by scripts/bench/torch.ts")
    p.add_argument("--threads", type=int, default=2)
    p.add_argument("--cache", default="", help="folder for what torch.compile compiles")
    p.add_argument("--memory", metavar="KIND", default="")
    p.add_argument("--args", default="{}")
    a = p.parse_args()
    os.environ.update(OMP_NUM_THREADS=str(a.threads), HF_HUB_OFFLINE="1", TRANSFORMERS_VERBOSITY="error")
    if a.cache:  # what an interrupted run left half written elsewhere would fail for ever
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = a.cache
    # replies get the real stdout for themselves; whatever a library prints goes to stderr
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    torch, transformers = libraries()
    torch.set_num_threads(a.threads)
    server = Server(torch, transformers, a.threads)
    if a.memory:
        measure_memory(server, a.memory, json.loads(a.args), out)
    else:
        serve(server, out)


if __name__ == "__main__":
    main()
