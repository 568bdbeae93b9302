"""train.py on eight GPUs that are not there: FSDP2 on device type "cuda", with any build of torch, in seconds.

$ python tests/fake_fsdp.py --tiny                                  # every combination of flags, ranks 0 and 7 of 8
$ python tests/fake_fsdp.py --tiny --nodes 2                        # as two nodes of four: hybrid sharding
$ python tests/fake_fsdp.py --tiny --world 1                        # one process, which takes the same path
$ python tests/fake_fsdp.py --only "--stage finetune --lora-r 64"   # at full size: minutes, and no memory

It calls train.py's own setup, build, make_optimizer, train_step (three times), save_checkpoint, load_checkpoint,
validate and save_final, with torch's "fake" process group. CUDA tensors are fake: they have shapes, dtypes, devices
and strides, but no content. CPU tensors are real. A step has three micro-batches: pictures, text alone, and no sample
at all; odd ranks take them in the opposite order, and rank 7 has less memory than rank 0.

What it shows, for each rank:
- no operator mixes devices, also after FSDP's hooks have moved a module's arguments as they do on CUDA;
- the host waits for the GPU once a step;
- matrix products and attention are computed in bf16, and ragged attention is chosen;
- every trained weight is fp32 on the GPU and gets an fp32 gradient there;
- a checkpoint has each of them and its two moments, and a run goes on from it as it would have without;
- all ranks call the same collectives with the same shapes in the same order, without which NCCL hangs;
- the allocator's peak, to be compared with the plan's.

What it cannot show: any number; that a kernel takes these shapes (attention is replaced by its shape function); NCCL;
fragments, workspaces and the CUDA context; reading weights and data; --compile, since Dynamo traces on fake tensors of
its own, for which the question below has no answer (test_cuda.py traces the blocks). Streams are stubs that never
wait, so a missing wait would go unseen; therefore it fails if the project makes a stream of its own.

How a backward pass works without a driver: autograd asks each tensor's device in C++ and then wants CUDA's streams.
FakeGPU answers that question (prim.device) with a backend written in Python, whose streams do nothing, while Python
code sees "cuda".
"""
import argparse
import contextlib
import os
import sys
import time
import traceback
import types
import weakref
from collections import Counter, defaultdict
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch
import torch.distributed as dist
import torch.distributed._tools.fake_collectives  # teaches fake tensors the shapes of c10d's operators
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.distributed.tensor.debug import _clear_sharding_prop_cache
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils import backend_registration
from torch.utils._pytree import tree_iter

import lib.checkpoint
import lib.health
import lib.plan
import train
from data import IGNORE, IMAGE_ID, Batch, Sample, Step, collate
from lib.recipes import replace
from model import LLaVAConfig, PhiConfig
from vision import VisionConfig

MEMORY = {0: 85e9, 7: 75e9}             # bytes of a rank's GPU; the others have as much as rank 0
BACKEND = "nogpu"                       # what C++ takes a CUDA tensor for
TINY = LLaVAConfig(PhiConfig(vocab_size=512, n_layer=2, n_head=2, n_embd=128, n_inner=256, rotary_dim=32),
                   VisionConfig(image_size=28, n_layer=3, n_head=2, n_embd=64, n_inner=128))
PRODUCTS = ("addmm", "mm", "bmm", "convolution", "_varlen_attn", "_scaled_dot_product_flash_attention",
            "_scaled_dot_product_efficient_attention")
CASES = [f"--stage {stage} --gather {gather} --recompute {recompute}" for stage in ("pretrain", "finetune")
         for gather in ("off", "on") for recompute in ("none", "selective", "full")]
CASES += [
    "--stage sft",
    "--stage finetune --lora-r 64",
    "--stage finetune --lora-r 64 --base-bits 4 --recompute full",
    "--stage finetune --dtype fp32 --gather off --recompute none",
    "--stage finetune --freeze vision",
    "--stage finetune",                 # recomputation and gathering chosen by the memory of all ranks
]

