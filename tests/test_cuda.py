"""What only a GPU can show, in under two minutes on one. Without one, the same bodies run on the CPU.

A CPU cannot capture a graph, wait for a device or run out of its memory, and its attention is the loop. But it can run
every other line of these tests, so that what fails on a GPU is the GPU's part and not a slip of the test. Those dry
runs are the tests whose name ends in [cpu].

Tolerances. fp32 differs from the CPU's by the order of sums: 1e-5 of a value, 1e-4 of a gradient's norm, which went
through twice as many. bf16 keeps 8 bits, so each rounding is off by up to 0.4 %; through two blocks and back that gives
some per cent of a gradient, and less of a loss, which is a mean over many tokens.
"""
import copy
import json
import random
import warnings
from argparse import Namespace
from functools import partial

import pytest
import torch
from helpers import (GOLDEN, draw_prompt, draw_samples, draw_words, expanded, fast_answers, metrics, random_model,
                     to_uint8, train_flags)
from safetensors.torch import load_file
from test_varlen import HS, LENGTHS, NH, WIDE
from torch import Tensor
from training import train_here

import train
from data import IGNORE, IMAGE_ID, Sample, Step, collate
from lib import plan
from lib.generate import Session
from lib.processes import explain
from lib.quant import quantize_linears
from lib.recipes import parse
from load_weights import load_model
from model import LLaVAConfig, LLaVAPhi, Packed, PhiConfig
from vision import VisionConfig

EOS = 0


@pytest.fixture(params=["cuda", "cpu"])
def device(request) -> torch.device:
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA GPU here")
    return torch.device(request.param)


@pytest.fixture(params=["fp32", "bf16"])
def dtype(request, device) -> torch.dtype:
    if request.param == "bf16" and device.type == "cuda" and not torch.cuda.is_bf16_supported():
        pytest.skip("this GPU has no bf16")
    return torch.float32 if request.param == "fp32" else torch.bfloat16


@pytest.fixture
def group(device):
    """A process group of one with its mesh, on the device: NCCL on a GPU, gloo on a CPU."""
    if device.type == "cpu" and torch.cuda.is_available():
        pytest.skip("there is a GPU, and train.setup takes it")
    mesh, chosen = train.setup()
    assert chosen.type == device.type
    yield mesh
    train.dist.destroy_process_group()


@pytest.fixture(scope="module")
def wide() -> LLaVAPhi:
    """Heads of 80 channels, two layers, weights that give answers which vary and end."""
    return random_model(LONG, 8)


# As test_varlen's model, with room for prompts that cross the 256 positions which a captured graph reads.
LONG = LLaVAConfig(
    llm=PhiConfig(vocab_size=97, block_size=640, n_layer=2, n_head=NH, n_embd=NH * HS, n_inner=96, dropout=0.0),
    vision=WIDE.vision,
)


def relative(a: Tensor, b: Tensor) -> float:
    """How far a is from b, as a share of b's norm."""
    a = a.detach().float().cpu()
    b = b.detach().float().cpu()
    return float((a - b).norm() / b.norm().clamp_min(1e-12))


# ---------------------------------------------------------------------------------------------------
# The same numbers as on the CPU


def loss_and_gradients(model: LLaVAPhi, batch, device: torch.device) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    loss = model(*train.to_device(batch, device)) / len(batch.targets)
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters()}


def test_loss_and_gradients_equal_the_cpus_in_fp32(wide, device, dtype):
    batch = collate(draw_samples(), 28)
    exact = copy.deepcopy(wide).requires_grad_()
    loss, gradients = loss_and_gradients(exact, batch, torch.device("cpu"))
    model = copy.deepcopy(wide).requires_grad_().to(device, dtype)
    got_loss, got = loss_and_gradients(model, batch, device)
    loss_bound, bound = (1e-5, 1e-4) if dtype == torch.float32 else (0.02, 0.15)
    assert relative(got_loss, loss) < loss_bound
    whole = torch.cat([g.flatten() for g in gradients.values()])
    got_whole = torch.cat([got[name].float().flatten() for name in gradients])
    assert relative(got_whole, whole) < bound
    for name, expected in gradients.items():
        if expected.norm() > 1e-3 * whole.norm():           # the keys' bias has no gradient but rounding
            assert relative(got[name], expected) < 2 * bound, name


