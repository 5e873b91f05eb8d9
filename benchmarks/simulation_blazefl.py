"""BlazeFL (arXiv:2604.03606) on the users and models of the peer's bench.

    python simulation_blazefl.py --bench ../../shared/bench --model bag --users 10000 --cohort 200

runs in BlazeFL's own environment (Python 3.13, `pip install` of its source), and prints what
`bench_pfl.py` prints. Its FedAvg handler and its trainer of one process are used as they are, but
for what central privacy asks: an update is clipped, the sum noised, and devices count alike.
Batches are ready-made slices, without the cost of a DataLoader.
"""

from __future__ import annotations

import time

START = time.perf_counter()


def main() -> None:
    import argparse
    import json
    import resource
    import sys
    from pathlib import Path
    from typing import Any

    import numpy as np
    import torch
    import torch.nn.functional as F
    from blazefl.contrib import FedAvgBaseClientTrainer, FedAvgBaseServerHandler
    from blazefl.core import deserialize_model, serialize_model

    parser = argparse.ArgumentParser()
    parser.add_argument("--bench", type=Path, required=True)
    parser.add_argument("--model", default="bag")
    for name, default in (("users", 10_000), ("cohort", 200), ("iterations", 20), ("warmup", 2),
                          ("local-batch", 8), ("seed", 0), ("noise-seed", 0)):
        parser.add_argument(f"--{name}", type=int, default=default)
    for name, amount in (("local-lr", 0.1), ("clip", 1.0), ("noise", 0.01)):
        parser.add_argument(f"--{name}", type=float, default=amount)
    options = parser.parse_args()
    sys.path.insert(0, str(options.bench))
    import models
    import synth_users

    imported = time.perf_counter()
    torch.set_num_threads(1)
    task, total = models.TASK[options.model], options.iterations + options.warmup
    rounds = [
        synth_users.cohort(options.seed, number, options.cohort, options.users)
        for number in range(total)
    ]
    examples: dict[int, list[tuple[torch.Tensor, torch.Tensor]]] = {}
    wanted = np.unique(np.concatenate(rounds))
    for start in range(0, len(wanted), 20_000):
        part = wanted[start : start + 20_000]
        block = synth_users.make_users(options.seed, part, task)
        for k, user in enumerate(part.tolist()):
            tensors = [torch.from_numpy(each).split(options.local_batch) for each in block.user(k)]
            examples[user] = list(zip(*tensors, strict=True))

    class Users:
        def get_dataloader(self, type_: Any, cid: int, **_: Any) -> Any:
            return examples[cid]

    class Selector:
        def select_model(self, model_name: str) -> torch.nn.Module:
            return models.make_model(model_name, options.seed)

    class Clipping(FedAvgBaseClientTrainer):
        def train(self, model_parameters: Any, train_loader: Any, cid: int) -> Any:
            package = super().train(model_parameters, train_loader, cid)
            update = package.model_parameters.sub_(model_parameters)
            norm = float(update.norm())
            if norm > options.clip:
                update.mul_(options.clip / norm)
            return package

    class Noising(FedAvgBaseServerHandler):
        def sample_clients(self) -> list[int]:
            return sorted(rounds[self.round].tolist())

        def global_update(self, buffer: list[Any]) -> None:
            added = self.aggregate([each.model_parameters for each in buffer], [1] * len(buffer))
            deviation = options.noise * options.clip / len(buffer)
            added.add_(torch.randn(added.shape, generator=chance), alpha=deviation)
            deserialize_model(self.model, serialize_model(self.model).add_(added))

    chance = torch.Generator().manual_seed(options.noise_seed)
    parts = Selector(), options.model, Users()
    handler = Noising(*parts, total, options.users, 1.0, "cpu", options.local_batch, options.seed)
    handler.num_clients_per_round = options.cohort
    trainer = Clipping(
        *parts, "cpu", options.users, 1, options.local_batch, options.local_lr, options.seed
    )
    trainer.criterion = lambda output, target: F.cross_entropy(
        output.flatten(0, -2), target.flatten()
    )
    stamps, cpu = [time.perf_counter()], [time.process_time()]
    while not handler.if_stop():
        trainer.local_process(handler.downlink_package(), handler.sample_clients())
        for package in trainer.uplink_package():
            handler.load(package)
        stamps.append(time.perf_counter())
        cpu.append(time.process_time())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    seconds = np.diff(stamps)[options.warmup :]
    clients = options.cohort * options.iterations
    test = synth_users.make_users(options.seed + 1, np.arange(100), task)
    print(json.dumps({
        "framework": "blazefl",
        "clients_per_second": clients / seconds.sum(),
        "median_clients_per_second": options.cohort / float(np.median(seconds)),
        "clients_per_cpu_second": clients / (cpu[-1] - cpu[options.warmup]),
        "iteration_seconds": seconds.tolist(),
        "import_seconds": imported - START,
        "setup_seconds": stamps[0] - imported,
        "first_iteration_seconds": stamps[1] - stamps[0],
        "peak_rss_mib": peak,
        "test": models.evaluate(handler.model, test.inputs, test.targets),
    }))


if __name__ == "__main__":
    main()
