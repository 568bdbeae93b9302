"""`train.py --plan` next to what torch's own trackers count, for both stages at full size, without a GPU or any memory.

$ python tests/bench/plan.py                     # about three minutes
$ python tests/bench/plan.py --stage pretrain --gpus 8 --recompute selective

Two steps are taken on fake tensors, which have shapes but no content, in a process group that only pretends. What is
alive at the peak of the second one, the first that finds AdamW's moments, is counted by torch's FSDPMemTracker; on one
process by the class below, since MemTracker refuses frozen weights. FSDPMemTracker also refuses a second micro-batch in
a step, so the gradients that the first one would have left are added to its count.

What this cannot see, and the plan's "workspace" stands for: libraries' buffers and the allocator's fragments.
"""
import argparse
import sys
import weakref
from argparse import Namespace
from pathlib import Path
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lib import plan
import train
from lib.recipes import parse, replace
from model import LLaVAConfig, Packed

LENGTH = {"pretrain": 597, "finetune": 848}     # positions of a sample, as in plan.PUBLISHED
SUPERVISED = 256                                # of a sample: 16 samples fill a chunk of logits, as the plan assumes


class PeakMemory(TorchDispatchMode):
    """Bytes of all storages that operations return, while they are alive, and of those named at the start."""

    def __init__(self, tensors):
        super().__init__()
        self.known = set()
        self.bytes = self.peak = 0
        for tensor in tensors:
            self.add(tensor)

    def add(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata in self.known:
            return
        size = storage.nbytes()
        self.known.add(storage._cdata)
        self.bytes += size
        self.peak = max(self.peak, self.bytes)
        weakref.finalize(storage, self.remove, storage._cdata, size)

    def remove(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.bytes -= size

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self.add(tensor)
        return result


def make_batch(config: LLaVAConfig, samples: int, length: int, supervised: int) -> tuple[torch.Tensor, ...]:
    """A packed micro-batch of samples that each begin with a picture and end with what is learned."""
    P, size = config.vision.n_patches, config.vision.image_size
    starts = torch.arange(samples) * length
    slots = (starts[:, None] + torch.arange(P)).flatten()
    rows = (starts[:, None] + length - 1 - torch.arange(supervised)).flatten()
    images = torch.zeros(samples, 3, size, size, dtype=torch.uint8)
    ids = torch.zeros(samples * length, dtype=torch.int64)
    return ids, torch.full((samples,), length), images, slots, rows, torch.zeros_like(rows)


def measure(cfg: Namespace, config: LLaVAConfig, gpus: int, samples: int, length: int,
            supervised: int) -> tuple[float, dict]:
    """-> bytes at the peak of the second step on one of `gpus` processes, and what they are."""
    train.dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=gpus)
    try:
        mesh = train.init_device_mesh("cpu", (gpus,), mesh_dim_names=("shard",))
        model = train.skeleton(cfg, config)
        model.llm.recompute = cfg.recompute
        model.vision.recompute = cfg.recompute != "none"
        train.shard(model, mesh, torch.bfloat16, cfg.gather)
        batch = make_batch(config, samples, length, supervised)
        layout = Packed(batch[1], torch.device("cpu"))      # made of real lengths: the host computes with them
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            model.to_empty(device="cpu").train()
            if gpus == 1:
                train.keep_masters(model, torch.bfloat16)
            optimizer = train.make_optimizer(model, cfg)
            fake = [mode.from_tensor(x) for x in batch]
            for name in ("pos", "cu_seqlens"):
                setattr(layout, name, mode.from_tensor(getattr(layout, name)))
            if gpus > 1:
                tracker = FSDPMemTracker(model, optimizer)
            else:
                tracker = PeakMemory([*model.parameters(), *train.trained_weights(model).values()])
            with tracker, patch("model.Packed", return_value=layout):
                for step in range(2):
                    if gpus > 1:
                        tracker.reset_mod_stats()
                    loss = model(*fake) / 100
                    loss.backward()
                    if gpus == 1:                           # a second micro-batch
                        loss = model(*fake) / 100
                        loss.backward()
                    optimizer.step()
                    train.copy_masters(model)
                    optimizer.zero_grad()
        if gpus == 1:
            return tracker.peak, {}
        kinds = tracker.get_tracker_snapshot("peak")[torch.device("cpu")]
        trained = plan.count(p for p in model.parameters() if p.requires_grad)
        left = 4 * trained if cfg.gather == "on" else 4 * trained / gpus
        return kinds["Total"] + left, kinds
    finally:
        train.dist.destroy_process_group()


def planned(cfg: Namespace, config: LLaVAConfig, gpus: int, tokens: int) -> float:
    """The plan's bytes without its allowance for what trackers cannot see."""
    always, per_token = plan.memory_plan(cfg, train.skeleton(cfg, config), gpus, cfg.gather)
    return sum(always.values()) - always["workspace"] + tokens * per_token[cfg.recompute]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", choices=tuple(LENGTH))
    parser.add_argument("--gpus", type=int)
    parser.add_argument("--recompute", choices=("none", "selective", "full"), default="none")
    parser.add_argument("--gather", choices=("on", "off"), default="off")
    parser.add_argument("--samples", type=int, default=16, help="of a micro-batch")
    args = parser.parse_args()
    config = LLaVAConfig()
    for stage in [args.stage] if args.stage else LENGTH:
        for gpus in [args.gpus] if args.gpus else (1, 8):
            cfg = parse(["--stage", stage])
            tokens = args.samples * LENGTH[stage]
            cfg = replace(cfg, recompute=args.recompute, gather=args.gather, micro_tokens=tokens)
            total, kinds = measure(cfg, config, gpus, args.samples, LENGTH[stage], SUPERVISED)
            plan = planned(cfg, config, gpus, tokens)
            print(f"{stage} on {gpus}, {tokens:,} tokens, recompute {args.recompute}, gather {args.gather}: tracked "
                  f"{total / 1e9:.1f} GB, planned {plan / 1e9:.1f} GB ({100 * (plan / total - 1):+.0f} %)", flush=True)
            if kinds:
                print("    " + ", ".join(f"{kind} {size / 1e9:.1f}" for kind, size in kinds.items() if size > 5e7))


if __name__ == "__main__":
    main()