# ---------------------------------------------------------------------------------------------------
# What is seen


def project_place(frame: types.FrameType | None) -> str:
    """The innermost line of train.py and what it stands on from which `frame` was called."""
    while frame and not is_project(frame):
        frame = frame.f_back
    return f"{Path(frame.f_code.co_filename).relative_to(ROOT)}:{frame.f_lineno}" if frame else "?"


def is_project(frame: types.FrameType) -> bool:
    path = Path(frame.f_code.co_filename)
    return ROOT in path.parents and ".venv" not in path.parts and path != Path(__file__).resolve()


class Notes:
    """What one rank did, by kind and place, its collectives in order, and the bytes of all storages that are alive."""

    def __init__(self):
        self.sizes: dict[int, int] = {}             # storage -> bytes
        self.saved: dict[str, tuple] = {}           # name in the checkpoint -> shape, dtype, device
        self.allocated = 0
        self.reset()

    def reset(self) -> None:
        self.seen: dict[str, Counter] = defaultdict(Counter)
        self.collectives: list[tuple] = []
        self.peak = self.allocated
        self.peak_at = ""

    def add(self, kind: str, what: str) -> None:
        self.seen[kind][f"{what} at {project_place(sys._getframe(1))}"] += 1

    def allocate(self, storage: torch.UntypedStorage, size: int) -> None:
        """A new storage, or one that has another size now."""
        key = storage._cdata
        if key not in self.sizes:
            weakref.finalize(storage, self.free, key)
        self.allocated += size - self.sizes.get(key, 0)
        self.sizes[key] = size
        if self.allocated > self.peak:
            self.peak = self.allocated
            self.peak_at = project_place(sys._getframe(1))

    def free(self, key: int) -> None:
        self.allocated -= self.sizes.pop(key, 0)


class Machine:
    """The rank that is being played."""
    rank = local_rank = 0
    world = 8
    local_world = 8
    notes = Notes()

    @classmethod
    def memory(cls) -> float:
        return MEMORY.get(cls.rank, MEMORY[0])


