"""Where does a coarse mode lose? Error of each mode at each noise level, on held-out data.

    python benchmarks/level_error.py --data <folder or hub id> [--adapters lora shared]

The error is the base's own objective (mean squared, unit-variance target) on 256 test pictures with
their labels. Writes benchmarks/results/level-error-<name>.json.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from ditdial import elastify
from ditdial.measure.provenance import write_results
from ditdial.ops.flow import network_input_and_target
from ditdial.plan.execution import Execution
from ditdial.reference import load_reference, reference_adapter
from ditdial.training.config import DataConfig
from ditdial.training.data import ImageData

LEVELS = (0.98, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1)
RESULTS = Path(__file__).parent / "results"


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True)
    parser.add_argument("--name", default="mnist")
    parser.add_argument("--adapters", nargs="+", default=["lora", "shared"])
    parser.add_argument("--images", type=int, default=256)
    arguments = parser.parse_args()
    rows = []
    for adapter in arguments.adapters:
        pipe = load_reference(arguments.name)
        handle = elastify(
            pipe,
            reference_adapter(adapter, arguments.name),
            execution=Execution(merge=True),
        )
        model, statistics = pipe.transformer, pipe.config
        config = DataConfig(
            path=arguments.data,
            split="test",
            channels=model.config.in_channels,
            mean=statistics["data_mean"],
            std=statistics["data_std"],
        )
        data = ImageData(config, limit=arguments.images)
        images, labels = data.batch(0, len(data), 0, torch.device("cpu"))
        noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
        for level in LEVELS:
            x, target = network_input_and_target(images, noise, torch.tensor(level))
            times = torch.full((len(data),), level * 1000)
            row: dict[str, object] = {"adapter": adapter, "level": level}
            for mode in handle.modes:
                with handle.using(mode):
                    prediction = model(x, timestep=times, class_labels=labels).sample
                row[mode.name] = (prediction - target).square().mean().item()
            rows.append(row)
            print(row, flush=True)
    write_results(RESULTS / f"level-error-{arguments.name}.json", {"rows": rows})


if __name__ == "__main__":
    main()
