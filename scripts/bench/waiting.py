"""What threads that spin while they wait cost on a busy machine: small operations on two threads, either way in turn.

python scripts/bench/waiting.py
"""

import os
import subprocess
import sys

ROUNDS = 3
WORK = """
import time, torch
torch.set_num_threads(2)
layer, x = torch.nn.Linear(64, 64), torch.randn(2048, 64)
cpu, clock = time.process_time(), time.perf_counter()
for _ in range(400):
    layer(x).sin()
print(f"{time.process_time() - cpu:.2f} s of CPU, {time.perf_counter() - clock:.2f} s")
"""


def main() -> None:
    for _ in range(ROUNDS):
        for policy in ("ACTIVE", "PASSIVE"):
            environment = {**os.environ, "OMP_NUM_THREADS": "2", "OMP_WAIT_POLICY": policy}
            done = subprocess.run(
                [sys.executable, "-c", WORK], env=environment, capture_output=True, text=True, check=True
            )
            print(f"{policy}: {done.stdout.strip()}", flush=True)


if __name__ == "__main__":
    main()