class FakeGPU(FakeTensorMode):
    """Computes shapes for CUDA tensors, values for CPU tensors, and notes what a GPU would object to."""
    avoid_device_init = True            # torch.tensor(..., device="cuda") is made on the host, then sent

    def __init__(self, device: torch.device):
        super().__init__(allow_non_fake_inputs=True)
        self.gpu = device
        self.depth = 0                  # above 0 inside of an operator that is made of others

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func is torch.ops.prim.device.default:               # asked by C++: see the top of the file
            tensor = args[0]
            device = torch.device("meta") if tensor.fake_mode.in_kernel_invocation else tensor.fake_device
            return torch.device(BACKEND, 0) if device.type == "cuda" else device
        if kwargs.get("device") is not None and kwargs["device"].type == BACKEND:
            kwargs["device"] = self.gpu                         # a backward formula made a tensor "like this one"

        tensors = [x for x in tree_iter((args, kwargs)) if isinstance(x, torch.Tensor)]
        is_plain = all(type(x) in (torch.Tensor, torch.nn.Parameter, FakeTensor) for x in tensors)
        fakes = [x for x in tensors if isinstance(x, FakeTensor)]
        makes_cuda = kwargs.get("device") is not None and kwargs["device"].type == "cuda"
        if is_plain and not fakes and not makes_cuda:
            return func(*args, **kwargs)                        # the host's own work is done for real
        if self.depth or not is_plain:                          # a part of another operator, or a DTensor
            return super().__torch_dispatch__(func, types, args, kwargs)

        self.note(func, args, kwargs, tensors, fakes)
        if func._opname == "_local_scalar_dense":               # the host asks for a value that nobody computed
            return 1.0 if args[0].is_floating_point() else 0
        if func._opname == "_to_copy" and not fakes:            # to the GPU; super() would look for one
            dtype = kwargs.get("dtype") or args[0].dtype
            func, args, kwargs = torch.ops.aten.empty.memory_format, (list(args[0].shape),), {"dtype": dtype}
            kwargs["device"] = self.gpu
        self.depth += 1
        try:
            out = super().__torch_dispatch__(func, types, args, kwargs)
        finally:
            self.depth -= 1
        for x in tree_iter(out):
            if isinstance(x, FakeTensor) and x.fake_device.type == "cuda":
                Machine.notes.allocate(x.untyped_storage(), x.untyped_storage().nbytes())
        return out

    def note(self, func, args: tuple, kwargs: dict, tensors: list[torch.Tensor], fakes: list[FakeTensor]) -> None:
        """What matters about one operator on the GPU."""
        notes, name = Machine.notes, func._opname
        on_host = [x for x in tensors if x.device.type == "cpu"]
        to_host = name == "_to_copy" and kwargs.get("device") == torch.device("cpu")
        to_host = to_host or name == "copy_" and args[0].device.type == "cpu"
        if name in ("_to_copy", "copy_"):
            if to_host:
                notes.add("waits", name)
            elif on_host and not getattr(on_host[-1], "pinned", False):
                notes.add("copies from memory that is not pinned", f"{tuple(on_host[-1].shape)} {on_host[-1].dtype}")
        elif on_host:
            notes.add("wrong", f"{name} takes {tuple(on_host[0].shape)} from the CPU")
        if name == "index":                                     # by numbers, the host knows the result's shape
            needs_value = any(x.dtype == torch.bool for x in tensors[1:])
        else:
            needs_value = torch.Tag.dynamic_output_shape in func.tags
        if needs_value or name in ("_local_scalar_dense", "equal", "is_nonzero"):
            notes.add("waits", name)
        if func.namespace in ("c10d", "_c10d_functional") and name != "wait_tensor":
            notes.collectives.append((name, [(tuple(x.shape), x.dtype) for x in fakes]))
        if name in PRODUCTS:
            notes.seen["products"][f"{name} {str(fakes[0].dtype)[6:]}"] += 1
            if fakes[0].dtype == torch.float32:
                notes.add("fp32", name)

# ---------------------------------------------------------------------------------------------------
# What is put in the place of a driver


class Stream:
    """A stream and an event in one. Nothing runs, so nothing has to wait; whatever is asked of it returns it."""

    def __init__(self, *args, **kwargs):
        if is_project(sys._getframe(1)):
            Machine.notes.add("wrong", "a stream of the project's own, which nothing here follows,")

    def __getattr__(self, name: str):
        return lambda *args, **kwargs: self

    def synchronize(self) -> None:
        Machine.notes.add("waits", "synchronize")


def tolist(self: FakeTensor) -> list:
    Machine.notes.add("waits", "tolist")
    return torch.ones(self.shape, dtype=self.dtype, device="cpu").tolist()


def pin_memory(self: torch.Tensor, *args) -> torch.Tensor:
    copy = self.clone()
    copy.pinned = True
    return copy


def attention(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, **kwargs) -> torch.Tensor:
    """scaled_dot_product_attention with the kernel that CUDA would take."""
    if q.dtype == torch.float32:
        return torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, None, True, dropout_p, is_causal)[0]
    return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, dropout_p, is_causal)[0]