def test_a_batch_without_pictures_or_without_anything_has_every_gradient(wide, device, dtype):
    """What a process does that got no picture, or no sample: its tower and its attention compute nothing."""
    model = copy.deepcopy(wide).requires_grad_().to(device, dtype)
    for few in ([s for s in draw_samples() if s.image is None], []):
        _, gradients = loss_and_gradients(model, collate(few, 28) if few else collate([], 28), device)
        assert not [name for name, g in gradients.items() if g is None]


@pytest.mark.parametrize("name", LENGTHS)
def test_varlen_attention_equals_the_loop(name, device, monkeypatch):
    """On a GPU the kernel against the loop, both in bf16. bf16 rounds each value by up to 2^-9, and sums of them."""
    if device.type == "cuda" and torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("flash attention needs an Ampere GPU or a later one")
    lengths = LENGTHS[name]
    g = torch.Generator().manual_seed(0)
    packed = torch.randn(sum(lengths), 3, NH, HS, generator=g).to(device, torch.bfloat16).requires_grad_()
    seqs = Packed(lengths, device)
    assert seqs.has_varlen(packed[:, 0]) == (device.type == "cuda")
    direction = torch.randn(sum(lengths), NH, HS, generator=g).to(device, torch.bfloat16)

    def run() -> list[Tensor]:
        out = seqs.attend(*packed.unbind(1), layer=0)
        return [out.detach(), torch.autograd.grad(out, packed, direction)[0]]
    kernel = run()
    monkeypatch.setattr(Packed, "has_varlen", lambda self, q: False)
    for a, b in zip(kernel, run()):
        assert relative(a, b) < 0.02


@pytest.mark.parametrize("which", ["one", "two"])
def test_greedy_text_of_the_goldens(which, device):
    golden = load_file(GOLDEN / "forward.safetensors")
    # Its heads have 20 channels, so this is the loop on a GPU, too, and decoding with a graph.
    model = load_model(GOLDEN / "tiny-llava-phi", torch.float32, device)
    prompt = expanded(json.loads((GOLDEN / "text.json").read_text())["prompts"][which]["input_ids_tiny"])
    images = to_uint8(golden["llava.pixel_values"])
    for captured in (False, True):
        said = fast_answers(Session(model, captured), [prompt], [images], 24)
        assert said == [golden[f"generate.{which}"].tolist()]

# ---------------------------------------------------------------------------------------------------
# Answers


def ragged(rng: random.Random) -> tuple[list, list]:
    """16 prompts with no, one or two pictures; twelve of them are questions about one picture, which share a prefix."""
    head, images = draw_prompt(rng, 1)
    batch = [draw_prompt(rng, n) for n in (0, 1, 2, 1)] + [(head + draw_words(rng, n), images) for n in range(1, 13)]
    return [prompt for prompt, _ in batch], [pictures for _, pictures in batch]


def test_batch_1_and_batch_16_give_the_same_answers_in_fp32(wide, device):
    """...and so does a prompt whose beginning is remembered from the one before it."""
    model = copy.deepcopy(wide).to(device)
    prompts, pictures = ragged(random.Random(0))
    together = fast_answers(model, prompts, pictures, 12)
    alone = [fast_answers(model, [prompt], [images], 12)[0] for prompt, images in zip(prompts, pictures)]
    assert together == alone
    # In one session each prompt finds what the one before it has computed.
    session = Session(model)
    remembered = [fast_answers(session, [prompt], [images], 12)[0] for prompt, images in zip(prompts, pictures)]
    assert remembered == alone
    assert len({tuple(answer) for answer in alone}) > 6


