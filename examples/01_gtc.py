"""Gradient threshold compression (GTC) with any torch model. The same file runs

    python examples/01_gtc.py                                         alone
    torchrun --standalone --nproc-per-node 2 examples/01_gtc.py       on two workers of this machine
    mpirun -n 2 --oversubscribe python examples/01_gtc.py             the same under MPI

Three lines make a training loop distributed: connect, wrap the optimizer, say how much data a step stands for.
"""

import torch
from torch.nn import functional

from teacherstudent.distributed import GTC, connect

NUM_STEPS = 300
BATCH_SIZE = 32

torch.set_num_threads(1)
torch.manual_seed(0)
comm = connect()

model = torch.nn.Sequential(torch.nn.Linear(40, 256), torch.nn.Tanh(), torch.nn.Linear(256, 10)).to(
    comm.device
)
optimizer = GTC(torch.optim.SGD(model.parameters(), lr=0.5), comm, density=1e-2)

# Made-up data: ten classes that a hidden matrix tells apart. Every worker draws batches of its own.
hidden = torch.randn(40, 10, generator=torch.Generator().manual_seed(0)).to(comm.device)
generator = torch.Generator().manual_seed(1 + comm.rank)

for step in range(NUM_STEPS):
    inputs = torch.randn(BATCH_SIZE, 40, generator=generator).to(comm.device)
    optimizer.zero_grad()
    loss = functional.cross_entropy(model(inputs), (inputs @ hidden).argmax(dim=1))
    loss.backward()
    optimizer.step(weight=BATCH_SIZE)
    if comm.rank == 0 and (step + 1) % 50 == 0:
        metrics = optimizer.metrics()
        print(
            f"step {step + 1:4d}  loss {loss.item():.3f}  density {metrics['mean_density']:.4f}  "
            f"threshold {metrics['threshold']:.4g}  sent {metrics['bytes_sent'] / 1e3:.0f} kB"
        )

optimizer.synchronize()
if comm.rank == 0:
    print(f"{comm.size} worker(s) on {comm.device}")
    for name, value in optimizer.metrics().items():
        print(f"  {name:20s} {value:.6g}")
comm.close()
