"""Half the hidden units of a GRU and an LSTM cut in one call, distilled, exported, and timed in ONNX Runtime.

    python -m benchmarks.recurrent FOLDER [--net gru] [--epochs 25] [--seed 0]   train, compress, export, time
    python -m benchmarks.recurrent FOLDER --time-only                            time again what the folder holds
    python -m benchmarks.recurrent FOLDER --criteria                             compare criteria before distillation
    python -m benchmarks.recurrent FOLDER --bits                                 weights in 2 to 4 bits, two roundings
    python -m benchmarks.recurrent FOLDER --net lstm --integers                  the LSTM in 8 bits, exported, timed

The folder keeps trained weights, exported files and figures; a net trained there once is not trained again. Spoken
digits by six speakers, classified by two layers of 256 units. Criteria are compared on recordings of the validation
part; the test parts judge results only.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import gracile as gc
from benchmarks.spoken_digits import SpokenDigits, augmented_loader, spoken_digits
from gracile.environment import has_int8_dot_product, instruction_set
from gracile.evaluate.latency import measure_latency
from gracile.evaluate.parity import measure_parity
from gracile.steps import AdamW

NETS: dict[str, type[nn.RNNBase]] = {"gru": nn.GRU, "lstm": nn.LSTM}
CRITERIA = {
    "magnitude": gc.Magnitude(),
    "taylor": gc.Taylor(),
    "hessian": gc.Hessian(),
    "gate Fisher": gc.criteria.GateFisher(),
    "random": gc.criteria.Random(0),
}
Part = tuple[Tensor, Tensor]


@torch.no_grad()
def accuracy(model: Callable[[Tensor], Tensor], part: Part) -> float:
    """Per cent of the clips whose largest logit is the label's."""
    frames, labels = part
    logits = torch.cat([model(batch) for batch in frames.split(100)])
    return 100 * (logits.argmax(1) == labels).double().mean().item()


def accuracies(model: Callable[[Tensor], Tensor], parts: dict[str, Part]) -> dict[str, float]:
    """Of both test parts."""
    return {name: round(accuracy(model, parts[name]), 2) for name in ("test", "further_test")}


