"""Train arms of the expand-oscillate-shrink grid on associative recall and print their accuracy."""

import argparse
import json
import math
import time
from typing import Any

import torch
from torch import Tensor

from transnormer import Decoder
from transnormer.data import mqar_examples
from transnormer.data.mqar import Recall
from transnormer.models.zoo import eos_custom
from transnormer.nn.token_mixers import EosConfig

# name -> the fields of EosConfig in which the arm differs from expand, shrink and decay by the data
ARMS: dict[str, dict[str, Any]] = {
    "data": {},
    "constant-expand": {"expand": "constant"},
    "constant-shrink": {"shrink": "constant"},
    "constant-both": {"expand": "constant", "shrink": "constant"},
    "decay-data": {"oscillation": "data"},
    "decay-data-value": {"oscillation": "data_value"},
    "decay-constant": {"oscillation": "constant"},
    "decay-constant-key": {"oscillation": "constant_key"},
    "decay-constant-value": {"oscillation": "constant_value"},
    "decay-key-key": {"oscillation": "constant_key_data_key"},
    "decay-key-value": {"oscillation": "constant_key_data_value"},
    "decay-value-key": {"oscillation": "constant_value_data_key"},
    "decay-value-value": {"oscillation": "constant_value_data_value"},
    "slopes": {"oscillation": "slopes"},
    "ones": {"oscillation": "ones"},
    "phase": {"oscillation": "phase"},
    "additive": {"oscillation": "additive"},
    "ssm": {"oscillation": "ssm"},
}


def build(arm: str, args: argparse.Namespace) -> Decoder:
    """The two-layer model of an arm, its weights drawn from the seed."""
    fields = {"activation": args.activation, "temperature": args.tau} | ARMS[arm]
    if arm == "additive":
        fields["activation"] = "none"
    mixer = EosConfig(key_dim=args.key_dim, heads=args.heads, **fields)
    config = eos_custom(
        vocab_size=args.vocab,
        model_dim=args.dim,
        num_layers=2,
        mixer=mixer,
        max_positions=args.seq if args.positions else 0,
    )
    torch.manual_seed(args.seed)
    return Decoder(config).to(args.device)


@torch.no_grad()
def accuracy(model: Decoder, data: Recall, batch: int) -> float:
    """Share of the labelled places whose value the model puts first."""
    model.eval()
    right = total = 0
    for ids, labels in zip(data.input_ids.split(batch), data.labels.split(batch)):
        asked = labels >= 0
        right += int((model(ids).logits.argmax(-1)[asked] == labels[asked]).sum())
        total += int(asked.sum())
    model.train()
    return right / total


def rate(step: int, steps: int, highest: float) -> float:
    """Up over the first tenth, then down a cosine."""
    warm = max(steps // 10, 1)
    if step < warm:
        return highest * (step + 1) / warm
    return highest * 0.5 * (1.0 + math.cos(math.pi * (step - warm) / max(steps - warm, 1)))


def order(examples: int, batch: int, epoch: int, seed: int) -> list[Tensor]:
    """Batches of one epoch as indices."""
    generator = torch.Generator().manual_seed(1_000_003 * seed + epoch)
    return list(torch.randperm(examples, generator=generator).split(batch))


def train(arm: str, lr: float, train_on: Recall, test_on: Recall, args: argparse.Namespace) -> dict:
    """Train one arm at one learning rate; stops early where the task is solved."""
    model, begin = build(arm, args), time.perf_counter()
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.1)
    per_epoch = -(-args.train_examples // args.batch)
    steps, step, best = args.epochs * per_epoch, 0, 0.0
    for epoch in range(args.epochs):
        for index in order(args.train_examples, args.batch, epoch, args.seed):
            for group in optimizer.param_groups:
                group["lr"] = rate(step, steps, lr)
            loss = model.loss(train_on.input_ids[index], train_on.labels[index])
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            step += 1
        best = max(best, accuracy(model, test_on, args.batch))
        if args.verbose:
            print(f"  {arm} lr {lr:g} epoch {epoch + 1} loss {loss.item():.3f} best {best:.3f}")
        if best >= 0.99:
            break
    seconds = time.perf_counter() - begin
    return {"arm": arm, "lr": lr, "accuracy": best, "steps": step, "seconds": round(seconds, 1)}


def arguments() -> argparse.Namespace:
    """The command line; the defaults are a published setting."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS))
    parser.add_argument("--lr", nargs="+", type=float, default=[1e-3])
    parser.add_argument("--seq", type=int, default=64)
    parser.add_argument("--pairs", type=int, default=4)
    parser.add_argument("--vocab", type=int, default=8192)
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--heads", type=int, default=1)
    parser.add_argument("--key-dim", type=int, default=64)
    parser.add_argument("--tau", type=float, default=16.0)
    parser.add_argument("--activation", default="none")
    parser.add_argument("--positions", action="store_true", help="learned absolute positions")
    parser.add_argument("--train-examples", type=int, default=100_000)
    parser.add_argument("--test-examples", type=int, default=3_000)
    parser.add_argument("--epochs", type=int, default=64)
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--verbose", action="store_true", help="a line an epoch")
    return parser.parse_args()


def main() -> None:
    """Train every arm at every learning rate; the last line is JSON."""
    args = arguments()
    task = {"seq": args.seq, "num_pairs": args.pairs, "vocab_size": args.vocab}
    sets = (
        mqar_examples(args.train_examples, seed=2 * args.seed + 1, **task),
        mqar_examples(args.test_examples, seed=2 * args.seed + 2, **task),
    )
    train_on, test_on = (Recall(*(x.to(args.device) for x in data)) for data in sets)
    results = []
    print(f"{'arm':22}{'lr':>9}{'accuracy':>10}{'steps':>8}{'seconds':>9}")
    for arm in args.arms:
        for lr in args.lr:
            row = train(arm, lr, train_on, test_on, args)
            results.append(row)
            print(
                f"{arm:22}{lr:9g}{row['accuracy']:10.3f}{row['steps']:8}{row['seconds']:9}",
                flush=True,
            )
    chance = {"any value": 2.0 / args.vocab, "values without keys": 1.0 / args.pairs}
    print(json.dumps({"task": task, "chance": chance, "torch": torch.__version__, "rows": results}))


if __name__ == "__main__":
    main()