def pretend_there_are_gpus() -> None:
    """Replace whatever would ask a driver, and the process group."""
    backend_registration._setup_privateuseone_for_python_backend(BACKEND)

    def properties(device=None):
        return types.SimpleNamespace(total_memory=Machine.memory(), name="NVIDIA H100 80GB HBM3", major=9, minor=0)

    def nothing(*args, **kwargs):
        return None

    torch.cuda.is_available = torch.cuda.is_initialized = lambda: True
    torch.cuda.is_bf16_supported = lambda *args, **kwargs: True
    torch.cuda.device_count = lambda: Machine.local_world
    torch.cuda.current_device = lambda: Machine.local_rank
    torch.cuda.get_device_properties = properties
    torch.cuda.get_device_name = lambda device=None: properties().name
    torch.cuda.get_device_capability = lambda device=None: (9, 0)
    torch.cuda.mem_get_info = lambda device=None: (Machine.memory(), Machine.memory())
    torch.cuda._lazy_init = torch.cuda.set_device = torch.cuda.manual_seed = torch.cuda.manual_seed_all = nothing
    torch.cuda.synchronize = lambda device=None: Machine.notes.add("waits", "synchronize")
    torch.cuda.Stream = torch.cuda.Event = Stream
    torch.cuda.current_stream = lambda device=None: Stream()
    torch.cuda.stream = lambda stream: contextlib.nullcontext()
    torch.cuda.is_current_stream_capturing = lambda: False
    torch._subclasses.fake_tensor.init_gpu_context = nothing        # torch 2.11 asks for a context here

    real_to, real_resize = torch.Tensor.to, torch.UntypedStorage.resize_

    def to(self, *args, **kwargs):
        """"cuda" without a number would ask the driver which one is current."""
        args = [torch.device("cuda", Machine.local_rank) if str(x) == "cuda" else x for x in args]
        return real_to(self, *args, **kwargs)

    def resize_(self, size: int) -> None:
        """How FSDP frees gathered weights."""
        real_resize(self, size)
        if self._cdata in Machine.notes.sizes:
            Machine.notes.allocate(self, size)

    torch.Tensor.to = to
    torch.Tensor.pin_memory = pin_memory
    torch.Tensor.record_stream = nothing
    torch.UntypedStorage.resize_ = resize_
    FakeTensor.is_cuda = property(lambda self: self.fake_device.type == "cuda")
    FakeTensor.tolist = tolist
    F.scaled_dot_product_attention = attention
    pretend_there_are_processes()


def pretend_there_are_processes() -> None:
    """Torch's fake group sends nothing. What train.py exchanges between the hosts is answered here."""
    join = dist.init_process_group

    def init_process_group(*args, **kwargs) -> None:
        join("fake", store=FakeStore(), rank=Machine.rank, world_size=Machine.world)

    def on_every_process(work) -> list:
        mine, results = Machine.rank, []
        for Machine.rank in range(Machine.world):
            results.append(work())
        Machine.rank = mine
        return results

    dist.init_process_group = init_process_group
    train.on_every_process = lib.health.on_every_process = on_every_process

# ---------------------------------------------------------------------------------------------------
# One rank, from its set-up to the saved model