@pytest.mark.parametrize("first", [250, 506])
def test_captured_decoding_equals_eager_across_a_bucket(wide, device, dtype, first):
    """The graph is recorded anew where another 256 positions are read. Some rows end before, some after that."""
    model = copy.deepcopy(wide).to(device, dtype)
    with torch.no_grad():
        model.llm.lm_head.bias[EOS] = 2
    rng = random.Random(first)
    prompts = [draw_words(rng, first - 3 * i) for i in range(8)]
    nothing = torch.zeros(0, 3, 28, 28, dtype=torch.uint8)
    eager = fast_answers(model, prompts, [nothing] * 8, 60)
    captured = fast_answers(Session(model, cuda_graph=True), prompts, [nothing] * 8, 60)
    assert captured == eager
    ends = [len(prompt) + len(answer) for prompt, answer in zip(prompts, eager)]
    bucket = 256 * (1 + first // 256)
    assert min(ends) < bucket < max(ends), f"answers end at {ends}, not on both sides of {bucket}"


def test_sampling_is_repeatable(wide, device):
    model = copy.deepcopy(wide).to(device)
    prompts, pictures = ragged(random.Random(1))

    def draw(seed: int, captured: bool) -> list:
        generator = torch.Generator(device).manual_seed(seed)
        return fast_answers(Session(model, captured), prompts, pictures, 8, temperature=1.5, generator=generator)
    assert draw(0, False) == draw(0, True) != draw(1, False)


@pytest.mark.parametrize("bits, bound", [(8, 0.09), (4, 0.4)])
def test_quantized_weights_are_close_to_fp32_and_to_the_cpus(wide, device, dtype, bits, bound):
    """8 bits: weight-only on a GPU, weights and activations on a CPU. 4 bits: the same weights in another layout.

    So narrow a model averages little of the rounding out.
    """
    if bits == 4 and device.type == "cuda" and torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("4 bits need an Ampere GPU or a later one")
    prompts, pictures = ragged(random.Random(2))

    def logits(model: LLaVAPhi) -> Tensor:
        with torch.inference_mode():
            return Session(model).prefill(prompts, pictures, 64)

    def quantized(device: torch.device) -> LLaVAPhi:
        model = copy.deepcopy(wide).to(device, dtype)
        quantize_linears(model, bits)
        return model
    got = logits(quantized(device))
    assert relative(got, logits(wide)) < bound
    assert relative(got, logits(quantized(torch.device("cpu")))) < 0.09


# ---------------------------------------------------------------------------------------------------
# Training


def settings(*flags: str) -> Namespace:
    # The bias of the keys has no gradient but rounding, which AdamW would blow up to full steps with its usual eps.
    return parse(["--stage", "finetune", "--lr", "1e-3", "--eps", "1e-3", "--no-compile", *flags])


def pinned(batch, device: torch.device):
    """As the loader hands batches over where there is a GPU."""
    if device.type == "cpu":
        return batch
    return type(batch)(*[x.pin_memory() for x in batch[:6]])


def two_batches(device: torch.device) -> list:
    return [pinned(collate(draw_samples()[:3], 28), device), pinned(collate(draw_samples()[3:], 28), device)]


def prepared(wide: LLaVAPhi, cfg: Namespace, mesh, device: torch.device, batches: list | None = None,
             gather: str = "on") -> tuple:
    """A copy of the model on the device, ready for training, and train.py's step on it, ready to be taken."""
    model = copy.deepcopy(wide).requires_grad_().to(device).train()
    train.shard(model, mesh, train.torch_dtype(cfg.dtype), gather)
    optimizer = train.make_optimizer(model, cfg)
    batches = batches or two_batches(device)
    supervised = sum(len(batch.targets) for batch in batches)
    step = Step(0, list(range(5)), batches)
    return model, partial(train.train_step, model, optimizer, step, cfg, supervised, 1.0, device)


def whole(p: Tensor) -> Tensor:
    return p.full_tensor() if hasattr(p, "full_tensor") else p


# The gradients of both micro-batches are clipped together, as the step's are.


def plain_step(wide: LLaVAPhi, cfg: Namespace, device: torch.device) -> tuple[float, list[Tensor]]:
    """The same step without any of train.py: masters in fp32, a copy in the compute dtype, gradients summed in fp32."""
    masters = [p.detach().clone().to(device) for p in wide.parameters()]
    model = copy.deepcopy(wide).requires_grad_().to(device, train.torch_dtype(cfg.dtype)).train()
    optimizer = torch.optim.AdamW(masters, cfg.lr, (cfg.beta1, cfg.beta2), eps=cfg.eps, weight_decay=cfg.weight_decay)
    batches = two_batches(device)
    supervised = sum(len(batch.targets) for batch in batches)
    total = 0.0
    for batch in batches:
        model.zero_grad()
        loss = model(*train.to_device(batch, device)) / supervised
        loss.backward()
        total += float(loss.detach())
        for master, p in zip(masters, model.parameters()):
            master.grad = p.grad.float() if master.grad is None else master.grad + p.grad.float()
    torch.nn.utils.clip_grad_norm_(masters, cfg.grad_clip)
    optimizer.step()
    return total, masters


@pytest.mark.parametrize("gather", ["off", "on"])
def test_a_step_equals_plain_adamw(wide, device, dtype, group, gather):
    """FSDP's sharding, casting and summing add nothing of their own."""
    cfg = settings("--dtype", "fp32" if dtype == torch.float32 else "bf16")
    model, step = prepared(wide, cfg, group, device, gather=gather)
    loss, norm, skipped = step()
    plain_loss, masters = plain_step(wide, cfg, device)
    assert not skipped and norm > 0
    # In bf16 the last sum of the loss may be rounded at another place. The weights are compared as they have moved.
    assert loss == pytest.approx(plain_loss, rel=1e-5 if dtype == torch.float32 else 2e-3)
    bound = 1e-3 if dtype == torch.float32 else 0.05
    moved = torch.cat([(whole(p) - old.to(device)).flatten() for p, old in zip(model.parameters(), wide.parameters())])
    expected = torch.cat([(new - old.to(device)).flatten() for new, old in zip(masters, wide.parameters())])
    assert relative(moved.detach(), expected) < bound


def test_a_step_waits_for_the_device_once(wide, device, group):
    """Every other wait would leave the GPU idle while the host prepares the next kernels.

    The micro-batches are long, since for few tokens the embedding's gradient is computed by another kernel.
    """
    batch = pinned(worst_batch(LONG, 8192 if device.type == "cuda" else 256), device)
    _, step = prepared(wide, settings("--dtype", "bf16"), group, device, [batch, batch])
    for _ in range(2):                                      # what is set up the first time may wait
        step()
    if device.type == "cpu":
        return
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    waits = [f"{w.filename}:{w.lineno}" for w in caught if "synchronizing" in str(w.message)]
    assert len(waits) == 1, waits


@pytest.mark.parametrize("recompute", ["none", "full"])
def test_compiled_training_equals_eager(wide, device, group, recompute, monkeypatch):
    """Three steps each. Compiled code rounds at other places, so the bounds are those of bf16."""
    if device.type == "cpu":
        # Traced, and then run as it is: a C++ compiler would take most of a minute.
        monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    # Each side has a model of its own, so that neither finds the other's compiled code or optimizer.
    results = []
    for compiled in (False, True):
        model, step = prepared(wide, settings("--dtype", "bf16"), group, device)
        model.llm.recompute = recompute
        if compiled:
            torch._dynamo.reset()
            train.compile_blocks(model, device)
        results.append([step() for _ in range(3)])
    for (loss, norm, _), (compiled_loss, compiled_norm, _) in zip(*results):
        assert compiled_loss == pytest.approx(loss, rel=0.02)
        assert compiled_norm == pytest.approx(norm, rel=0.1)
    assert results[1][2][0] < results[1][0][0]              # it does learn


def test_a_run_stopped_and_resumed_goes_on_where_it_was(chat_json, device, tmp_path):
    """Bit for bit on a CPU. On a GPU some sums (of the embedding's gradient) are taken in any order."""
    if device.type == "cpu" and torch.cuda.is_available():
        pytest.skip("there is a GPU, and train.py takes it")
    more = ["--max-steps", "6", "--dropout", "0.1"]
    train_here(train_flags(tmp_path / "whole", chat_json, *more))
    train_here(train_flags(tmp_path / "parts", chat_json, *more), stop_after=3)
    train_here(train_flags(tmp_path / "parts", chat_json, *more))
    for a, b in zip(metrics(tmp_path / "whole"), metrics(tmp_path / "parts"), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-3)
    x, y = (load_file(tmp_path / out / "model.safetensors") for out in ("whole", "parts"))
    for name in x:
        torch.testing.assert_close(x[name], y[name], atol=2e-3, rtol=1e-2)


OUT_OF_MEMORY = ("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 23.52 GiB of which "
                 "1.10 GiB is free. Including non-PyTorch memory, this process has 22.40 GiB memory in use.")


def test_out_of_memory_is_told_with_what_was_asked_and_what_is_free(device, group):
    """From the message that this very PyTorch writes: its wording is all there is to read the numbers from."""
    problem = torch.OutOfMemoryError(OUT_OF_MEMORY)
    if device.type == "cuda":
        with pytest.raises(torch.OutOfMemoryError) as error:
            torch.empty(2 ** 45, dtype=torch.uint8, device=device)
        problem = error.value
    line = explain(problem, settings("--recompute", "none"))
    for part in ("Tried to allocate", "total capacity of", "is free", "--micro-tokens", "--recompute full"):
        assert part in line


LARGE = LLaVAConfig(llm=PhiConfig(n_layer=6), vision=VisionConfig(n_layer=6))       # a fifth of the published model


@pytest.mark.parametrize("stage, recompute", [("finetune", "none"), ("pretrain", "full")])
def test_peak_memory_is_what_the_plan_says(stage, recompute, device, group, monkeypatch):
    """Within 10 %, with the published widths. The plan is for the worst that a micro-batch of its size can hold.

    So the batch here is near that: 4,096 tokens supervised, and as many pictures as the other half takes.
    """
    # On a CPU there is no allocator to ask for its peak; the walk through the test is all that remains.
    on_gpu = device.type == "cuda"
    config, tokens = (LARGE, 8192) if on_gpu else (LONG, 256)
    cfg = settings("--stage", stage, "--recompute", recompute, "--micro-tokens", str(tokens))
    monkeypatch.setattr(train, "read_weights", lambda model, source, cfg: zero_all(model))
    model = train.build(cfg, config, None, group, device)
    memory = plan.memory_plan(cfg, model, 1, recompute, model.gather)
    planned = sum(memory.values()) - memory["workspace"]
    if on_gpu and planned > 0.8 * torch.cuda.get_device_properties(device).total_memory:
        pytest.skip(f"the test needs a GPU with {planned / 0.8e9:.0f} GB")
    batch = worst_batch(config, tokens)
    optimizer = train.make_optimizer(model, cfg)
    step = Step(0, [0], [batch, batch])                     # two: behind the first, there are gradients
    take = partial(train.train_step, model, optimizer, step, cfg, 2 * len(batch.targets), 1.0, device)
    take()
    if not on_gpu:
        return
    torch.cuda.reset_peak_memory_stats()
    take()
    assert torch.cuda.max_memory_allocated() == pytest.approx(planned, rel=0.1)


def zero_all(model: LLaVAPhi) -> None:
    """In place of reading weights: memory does not depend on them, and the published model is not here."""
    with torch.no_grad():
        for p in model.parameters():
            (p.to_local() if hasattr(p, "to_local") else p).zero_()


def worst_batch(config: LLaVAConfig, tokens: int):
    """Half of the tokens are pictures, the other half supervised words, in sequences of a picture and as many words."""
    P, S = config.vision.n_patches, config.vision.image_size
    image = torch.zeros(3, S, S, dtype=torch.uint8)
    made = []
    for i in range(tokens // (2 * P)):
        ids = [IMAGE_ID] * P + [5] * P
        made.append(Sample(str(i), ids, [IGNORE] * P + [5] * P, image))
    return collate(made, S)
