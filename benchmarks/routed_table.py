"""Routed widths on the reference model, against what the same training and the same time buy.

    python benchmarks/routed_table.py [--static runs/mnist-dydit-static/export] [--images 400]

Rows: the base; the base at fewer steps; the control, the same weights trained as long with nothing
left out, at all and at fewer steps; DyDiT at the widths it was trained for, at a width between them
(by its threshold), and with a fixed share of the tokens. All have the same seeds and a guidance
scale of their own, tuned on others. ``against_static`` is the paired difference to the control at
fewer steps that take no less time.

Rows that exist in the results file are kept. Writes benchmarks/results/routed-<name>.json and two
figures: what is open over noise levels, and which tokens enter the feed-forward.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from frontier import START, STEPS, Frontier
from reference_table import REPORT_SEED, Row, _frechet
from rows import CONTROLS, RESULTS, Rows, parser_of

from ditdial import Mode, Schedule, elastify
from ditdial.reference import reference_adapter
from ditdial.sampling.batches import cyclic_labels

MODES = ("width70", "width60", "width50", "width50_keep60")
FEWER = (10, 9, 8, 7, 6)


def main() -> None:
    arguments = parser_of(__doc__).parse_args()
    rows = Rows(RESULTS / f"routed-{arguments.name}.json", arguments, STEPS, compare)
    bench = Frontier(arguments.name, arguments.images, arguments.tune_images, arguments.dtype)
    controls(bench, arguments.static, rows)
    handle = bench.handle = elastify(
        bench.pipe, arguments.adapter or reference_adapter("dydit", arguments.name)
    )
    for name in ("full", *MODES):

        def choose(name: str = name) -> None:
            handle.schedule = Schedule.constant(Mode.parse(name))

        rows.keep(
            f"dydit/{name}",
            lambda choose=choose: bench.measured(choose),
            lambda choose=choose: bench.seconds(choose),
        )
    images = Path(__file__).parent.parent / "docs" / "images"
    draw_widths(handle, images / "dydit-widths.png")
    draw_tokens(bench, images / "dydit-tokens.png")


def controls(bench: Frontier, static: Path, rows: Rows) -> None:
    """The base, at fewer steps, and the same weights trained as long, at all and fewer steps.

    Args:
        static: adapter folder of the control; left out if there is none.
    """
    base = rows.keep("base", lambda: bench.row(STEPS, START, ratio=1.0, time_ratio=1.0))
    bench.full = bench.draw(base["scale"], STEPS, REPORT_SEED, bench.images)

    def at(steps: int) -> Callable[[], Row]:
        share = steps / STEPS
        return lambda: bench.row(steps, START, ratio=share, time_ratio=share)

    if static.is_dir():
        bench.handle = elastify(bench.pipe, static)
        for steps in (STEPS, *FEWER):
            rows.keep(f"static/{steps}", at(steps))
    bench.use(None)
    for steps in FEWER:
        rows.keep(f"fewer-steps/{steps}", at(steps))


def compare(rows: list[Row]) -> None:
    """Paired differences to the base, and to both controls at steps that take no less time.

    The controls are the base, and the model that was trained as long.
    """
    base = rows[0]
    controls: dict[str, dict[int, Row]] = {"static": {}, "fewer-steps": {STEPS: base}}
    for row in rows[1:]:
        kind, _, steps = row["key"].partition("/")
        if kind in controls:
            controls[kind][int(steps)] = row
    for row in rows[1:]:
        loss = _frechet(row).minus(_frechet(base))
        row["loss"], row["loss_noise"] = loss.value, loss.noise
        if row["key"].startswith(CONTROLS) or row["key"] == "dydit/full":
            continue
        for kind, rivals in controls.items():
            if rivals:
                _against(row, kind, rivals)


def _against(row: Row, kind: str, rivals: dict[int, Row]) -> None:
    for name, share in (("time", row["time_ratio"]), ("cost", row["ratio"])):
        steps = min(STEPS, math.ceil(STEPS * share - 0.05))
        steps = min((each for each in rivals if each >= steps), default=STEPS)
        apart = _frechet(row).minus(_frechet(rivals[steps]))
        row[f"rival_steps_by_{name}"] = steps
        row[f"against_{kind}_by_{name}"] = apart.value
        row[f"against_{kind}_by_{name}_noise"] = apart.noise


def draw_widths(handle: Any, path: Path) -> None:
    """Open heads and channels of each block over noise levels, and tokens as training left them."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    levels = [i / 50 for i in range(51)]
    modes = handle.method.routed
    figure, panels = plt.subplots(
        len(modes), 3, figsize=(11, 2.6 * len(modes)), layout="constrained", squeeze=False
    )
    for row, mode in zip(panels, modes, strict=True):
        kept = [handle._engine.surgery.widths.kept(handle.model, mode, level) for level in levels]
        for panel, name in zip(row, ("heads", "channels", "tokens"), strict=True):
            table = torch.tensor([[getattr(each, name) for each in level] for level in kept])
            image = panel.imshow(
                table.T, aspect="auto", extent=(0, 1, len(table[0]), 0), vmin=0, vmax=1
            )
            panel.set_title(f"{name} kept, {mode.name}", fontsize=9)
            panel.set_xlabel("noise level", fontsize=8)
            panel.set_ylabel("block", fontsize=8)
    figure.colorbar(image, ax=panels, shrink=0.6)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def draw_tokens(bench: Frontier, path: Path) -> None:
    """For ten pictures: the share of blocks whose feed-forward each token entered, over the run."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    handle = bench.handle
    assert handle is not None
    mode = min(handle.method.routed, key=lambda each: each.width)
    handle.schedule = Schedule.constant(mode)
    masks: list[torch.Tensor] = []
    routers = handle._engine.wiring.new.routers[mode.name]
    stock = routers.tokens

    def watching(block: int, x: torch.Tensor) -> torch.Tensor:
        logits = stock(block, x)
        masks.append((logits > 0).float())
        return logits

    routers.tokens = watching
    try:
        images = bench.pipe(
            cyclic_labels(10, 10),
            seeds=list(range(10)),
            num_inference_steps=STEPS,
            output_type="pt",
        ).images
    finally:
        del routers.tokens
    conditional = torch.stack(masks)[:, :10].mean(0)
    side = math.isqrt(conditional.shape[1])
    figure, panels = plt.subplots(2, 10, figsize=(11, 2.6), layout="constrained")
    for index in range(10):
        panels[0, index].imshow(images[index, 0], cmap="gray")
        panels[1, index].imshow(conditional[index].view(side, side), vmin=0, vmax=1)
        for panel in panels[:, index]:
            panel.axis("off")
    figure.savefig(path, dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    main()
