"""Two tiers with any torch model: GTC inside a group of workers (a node), BMUF across the groups. The same file runs

    python examples/03_two_tiers.py                                        alone
    torchrun --standalone --nproc-per-node 4 examples/03_two_tiers.py      in two groups of two workers
    mpirun -n 4 --oversubscribe python examples/03_two_tiers.py            the same under MPI

On real nodes, group_size is the number of workers of a node. BMUF's workers are the groups: with G of them a block
moves about G times the mean of what they have learnt, so the learning rate is chosen for each G.
"""

import torch
from torch.nn import functional

from teacherstudent.distributed import TwoTier, connect

NUM_STEPS = 300
BATCH_SIZE = 32

torch.set_num_threads(1)
torch.manual_seed(0)
comm = connect()

model = torch.nn.Sequential(torch.nn.Linear(40, 256), torch.nn.Tanh(), torch.nn.Linear(256, 10)).to(
    comm.device
)
optimizer = TwoTier(
    torch.optim.SGD(model.parameters(), lr=0.5),
    comm,
    group_size=min(2, comm.size),
    inner_options={"density": 1e-2},
    block_steps=10,
)

# Made-up data: ten classes that a hidden matrix tells apart. Every worker draws batches of its own.
hidden = torch.randn(40, 10, generator=torch.Generator().manual_seed(0)).to(comm.device)
generator = torch.Generator().manual_seed(1 + comm.rank)
held_out = torch.randn(1000, 40, generator=torch.Generator().manual_seed(99)).to(comm.device)

for step in range(NUM_STEPS):
    inputs = torch.randn(BATCH_SIZE, 40, generator=generator).to(comm.device)
    optimizer.zero_grad()
    loss = functional.cross_entropy(model(inputs), (inputs @ hidden).argmax(dim=1))
    loss.backward()
    optimizer.step(weight=BATCH_SIZE)
    if (step + 1) % 50 == 0:
        with optimizer.global_weights(), torch.no_grad():  # the model that all workers share
            held_out_loss = functional.cross_entropy(model(held_out), (held_out @ hidden).argmax(dim=1))
        if comm.rank == 0:
            print(f"step {step + 1:4d}  loss {loss.item():.3f}  held out {held_out_loss.item():.3f}")

optimizer.synchronize()
if comm.rank == 0:
    print(f"{comm.size} worker(s) in {optimizer.num_groups} group(s) on {comm.device}")
    for name, value in optimizer.metrics().items():
        print(f"  {name:20s} {value:.6g}")
comm.close()