def train(model: nn.Module, part: Part, epochs: int) -> None:
    """In place: cross-entropy, AdamW, a one-cycle learning rate."""
    loader = augmented_loader(*part)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=2e-3, total_steps=epochs * len(loader))
    model.train()
    for _ in range(epochs):
        for frames, labels in loader:
            loss = F.cross_entropy(model(frames), labels, label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()


def trained(net: str, part: Part, folder: Path, seed: int, epochs: int) -> SpokenDigits:
    """The net in eval mode, trained at its first call and with the weights kept in the folder later."""
    torch.manual_seed(seed)
    model = SpokenDigits(NETS[net])
    weights = folder / f"{net}-{seed}.safetensors"
    if weights.is_file():
        model.load_state_dict(load_file(weights))
    else:
        start = time.perf_counter()
        train(model, part, epochs)
        save_file(model.state_dict(), weights)
        print(json.dumps({"net": net, "trained_seconds": round(time.perf_counter() - start)}), flush=True)
    return model.eval()


def prune(criterion: Any) -> gc.Prune:
    return gc.Prune(0.5, criterion=criterion, pattern=gc.Channels(multiple_of=16))


def compress(model: SpokenDigits, parts: dict[str, Part], args: argparse.Namespace) -> tuple[nn.Module, dict[str, Any]]:
    """The compressed net, and its accuracies before, between and after."""
    data = gc.Data(train=augmented_loader(*parts["train"]), loss=gc.losses.cross_entropy)
    cut = prune(CRITERIA[args.criterion])
    distill = gc.Distill(
        losses=(gc.SoftLabels(temperature=2),), epochs=args.epochs, optimizer=AdamW(learning_rate=2e-3)
    )
    pruned = gc.compress(model, cut, data, seed=args.seed).model
    start = time.perf_counter()
    small = gc.compress(model, gc.Recipe(cut, distill), data, seed=args.seed).model
    seconds = time.perf_counter() - start
    stages = {"dense": model, "pruned": pruned, "distilled": small}
    return small, {
        "criterion": args.criterion,
        "compress_seconds": round(seconds),
        "threads": torch.get_num_threads(),
        "hidden": [net.rnn.hidden_size for net in (model, small)],  # type: ignore[union-attr]
        "parameters": [sum(p.numel() for p in net.parameters()) for net in (model, small)],
        "test_examples": {name: len(parts[name][1]) for name in ("test", "further_test")},
        "accuracy": {stage: accuracies(net, parts) for stage, net in stages.items()},
    }


def in_integers(
    model: SpokenDigits, parts: dict[str, Part], args: argparse.Namespace
) -> tuple[nn.Module, dict[str, Any]]:
    """The net in 8 bits, inputs and states rounded as they come, and accuracies before and after."""
    scheme = gc.formats.W8A8Dynamic if has_int8_dot_product() else gc.formats.W7A8Dynamic
    small = gc.compress(model, gc.Quantize(scheme), gc.Data(), seed=args.seed).model
    return small, {
        "scheme": scheme.name,
        "accuracy": {"dense": accuracies(model, parts), "small": accuracies(small, parts)},
    }


def by_onnxruntime(folder: Path, stem: str) -> None:
    """The dense file as ONNX Runtime's own dynamic quantizer leaves it, after its pre-processing."""
    from onnxruntime.quantization import QuantType, quantize_dynamic
    from onnxruntime.quantization.shape_inference import quant_pre_process

    dense, prepared = folder / f"{stem}-dense.onnx", folder / f"{stem}-prepared.onnx"
    quant_pre_process(str(dense), str(prepared), skip_symbolic_shape=True)
    settings = {"per_channel": True, "weight_type": QuantType.QInt8}
    quantize_dynamic(str(prepared), str(folder / f"{stem}-peer.onnx"), **settings)


def export(models: dict[str, nn.Module], folder: Path, stem: str, part: Part) -> dict[str, float]:
    """Write each model for ONNX Runtime; its largest logit error there on the part, relative to the largest logit."""
    target = gc.OnnxRuntime(threads=1)
    errors = {}
    for name, model in models.items():
        path = target.export(model, part[0][:32], folder / f"{stem}-{name}.onnx")
        with torch.no_grad():
            errors[name] = measure_parity(model(part[0]), target.load(path)(part[0])).relative_error
    return errors


def timed(folder: Path, stem: str, frames: Tensor, seconds: float) -> dict[str, Any]:
    """How many times faster than the dense net the compressed one is in ONNX Runtime, by batch size."""
    target = gc.OnnxRuntime(threads=1)
    files = {name: folder / f"{stem}-{name}.onnx" for name in ("dense", "peer", "small")}
    runners = {name: target.load(path) for name, path in files.items() if path.is_file()}
    found: dict[str, Any] = {"instruction_set": instruction_set(), "threads": 1}
    for size in (1, 32):
        batch = frames[:size]
        latencies = measure_latency(
            {name: (lambda runner=runner, batch=batch: runner(batch)) for name, runner in runners.items()},
            seconds=seconds,
            rounds=1000,
            threads=1,
            batch_size=size,
        )
        small = latencies["small"]
        found[f"batch_{size}"] = {
            **{f"{name}_ms": round(latency.p50_ms, 3) for name, latency in latencies.items()},
            "ratio": round(small.ratio, 2),
            "interval": [round(small.ratio_low, 2), round(small.ratio_high, 2)],
        }
    return found


@torch.no_grad()
def log_probabilities(model: nn.Module, part: Part) -> Tensor:
    """Logarithms of the class probabilities [n, 10]."""
    return F.log_softmax(model(part[0]), dim=1)


def compare_criteria(model: SpokenDigits, net: str, parts: dict[str, Part], args: argparse.Namespace) -> None:
    """A line for each criterion: accuracy and KL(dense ‖ pruned) in nats on the validation part after the cut."""
    data = gc.Data(train=augmented_loader(*parts["train"]), loss=gc.losses.cross_entropy)
    validation = parts["validation"]
    teacher = log_probabilities(model, validation)
    row = {"net": net, "seed": args.seed, "dense": round(accuracy(model, validation), 2)}
    for name, criterion in CRITERIA.items():
        pruned = gc.compress(model, prune(criterion), data, seed=args.seed).model
        student = log_probabilities(pruned, validation)
        loss = F.kl_div(student, teacher, reduction="batchmean", log_target=True).item()
        found = {"criterion": name, "validation": round(accuracy(pruned, validation), 2), "kl": round(loss, 4)}
        print(json.dumps(row | found), flush=True)


def compare_roundings(model: SpokenDigits, net: str, parts: dict[str, Part], args: argparse.Namespace) -> None:
    """A line for each number of bits and rounding: accuracy on both test parts and KL(dense ‖ quantized) in nats.

    320 training clips calibrate.
    """
    order = torch.randperm(len(parts["train"][1]), generator=torch.Generator().manual_seed(args.seed))
    data = gc.Data(calibration=list(parts["train"][0][order[:320]].split(32)))
    test: Part = tuple(torch.cat(pair) for pair in zip(parts["test"], parts["further_test"], strict=True))  # type: ignore[assignment]
    teacher = log_probabilities(model, test)
    row = {"net": net, "seed": args.seed, "dense": round(accuracy(model, test), 2)}
    for bits in (4, 3, 2):
        for solver in (None, gc.solvers.GPTQ()):
            start = time.perf_counter()
            small = gc.compress(model, gc.Quantize(gc.Int(bits), solver=solver), data, seed=args.seed).model
            seconds = time.perf_counter() - start
            loss = F.kl_div(log_probabilities(small, test), teacher, reduction="batchmean", log_target=True).item()
            found = {"bits": bits, "solver": "GPTQ" if solver else "nearest", "test": round(accuracy(small, test), 2)}
            print(json.dumps(row | found | {"kl": round(loss, 5), "seconds": round(seconds)}), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--net", choices=NETS, action="append")
    parser.add_argument("--criterion", choices=CRITERIA, default="gate Fisher")
    parser.add_argument("--train-epochs", type=int, default=25)
    parser.add_argument("--epochs", type=int, default=25, help="of distillation")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=10.0, help="of timing for each batch size")
    parser.add_argument("--integers", action="store_true", help="8 bits, rounded as they come, in place of the cut")
    stages = parser.add_mutually_exclusive_group()
    stages.add_argument("--time-only", action="store_true", help="time the exported files of an earlier run")
    stages.add_argument("--criteria", action="store_true", help="compare criteria on the validation part")
    stages.add_argument("--bits", action="store_true", help="compare roundings of weights in few bits")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    parts = spoken_digits()
    for net in args.net or NETS:
        stem = f"{net}-{args.seed}" + ("-integers" if args.integers else "")
        figures = args.folder / f"{stem}.json"
        if not args.time_only:
            model = trained(net, parts["train"], args.folder, args.seed, args.train_epochs)
            if args.criteria or args.bits:
                (compare_criteria if args.criteria else compare_roundings)(model, net, parts, args)
                continue
            small, row = (in_integers if args.integers else compress)(model, parts, args)
            row["parity"] = export({"dense": model, "small": small}, args.folder, stem, parts["test"])
            if args.integers:
                by_onnxruntime(args.folder, stem)
                peer = args.folder / f"{stem}-peer.onnx"
                row["accuracy"]["peer"] = accuracies(gc.OnnxRuntime(threads=1).load(peer), parts)
            figures.write_text(json.dumps({"net": net, "seed": args.seed} | row), encoding="utf-8")
        row = json.loads(figures.read_text(encoding="utf-8"))
        print(json.dumps(row | timed(args.folder, stem, parts["test"][0], args.seconds)), flush=True)


if __name__ == "__main__":
    main()