def make_micro_batches(config: LLaVAConfig, pictures: bool, tokens: int) -> list[Batch]:
    """One of pictures with text, one of text alone, and one without a sample, as the loader would pin them."""
    P, size = config.vision.n_patches, config.vision.image_size
    words = list(range(1, 65 if tokens < 1000 else 449))
    labels = [IGNORE] * 8 + words[8:]
    text = Sample("text", words, labels, None)
    picture = Sample("picture", [1] + [IMAGE_ID] * P + words, [IGNORE] * (P + 1) + labels,
                     torch.zeros(3, size, size, dtype=torch.uint8))
    groups = [[text] * max(1, tokens // len(words)), []]
    if pictures:
        groups.insert(0, [picture] * max(1, tokens // (P + 1 + len(words))))
    return [Batch(*[pin_memory(x) for x in collate(samples, size)[:6]]) for samples in groups]


def play_rank(flags: list[str], tiny: bool, rank: int, world: int, nodes: int) -> types.SimpleNamespace:
    """Build and shard, two steps, a checkpoint and back, a validation, the saved model -> what the second step did."""
    Machine.rank, Machine.world, Machine.local_world = rank, world, world // nodes
    Machine.local_rank = rank % Machine.local_world
    notes = Machine.notes = Notes()
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(Machine.local_rank), LOCAL_WORLD_SIZE=str(Machine.local_world))
    cfg = train.parse(flags)
    config = TINY if tiny else LLaVAConfig()
    mesh, device = train.setup()
    try:
        with FakeGPU(device), torch.autograd.set_multithreading_enabled(False):
            model = train.build(cfg, config, None, mesh, device)
            optimizer = train.make_optimizer(model, cfg)
            watch_update(model, optimizer)
            batches = make_micro_batches(config, cfg.stage != "sft", 128 if tiny else cfg.micro_tokens)
            if rank % 2:
                batches.reverse()
            n_supervised = sum(len(batch.targets) for batch in batches)

            notes.reset()
            step = Step(0, list(range(world)), batches)
            train.train_step(model, optimizer, step, cfg, n_supervised, 1.0, device)
            first = notes.collectives                           # from here on AdamW has its moments
            notes.reset()
            step = Step(1, list(range(world)), batches[::-1])
            train.train_step(model, optimizer, step, cfg, n_supervised, 1.0, device)
            seen, peak, peak_at, second = dict(notes.seen), notes.peak, notes.peak_at, notes.collectives

            notes.reset()
            train.validate(model, [Step(0, [], batches)], device)   # after it, a checkpoint must still find its weights
            state = lib.checkpoint.TrainState({"out": "out", "keep": 1}, [], model, optimizer, step=2, updates=2)
            lib.checkpoint.save_checkpoint(state)
            manifest = {"step": 2, "updates": 2}
            lib.checkpoint.load_checkpoint(lib.checkpoint.Checkpoint(Path("out/step_000002"), manifest), state)
            notes.reset()
            train.train_step(model, optimizer, step._replace(step=2), cfg, n_supervised, 1.0, device)
            third = notes.collectives
            notes.reset()
            train.validate(model, [Step(0, [], batches)], device)
            if cfg.base_bits == 16:                             # what lies under 4 bits would come from the folders
                train.save_final(cfg, None, model, Path(cfg.out))
        planned = max(plan_for(batch, cfg, model, mesh.size(-1)) for batch in batches)
        print(f"  rank {rank}: gather {model.gather}, recompute {model.llm.recompute}; peak {peak / 1e9:.2f} GB at "
              f"{peak_at}, planned without workspace {planned / 1e9:.2f} GB ({planned / peak:.3f})", file=sys.stderr)
        return types.SimpleNamespace(cfg=cfg, seen=seen, saved=notes.saved,
                                     collectives=[first, second, third, notes.collectives])
    finally:
        dist.destroy_process_group()
        _clear_sharding_prop_cache()                            # its entries name the process group that has just gone


def plan_for(batch: Batch, cfg: argparse.Namespace, model: torch.nn.Module, shards: int) -> float:
    """The bytes that --plan counts on for this micro-batch, without what a tracker cannot see."""
    cfg = replace(cfg, micro_tokens=len(batch.ids))
    plan = lib.plan.memory_plan(cfg, model, shards, model.llm.recompute, model.gather, pictures=len(batch.images))
    return sum(plan.values()) - plan["workspace"]


def watch_update(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Note before each update what the trained weights and their gradients are."""
    update = optimizer.step

    def look_then_update() -> None:
        for p in model.parameters():
            if not p.requires_grad:
                continue
            kinds = []
            for x in (p, p.grad):
                local = x.to_local() if hasattr(x, "to_local") else x
                kinds.append("none" if x is None else f"{str(local.dtype)[6:]} {local.device.type}")
            Machine.notes.seen["weights and gradients"][" and ".join(kinds)] += 1
        update()
    optimizer.step = look_then_update


def note_saved(tensors: dict[str, torch.Tensor], **kwargs) -> None:
    for name, tensor in tensors.items():
        Machine.notes.saved[name] = tuple(tensor.shape), tensor.dtype, tensor.to_local().device.type


def find_problems(ranks: list[types.SimpleNamespace]) -> list[str]:
    found = []
    for r in ranks:
        waits = r.seen.get("waits", {})
        if sum(waits.values()) != 1:
            found.append(f"the host waits {sum(waits.values())} times in a step: {dict(waits)}")
        for place in r.seen.get("wrong", {}):
            found.append(place)
        if set(r.seen["weights and gradients"]) != {"float32 cuda and float32 cuda"}:
            found.append(f"weights and gradients: {dict(r.seen['weights and gradients'])}")
        if r.cfg.dtype == "bf16":
            for place in r.seen.get("fp32", {}):
                found.append(f"computed in fp32: {place}")
            if "_varlen_attn bfloat16" not in r.seen["products"]:
                found.append(f"ragged attention is not chosen: {dict(r.seen['products'])}")
        trained = [name.removeprefix("model.") for name in r.saved if name.startswith("model.")]
        expected = {f"{kind}.{name}" for kind in ("model", "exp_avg", "exp_avg_sq") for name in trained}
        kinds = {(dtype, device) for _, dtype, device in r.saved.values()}
        if set(r.saved) != expected or not trained or kinds != {(torch.float32, "cuda")} or r.saved != ranks[0].saved:
            found.append(f"the checkpoint has {len(r.saved)} tensors of {len(trained)} weights, {kinds}")
        if r.collectives[1] != r.collectives[2]:
            found.append("the step after a checkpoint calls other collectives than the one before it")
    for k, part in enumerate(("first step", "second step", "step after a checkpoint", "validation and saving")):
        if any(r.collectives[k] != ranks[0].collectives[k] for r in ranks):
            found.append(f"ranks call different collectives in the {part}: this hangs")
    return found


def check(flags: str, tiny: bool, ranks: list[int], world: int, nodes: int, details: bool) -> list[str]:
    """What is wrong with this combination of flags; nothing if all is well."""
    argv = [*flags.split(), "--workers", "0"]
    try:
        with contextlib.redirect_stdout(open(os.devnull, "w")):
            played = [play_rank(argv, tiny, rank, world, nodes) for rank in ranks]
    except Exception as e:
        if details:
            traceback.print_exc()
        *_, last = [frame for frame, _ in traceback.walk_tb(e.__traceback__) if is_project(frame)]
        return [f"{project_place(last)}: {type(e).__name__}: {str(e)[:300]}"]
    if details:
        print({kind: dict(counts) for kind, counts in played[0].seen.items()})
    return find_problems(played)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--tiny", action="store_true", help="two layers, narrow")
    add("--only", nargs="+", default=[""], help="combinations that contain this; a new one if none does")
    add("--world", type=int, default=8, help="processes")
    add("--nodes", type=int, default=1)
    add("--ranks", type=int, nargs="+", help="those that are played; none: the first and the last")
    add("--details", action="store_true", help="say what the second step did, and print tracebacks")
    args = parser.parse_args()
    ranks = args.ranks or sorted({0, args.world - 1})
    pretend_there_are_gpus()
    train.read_weights = lambda *args: None                     # there are no folders
    train.on_process_0 = lib.checkpoint.on_process_0 = lambda write: None       # nothing is written
    lib.checkpoint.on_every_process = lambda work: []
    lib.checkpoint.patient_group = lambda: None                                 # the group of all processes
    lib.checkpoint.dcp.save = note_saved
    lib.checkpoint.dcp.load = lambda *args, **kwargs: None
    began = time.perf_counter()
    failed = 0
    cases = []
    for words in args.only:
        cases += [case for case in CASES if words in case] or [words]
    for flags in cases:
        found = check(flags, args.tiny, ranks, args.world, args.nodes, args.details)
        failed += bool(found)
        print("FAILED" if found else "passed", flags, *[f"\n    {problem}" for problem in found], flush=True)
    print(f"{failed} failed, {time.perf_counter() - began:.0f} s, torch {torch.__version__}")
    return failed


if __name__ == "__main__":
    exit_code = main()
    sys.stdout.flush()
    os._exit(exit_code)                 # the fake backend does not survive Python's tearing down
